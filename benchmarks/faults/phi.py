"""R16: markers in the place of patient data, in every element that can hold text: is one found anywhere afterwards?

Each hospital gets real DICOM files whose every text-like element of the standard's dictionary, private ones, sequences,
file meta information and preamble among them, holds a marker that names its tag. Then a whole study is run: the real
reader, training, encryption, coordinator and report. After it, every byte that was written or sent is searched, in
several encodings, and so is what `dataset check` prints about good, cut and broken files.

Names of files and folders carry another marker. They may stay in the hospital's own home, which lists its files; they
are counted there, and counted as found anywhere else.
"""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flwr.app import Message
from pydicom.datadict import DicomDictionary
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from faults.figures import Figure
from fedmedgan.client.app import MAX_PAYLOAD_BYTES
from fedmedgan.server.app import KEY_FILE
from fedmedgan.server.cycle import Coordinator
from fedmedgan.shared.agreement import Agreement
from fedmedgan.shared.errors import FedMedGanError
from fedmedgan.shared.messages import Envelope
from fedmedgan.shared.secure_sum.keys import load_signing_key
from fedmedgan.shared.study import Study, from_dict
from fedmedgan.simulations import consortium, phantoms, report
from fedmedgan.simulations.local_grid import LocalGrid

NAME = "phi"
NOTES = [
    "R16: numbers (DS, IS, dates, times, UIDs) are searched as the digits that were planted, not as binary floats.",
    "R16_names_at_home: files of the hospitals' own homes that name DICOM files or their folder (cache, policy).",
]
TAG, NAMED = "ZZPHI", "QQNAME"
DIGITS, DATE, TIME = "887766554", "18870417", "041733.887766"
NEEDLES = (TAG, DIGITS, DATE, TIME)

_TEXT = ("PN", "LO", "SH", "LT", "ST", "UT", "UC", "UR", "AE", "CS")
_NUMBERS = {"UI": f"2.25.{DIGITS}", "DA": DATE, "DT": f"{DATE}041733", "TM": TIME, "DS": f"{DIGITS}.5", "IS": DIGITS}
_LEFT_ALONE = (0x00080005, 0x00080016, 0x00080060, 0x20500020)
"""Character set, SOP class, modality, presentation LUT shape: with a marker there, the file would not be read."""
_LEFT_ALONE_GROUPS = (0x0000, 0x0002, 0x0004, 0x5400, 0x7FE0, 0xFFFC, 0xFFFE)
SITES, PATIENTS = 3, 12


def measure(size: float) -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="phi") as scratch:
        folder = Path(scratch)
        tags = dictionary_tags()[:: max(1, round(1 / min(1.0, size)))]
        data, planted = write_data(folder / f"{NAMED}-archive", tags)
        traces = in_process(folder / "run", data) + refused(folder / "refused", data)
        write_broken(folder / f"{NAMED}-broken", next(files_of(data["site-0"])), tags)
        traces += dataset_checks({"good": data["site-0"], "broken": folder / f"{NAMED}-broken"})
        if size >= 1:
            traces += simulated(folder, data)
        return figures(planted, sum(1 for path in files_of(*data.values())), traces)


@dataclass(frozen=True)
class Trace:
    """Something that was written, sent or printed."""

    place: str
    data: bytes
    at_home: bool = False
    """In the hospital's own home or on its own terminal, where names of its files may be."""


def figures(planted: int, n_files: int, traces: list[Trace]) -> list[Figure]:
    values = [found for trace in traces for found in search(trace, NEEDLES)]
    names = [found for trace in traces if not trace.at_home for found in search(trace, (NAMED,))]
    for place in sorted({*values, *names}):
        print(f"found: {place}", file=sys.stderr)
    at_home = [trace for trace in traces if trace.at_home and search(trace, (NAMED,))]
    return [
        Figure("R16_markers_planted", planted, ">= 100"),
        Figure("R16_files", n_files),
        Figure("R16_artefacts_searched", len(traces)),
        Figure("R16_bytes_searched", sum(len(trace.data) for trace in traces)),
        Figure("R16_found", len(values) + len(names), "== 0"),
        Figure("R16_names_at_home", len(at_home)),
    ]


# ---- planting


def dictionary_tags() -> list[tuple[int, str]]:
    """(tag, VR) of every element of the standard that can hold text, digits or items, but for the image itself."""
    tags = []
    for tag, (representation, *_) in sorted(DicomDictionary.items()):
        image = tag >> 16 == 0x0028 and representation in ("CS", "DS", "IS", "SQ")
        taken = tag not in _LEFT_ALONE and tag >> 16 not in _LEFT_ALONE_GROUPS and not image
        if taken and representation in (*_TEXT, *_NUMBERS, "SQ"):
            tags.append((tag, representation))
    return tags


def marker(tag: int, representation: str) -> str:
    return _NUMBERS.get(representation, f"{TAG}{tag:08X}")


def plant(dataset: Dataset, tags: Iterable[tuple[int, str]], patient: int, image: int) -> int:
    """Put a marker into every one of these elements, and where else a file can carry text. Returns how many."""
    count = 0
    for tag, representation in tags:
        if representation == "SQ":
            item, inner = Dataset(), Dataset()
            inner.PatientName = f"{TAG}^INNER{tag:08X}"
            item.PatientID = f"{TAG}{tag:08X}"
            item.ReferencedImageSequence = Sequence([inner])
            dataset.add_new(tag, "SQ", Sequence([item]))
        else:
            dataset.add_new(tag, representation, marker(tag, representation))
        count += 1
    dataset.PatientID = f"{TAG}-PATIENT-{patient}"
    dataset.SOPInstanceUID = f"2.25.{DIGITS}{image}"
    for group in range(0x0009, 0x0029, 2):
        block = dataset.private_block(group, f"{TAG} VENDOR {group:X}", create=True)
        block.add_new(0x01, "LO", f"{TAG}^PRIVATE")
        block.add_new(0x02, "UN", TAG.encode() * 2 + b" ")
        block.add_new(0x03, "OB", TAG.encode() * 2)
        count += 4
    meta = dataset.file_meta
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    meta.SourceApplicationEntityTitle = meta.ImplementationVersionName = f"{TAG}META"
    meta.PrivateInformationCreatorUID, meta.PrivateInformation = f"2.25.{DIGITS}", TAG.encode() * 2
    dataset.preamble = (TAG.encode() * 26)[:128]
    return count + 6


def write_data(archive: Path, tags: list[tuple[int, str]]) -> tuple[dict[str, Path], int]:
    """A folder of planted files for each site. Returns them, and how many elements of one file hold a marker."""
    planted = 0
    for site in range(SITES):
        drawn = archive / f"drawn-{site}"
        vendor = phantoms.vendor_for(site)
        rng = np.random.default_rng(site)
        anatomy = phantoms.draw_anatomy(rng, PATIENTS, vendor.build)
        labels_N = np.arange(PATIENTS) % 2
        images = phantoms.radiographs(anatomy, labels_N, 32, rng)
        for n, (image, label) in enumerate(zip(images, labels_N, strict=True)):
            origin = [str(site), str(n)]
            dataset = phantoms.to_dicom(image, vendor, patient_id="x", study=1, origin=origin, synthetic=False)
            planted = plant(dataset, tags, n, site * 1000 + n)
            path = drawn / phantoms.CLASSES[label] / f"{NAMED}_DOE^JANE" / f"{NAMED}^{n}.dcm"
            path.parent.mkdir(parents=True, exist_ok=True)
            dataset.save_as(path, enforce_file_format=True)
    return {f"site-{site}": archive / f"drawn-{site}" for site in range(SITES)}, planted


def write_broken(folder: Path, good: Path, tags: list[tuple[int, str]]) -> None:
    """Files whose errors could repeat what is in them."""
    (folder / "clear").mkdir(parents=True)
    whole = good.read_bytes()
    (folder / "clear" / f"{NAMED}-half.dcm").write_bytes(whole[: len(whole) // 2])
    (folder / "clear" / f"{NAMED}-in-a-marker.dcm").write_bytes(whole[: whole.rindex(TAG.encode()) + 3])
    (folder / "clear" / f"{NAMED}.txt").write_text(f"{TAG} " * 100)
    (folder / "clear" / f"{NAMED}-nowhere.dcm").symlink_to(folder / f"{TAG}")
    os.mkfifo(folder / "clear" / f"{NAMED}-pipe.dcm")
    closed = folder / "clear" / f"{NAMED}-closed.dcm"
    closed.write_bytes(whole)
    closed.chmod(0)
    wrong = {"RescaleSlope": "LO", "Rows": "LO", "WindowWidth": "LO", "NumberOfFrames": "LO"}
    wrong |= {"PhotometricInterpretation": "CS", "Modality": "CS", "BurnedInAnnotation": "CS", "BitsAllocated": "SH"}
    for keyword, representation in wrong.items():
        vendor = phantoms.vendor_for(0)
        image = np.linspace(0, 1, 1024, dtype=np.float32).reshape(32, 32)
        dataset = phantoms.to_dicom(image, vendor, patient_id="x", study=1, origin=[keyword], synthetic=False)
        plant(dataset, tags, 99, 9000 + len(keyword))
        tag = next(t for t, entry in DicomDictionary.items() if entry[4] == keyword)
        dataset.add_new(tag, representation, f"{TAG}{tag:08X}")
        dataset.save_as(folder / "clear" / f"{NAMED}-{keyword}.dcm", enforce_file_format=True)


# ---- what is left behind


class Listening(LocalGrid):
    """Keeps every message, both ways."""

    def __init__(self, homes: Iterable[Path]) -> None:
        super().__init__(homes)
        self.heard: list[Trace] = []

    def call(self, node: int, message: Message) -> Message:
        answer = super().call(node, message)
        for way, said in (("to", message), ("from", answer)):
            place = f"message {way} node {node}, {message.metadata.message_type}"
            text = str(said.error.reason).encode() if said.has_error() else b""
            content = b"" if said.has_error() else Envelope.from_record(said.content, MAX_PAYLOAD_BYTES).to_bytes()
            self.heard.append(Trace(place, text + content + repr(said.metadata).encode()))
        return answer


def a_study() -> Study:
    return from_dict(
        {
            "name": "markers",
            "round_timeout": 120.0,
            "sites": [{"name": f"site-{i}", "patients": PATIENTS} for i in range(SITES)],
            "images": {"size": 28},
            "gan": {"generator_width": 4, "discriminator_width": 4, "latent": 8},
            "training": {"rounds": 2, "local_steps": 2, "patients_per_step": 4, "discriminator_steps": 1},
            "privacy": {"delta": 0.01, "epsilon": 20.0},
        }
    )


def in_process(run_folder: Path, data: dict[str, Path]) -> list[Trace]:
    """A whole study with the real hospitals and coordinator, to its report."""
    study = consortium.prepare(a_study(), run_folder, data)
    consortium.read_data(run_folder, study)
    grid = Listening(consortium.homes(run_folder, study))
    _coordinate(run_folder, grid)
    report.write(run_folder)
    return grid.heard + written(run_folder)


def refused(run_folder: Path, data: dict[str, Path]) -> list[Trace]:
    """A study in which one hospital's folder is gone: it refuses, and the coordinator says why it stopped."""
    study = consortium.prepare(a_study(), run_folder, data)
    home = consortium.home_of(run_folder, "site-0")
    policy = (home / "policy.toml").read_text()
    (home / "policy.toml").write_text(policy.replace(str(data["site-0"]), f"/{NAMED}/gone"))
    grid = Listening(consortium.homes(run_folder, study))
    said = b""
    try:
        _coordinate(run_folder, grid)
    except FedMedGanError as error:
        said = error.line().encode()
    return [Trace("the coordinator's error", said), *grid.heard, *written(run_folder)]


def _coordinate(run_folder: Path, grid: Listening) -> None:
    agreement = Agreement.load(run_folder / "study.json")
    Coordinator(grid, agreement, load_signing_key(run_folder / KEY_FILE), run_folder).run()


def dataset_checks(folders: dict[str, Path], forms: Iterable[str] = ("human", "json")) -> list[Trace]:
    """What `dataset check` prints. It lists file names: that is what it is for."""
    return [
        Trace(f"dataset check, {name}, {form}", _command("--format", form, "dataset", "check", str(path)), at_home=True)
        for name, path in folders.items()
        for form in forms
    ]


def simulated(folder: Path, data: dict[str, Path]) -> list[Trace]:
    """`fedmedgan simulate` on the engine, with what it prints and what Ray keeps."""
    study = a_study().model_dump(mode="json")
    lines = [
        f"name = {study['name']!r}",
        *(f'[[sites]]\nname = "{s["name"]}"\npatients = {PATIENTS}' for s in study["sites"]),
    ]
    for section in ("images", "gan", "training", "privacy"):
        lines += [f"[{section}]", *(f"{key} = {_toml(value)}" for key, value in study[section].items())]
    (folder / "study.toml").write_text("\n".join(lines))
    options = [f"--data={site}={path}" for site, path in data.items()]
    with tempfile.TemporaryDirectory(prefix="r") as ray:
        run_folder = folder / "simulated"
        shown = _command("simulate", str(folder / "study.toml"), "--out", str(run_folder), *options, RAY_TMPDIR=ray)
        if not (run_folder / "report.html").exists():
            raise RuntimeError(shown.decode()[-2000:])
        logs = [Trace(f"ray {path.name}", path.read_bytes()) for path in files_of(Path(ray))]
    return [Trace("simulate", shown), *logs, *written(run_folder)]


def _toml(value: object) -> str:
    return repr(value).lower() if isinstance(value, bool) else repr(value)


def _command(*arguments: str, **environment: str) -> bytes:
    command = [sys.executable, "-c", "from fedmedgan.cli.main import run; run()", *arguments]
    done = subprocess.run(command, capture_output=True, check=False, env={**os.environ, **environment})
    return done.stdout + done.stderr


def files_of(*folders: Path) -> Iterator[Path]:
    for folder in folders:
        yield from sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def written(run_folder: Path) -> list[Trace]:
    """Every file of a run, its name among what is searched."""
    traces = []
    for path in files_of(run_folder):
        name = str(path.relative_to(run_folder))
        home = name.startswith("hospitals/")
        traces.append(Trace(name, name.encode() + b"\n" + path.read_bytes(), at_home=home))
    return traces


# ---- searching


def forms(needle: str) -> set[bytes]:
    """A text in the encodings in which it could have been kept."""
    raw = needle.encode()
    found = {raw, needle.lower().encode(), needle.encode("utf-16-le"), needle.encode("utf-16-be")}
    found |= {raw.hex().encode(), raw.hex().upper().encode()}
    for shift in range(3):  # base64 of a text depends on where it starts; its first and last digits on its neighbours
        encoded = base64.b64encode(bytes(shift) + raw)
        found.add(encoded[-(-8 * shift // 6) : (shift + len(raw)) * 8 // 6])
    return found


def search(trace: Trace, needles: Iterable[str]) -> list[str]:
    """Where a needle is in a trace: one entry a needle and form."""
    return [
        f"{trace.place}: {needle} as {form!r}"
        for needle in needles
        for form in sorted(forms(needle))
        if form in trace.data
    ]
