"""``fedmedgan dataset check``: both formats, exit codes, and no value of a header anywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from test_dicom import GOOD, element, encode, insert, make
from typer.testing import CliRunner

from fedmedgan.cli import dataset, output
from fedmedgan.client.data.patients import load_patients
from fedmedgan.shared.errors import HINTS, DataError, FedMedGanError
from fedmedgan.shared.study import Images

MARKER = "ZZPHI"

PROGRAM = """
import sys
from fedmedgan.cli import dataset, output
from fedmedgan.shared.errors import FedMedGanError
output.use_format(sys.argv[1])
try:
    dataset.app(sys.argv[2:])
except FedMedGanError as error:
    output.emit_error(error)
    sys.exit(2)
"""


@pytest.fixture(autouse=True)
def _human():
    yield
    output.use_format("human")


def check(*arguments: str) -> tuple[str, FedMedGanError | None]:
    result = CliRunner().invoke(dataset.app, ["check", *arguments])
    assert result.exception is None or isinstance(result.exception, FedMedGanError), result.output
    return result.output, result.exception


def check_json(*arguments: str) -> dict:
    output.use_format("json")
    text, error = check(*arguments)
    assert error is None
    envelope = json.loads(text)
    assert set(envelope) == {"schema_version", "status", "data"}
    assert (envelope["schema_version"], envelope["status"]) == ("1", "ok")
    return envelope["data"]


def run(form: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, form, "check", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.dcm").write_bytes(encode(make(seed=1)))
    (folder / "sub" / "b.dcm").write_bytes(encode(make(seed=2, Modality="MR")))
    (folder / "sub" / "[bold]us.dcm").write_bytes(encode(make(seed=3, Modality="US")))
    (folder / "cut.dcm").write_bytes(GOOD[:-9])
    return folder


def test_the_table_counts_and_lists_what_is_not_used(folder):
    text, error = check(str(folder))
    assert error is None
    rows = {tuple(part.strip() for part in line.split("│")[1:3]) for line in text.splitlines() if "│" in line}
    assert {("images", "2"), ("patients", "2"), ("files", "4"), ("not used: DICOM_TRUNCATED", "1")} <= rows
    assert "cut.dcm: the pixel data ends too early (DICOM_TRUNCATED)" in text
    assert "sub/[bold]us.dcm: its modality is not taken (DICOM_MODALITY)" in text
    assert "a.dcm:" not in text


def test_the_envelope(folder):
    data = check_json(str(folder))
    assert set(data) == {"images", "patients", "files"}
    assert (data["images"], data["patients"]) == (2, 2)
    assert [f["path"] for f in data["files"]] == ["a.dcm", "cut.dcm", "sub/[bold]us.dcm", "sub/b.dcm"]
    keys = {"path", "outcome", "code", "shape", "pixel_sha256", "used", "reason", "role"}
    assert all(set(f) == keys for f in data["files"])
    first = data["files"][0]
    assert (first["outcome"], first["code"], first["shape"], first["used"]) == ("decoded", "", [8, 8], True)
    assert len(first["pixel_sha256"]) == 64
    assert [f["outcome"] for f in data["files"]] == ["decoded", "refused", "decoded", "decoded"]


def test_modalities_can_be_chosen(folder):
    data = check_json(str(folder), "--modality", "us", "--modality", "CR")
    assert [f["used"] for f in data["files"]] == [True, False, True, False]


def test_a_study_brings_its_rules(folder, tmp_path):
    sites = "".join(f'[[sites]]\nname = "s{n}"\npatients = 99\n' for n in range(3))
    study = tmp_path / "study.toml"
    study.write_text(f'name = "x"\n{sites}\n[images]\nclasses = ["sub", "b"]\nmodalities = ["CR", "MR"]\n')
    data = check_json(str(folder), "--study", str(study))
    assert [f["code"] for f in data["files"]] == ["DATA_LABEL", "DICOM_TRUNCATED", "DICOM_MODALITY", ""]
    _, error = check(str(folder), "--study", str(tmp_path / "absent.toml"))
    assert error is not None
    assert error.code == "CONFIG_NOT_FOUND"


def test_nothing_usable_is_shown_and_then_an_error(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    text, error = check(str(tmp_path))
    assert "notes.txt: the file does not start as a DICOM file does (DICOM_NOT_DICOM)" in text
    assert isinstance(error, DataError)
    assert error.code == "DATA_EMPTY"
    assert "DICOM_NOT_DICOM 1" in error.line()
    data = check_json(str(tmp_path))
    assert (data["images"], data["patients"], data["files"][0]["code"]) == (0, 0, "DICOM_NOT_DICOM")


@pytest.mark.parametrize("form", ["human", "json"])
@pytest.mark.parametrize("code", ["DATA_PATH", "DATA_EMPTY"])
def test_no_folder_and_an_empty_one_are_errors(tmp_path, form, code):
    answer = run(form, tmp_path if code == "DATA_EMPTY" else tmp_path / "absent")
    assert answer.returncode == 2
    if form == "json":
        envelope = json.loads(answer.stdout)
        assert (envelope["status"], envelope["error"]["code"]) == ("error", code)
        assert answer.stderr == ""
    else:
        assert answer.stdout == ""
        assert answer.stderr.startswith(f"error[{code}]: ")
        assert len(answer.stderr.splitlines()) == 1


def test_control_characters_in_names_do_not_reach_the_terminal(tmp_path):
    (tmp_path / "a\x1b[2J\nb.dcm").write_text("x")
    (tmp_path / os.fsdecode(b"\xff.dcm")).write_text("x")
    text, _ = check(str(tmp_path))
    assert "\x1b[2J" not in text
    assert "a\\x1b[2J\\nb.dcm" in text
    assert "\\xff.dcm" in text


# ---- no value of a header is ever shown or kept

PLANTED = [
    "PatientName",
    "PatientID",
    "PatientAddress",
    "OtherPatientNames",
    "PatientMotherBirthName",
    "PatientTelephoneNumbers",
    "PatientComments",
    "MedicalRecordLocator",
    "MilitaryRank",
    "EthnicGroup",
    "Occupation",
    "AdditionalPatientHistory",
    "ReferringPhysicianName",
    "ReferringPhysicianAddress",
    "PerformingPhysicianName",
    "OperatorsName",
    "NameOfPhysiciansReadingStudy",
    "RequestingPhysician",
    "InstitutionName",
    "InstitutionAddress",
    "InstitutionalDepartmentName",
    "StationName",
    "AccessionNumber",
    "StudyID",
    "StudyDescription",
    "SeriesDescription",
    "ProtocolName",
    "DeviceSerialNumber",
    "ManufacturerModelName",
    "ImageComments",
    "DerivationDescription",
    "AdmissionID",
    "CurrentPatientLocation",
    "RequestedProcedureDescription",
    "ReasonForStudy",
]


def planted(**changes) -> Dataset:
    ds = make(**changes)
    for name in PLANTED:
        setattr(ds, name, f"{MARKER}^{name[:9]}")
    ds.StudyDate, ds.InstitutionName = "19700101", MARKER * 3
    block = ds.private_block(0x0099, f"{MARKER} VENDOR", create=True)
    block.add_new(1, "LO", f"{MARKER}^PRIVATE")
    block.add_new(2, "UN", MARKER.encode() * 2)
    item = Dataset()
    item.PatientName = f"{MARKER}^NESTED"
    ds.RequestAttributesSequence = Sequence([item])
    return ds


def broken_variants() -> dict[str, bytes]:
    """Files with the marker where pydicom's own error texts and warnings would repeat it."""
    good = encode(planted(seed=50))
    text = MARKER.encode() + b" "
    swapped = {
        "frames": element(0x00280008, b"IS", text),
        "width": element(0x00281051, b"DS", text) + element(0x00281050, b"DS", b"1 "),
        "slope": element(0x00281053, b"DS", text),
        "rows": element(0x00280010, b"LO", text),
        "charset": element(0x00080005, b"CS", text),
        "date": element(0x00080020, b"DA", text),
        "function": element(0x00281056, b"CS", text)
        + element(0x00281050, b"DS", b"1 ")
        + element(0x00281051, b"DS", b"9 "),
        "vr": element(0x00080001, b"ZZ", text),
        "length": element(0x00080001, b"UN", text, 0xFFFFFFF0),
        "shape": element(0x20500020, b"CS", text),
        "lut": element(0x00283010, b"SQ", text),
    }
    files = {name: insert(encode(_without(name)), extra) for name, extra in swapped.items()}
    files["photometric"] = encode(planted(seed=51, PhotometricInterpretation=MARKER))
    files["modality"] = encode(planted(seed=52, Modality=MARKER))
    files["burned"] = encode(planted(seed=53, BurnedInAnnotation=MARKER))
    files["syntax"] = good.replace(b"1.2.840.10008.1.2.1\0", b"1.2." + MARKER.encode() * 3 + b"\0")
    files["bits"] = encode(planted(seed=54, BitsAllocated=13))
    files["header"] = good[: good.index(MARKER.encode()) + 9]
    files["cut"] = good[: len(good) // 2]
    files["text"] = MARKER.encode() * 90
    return files


def _without(name: str) -> Dataset:
    ds = planted(seed=len(name) + 60)
    if name == "rows":
        del ds.Rows
    if name == "date":
        del ds.StudyDate
    return ds


def test_no_value_of_a_header_is_printed_or_kept(tmp_path):
    folder, cache = tmp_path / "data", tmp_path / "home" / "cache"
    folder.mkdir()
    for n in range(3):
        (folder / f"good-{n}.dcm").write_bytes(encode(planted(seed=n)))
    for name, data in broken_variants().items():
        (folder / f"{name}.dcm").write_bytes(data)
    assert all(MARKER.encode() in path.read_bytes() for path in folder.iterdir())

    answers = [run("human", folder), run("json", folder)]
    assert [answer.returncode for answer in answers] == [0, 0]
    files = {f["path"]: f for f in json.loads(answers[1].stdout)["data"]["files"]}
    assert all(files[f"good-{n}.dcm"]["used"] for n in range(3))
    broken = ("frames", "width", "slope", "rows", "vr", "length")
    assert {files[f"{name}.dcm"]["code"] for name in broken} == {
        "DICOM_FRAMES",
        "DICOM_WINDOW",
        "DICOM_RESCALE",
        "DICOM_GEOMETRY",
        "DICOM_VR",
        "DICOM_TRUNCATED",
    }
    rules = Images(size=32, classes=("image",))
    found = load_patients(folder, rules, pseudonym_key=b"k" * 32, cache=cache)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "modality.dcm").write_bytes((folder / "modality.dcm").read_bytes())
    with pytest.raises(DataError) as caught:
        load_patients(empty, rules, pseudonym_key=b"k" * 32)
    kept = b"".join(path.read_bytes() for path in cache.parent.iterdir())
    shown = "".join(a.stdout + a.stderr for a in answers) + repr(found) + repr(caught.value)
    assert len(kept) > 1000
    for needle in (MARKER, MARKER.lower(), MARKER.encode().hex(), "19700101"):
        assert needle not in shown
        assert needle.encode() not in kept
    for answer in answers:
        assert answer.stderr == ""
    assert all(not f["code"] or f["code"] in HINTS for f in files.values())


def test_the_installed_command(folder):
    program = "from fedmedgan.cli.main import run; run()"
    command = [sys.executable, "-c", program, "--format", "json", "dataset", "check", str(folder)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["data"]["images"] == 2
    command[-1] = str(folder / "absent")
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert json.loads(answer.stdout)["error"]["code"] == "DATA_PATH"
