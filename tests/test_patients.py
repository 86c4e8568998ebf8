"""A folder as images grouped by patient: rules, labels, copies, unsafe entries, dying workers, the cache."""

from __future__ import annotations

import os
import re
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dicom import PACKAGED, bomb, encode, make

from fedmedgan.client.data import labels, patients, pool, worker
from fedmedgan.client.data.limits import Limits
from fedmedgan.client.data.outcomes import FolderReport
from fedmedgan.client.data.patients import PatientImages, check_folder, load_patients
from fedmedgan.client.data.pool import Examined, WorkerPool
from fedmedgan.shared.errors import HINTS, CryptoError, DataError, RunError
from fedmedgan.shared.study import Images

ONE = Images(size=32, classes=("image",))
TWO = Images(size=32, classes=("clear", "opacity"))
KEY = bytes(range(32))


class InProcess(WorkerPool):
    """The same decoding without processes, for tests of what is made of the answers."""

    def __init__(self, size, modalities, key, limits, workers, targets=False):
        self.task = worker.Task(size, frozenset(modalities), key, limits, targets)

    def __exit__(self, *_):
        pass

    def examine(self, paths):
        for index, path in reversed(list(enumerate(paths))):  # any order is allowed
            found = worker.examine(path, self.task)
            yield index, Examined(**vars(found))


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr(patients, "WorkerPool", InProcess)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def write(folder: Path, name: str, **changes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(make(**changes)))
    return path


def codes(report: FolderReport) -> dict[str, str]:
    return {file.path: file.code for file in report.files}


def load(folder: Path, rules: Images = ONE, **options) -> PatientImages:
    return load_patients(folder, rules, pseudonym_key=KEY, workers=1, **options)


# ---- grouping


def test_images_are_grouped_by_patient_in_the_order_of_their_paths(tmp_path, in_process):
    write(tmp_path, "b/2.dcm", seed=2, PatientID="Y")
    write(tmp_path, "a/1.dcm", seed=1, PatientID="X")
    write(tmp_path, "c/3.dcm", seed=3, PatientID="X ")  # padding is no part of an identifier
    frames = np.random.default_rng(0).integers(0, 4096, (3, 8, 8), dtype=np.uint16)
    write(tmp_path, "c/4.dcm", seed=4, PatientID="Z", NumberOfFrames=3, PixelData=frames.tobytes())
    found = load(tmp_path)
    assert found.images_N1HW.shape == (6, 1, 32, 32)
    assert found.images_N1HW.dtype == np.float16
    assert np.abs(found.images_N1HW).max() <= 1
    assert found.patient_N.tolist() == [0, 1, 0, 2, 2, 2]
    assert found.labels_N.tolist() == [0] * 6
    assert found.patient_N.dtype == found.labels_N.dtype == np.int64
    assert (found.n_patients, found.report.patients, found.report.images) == (3, 3, 6)
    assert [file.path for file in found.report.files] == ["a/1.dcm", "b/2.dcm", "c/3.dcm", "c/4.dcm"]
    assert all(file.used for file in found.report.files)
    alone = tmp_path / "alone"
    write(alone, "2.dcm", seed=2)
    assert np.array_equal(load(alone).images_N1HW[0], found.images_N1HW[1])


def test_pseudonyms_are_in_the_order_of_the_patients_and_depend_on_the_key_alone(tmp_path, in_process):
    def one(patient: str, key: bytes = KEY) -> str:
        write(tmp_path / patient / str(key[0]), "1.dcm", PatientID=patient)
        (name,) = load_patients(tmp_path / patient / str(key[0]), ONE, pseudonym_key=key, workers=1).pseudonyms
        return name

    for name, patient in enumerate(("Y", "X", "Y", "Z")):
        write(tmp_path / "all", f"{name}.dcm", seed=name, PatientID=patient)
    found = load(tmp_path / "all")
    assert found.pseudonyms == (one("Y"), one("X"), one("Z"))
    assert [found.pseudonyms[number] for number in found.patient_N] == [one(p) for p in ("Y", "X", "Y", "Z")]
    assert all(re.fullmatch("[0-9a-f]{32}", name) for name in found.pseudonyms)
    assert one("Y", KEY[::-1]) != one("Y")
    assert found.pseudonyms[0] not in repr(found)


def test_rules(tmp_path, in_process):
    write(tmp_path, "good.dcm", seed=0)
    write(tmp_path, "burned.dcm", seed=1, BurnedInAnnotation="YES")
    write(tmp_path, "clean.dcm", seed=2, BurnedInAnnotation="NO")
    write(tmp_path, "magnet.dcm", seed=3, Modality="MR")
    write(tmp_path, "nomodality.dcm", seed=4, Modality=None)
    write(tmp_path, "nobody.dcm", seed=5, PatientID=None)
    write(tmp_path, "empty.dcm", seed=6, PatientID="  ")
    write(tmp_path, "flat.dcm", seed=7, PixelData=bytes(128))
    (tmp_path / "rgb.dcm").write_bytes((PACKAGED / "SC_rgb_small_odd.dcm").read_bytes())
    (tmp_path / "report.dcm").write_bytes((PACKAGED / "reportsi.dcm").read_bytes())
    (tmp_path / "notes.txt").write_text("no image")
    report = check_folder(tmp_path, ONE)
    assert codes(report) == {
        "good.dcm": "",
        "clean.dcm": "",
        "burned.dcm": "DICOM_BURNED_IN",
        "magnet.dcm": "DICOM_MODALITY",
        "nomodality.dcm": "DICOM_MODALITY",
        "nobody.dcm": "DATA_PATIENT_ID",
        "empty.dcm": "DATA_PATIENT_ID",
        "flat.dcm": "DICOM_PIXEL_VALUES",
        "rgb.dcm": "DICOM_PHOTOMETRIC",
        "report.dcm": "DICOM_NOT_IMAGE",
        "notes.txt": "DICOM_NOT_DICOM",
    }
    assert {f.path for f in report.files if f.outcome != "decoded"} == {"report.dcm", "notes.txt"}
    assert {f.outcome for f in report.files if f.path == "report.dcm"} == {"skipped"}
    assert all(bool(f.pixel_sha256) == bool(f.shape) == (f.outcome == "decoded") for f in report.files)
    assert all(bool(f.reason) == bool(f.code) == (not f.used) for f in report.files)
    assert report.left_out["DICOM_MODALITY"] == 2
    assert sum(report.left_out.values()) == 9
    assert (report.images, report.patients) == (2, 2)
    assert report.summary() == {"images": 2, "patients": 2, "refused": report.left_out}
    assert FolderReport.from_json(report.to_json()) == report


def test_copies_are_used_once(tmp_path, in_process):
    write(tmp_path, "1.dcm", seed=1, PatientID="one")
    write(tmp_path, "2.dcm", seed=2, SOPInstanceUID="1.2.826.0.1.2", PatientID="one")  # the instance of seed 1
    write(tmp_path, "3.dcm", seed=3, PixelData=make(seed=1).PixelData, PatientID="one")
    write(tmp_path, "4.dcm", seed=4, PatientID="one")
    report = check_folder(tmp_path, ONE)
    assert codes(report) == {
        "1.dcm": "",
        "2.dcm": "DATA_DUPLICATE",
        "3.dcm": "DATA_DUPLICATE",
        "4.dcm": "",
    }
    assert report.patients == 1


def test_nobody_decides_whether_another_patients_images_are_used(tmp_path, in_process):
    """Else one patient more, with copies of all images, would take all others out: add/remove would not hold."""
    for number in range(3):
        write(tmp_path, f"b{number}.dcm", seed=number, PatientID=f"patient {number}")
    alone = check_folder(tmp_path, ONE)
    for number in range(3):
        copied = make(seed=number).PixelData
        write(tmp_path, f"a{number}.dcm", seed=10 + number, PixelData=copied, PatientID="of copies")
    together = check_folder(tmp_path, ONE)
    assert (alone.patients, together.patients) == (3, 4)
    assert {path: code for path, code in codes(together).items() if path.startswith("b")} == codes(alone)


def test_a_copy_of_a_file_that_is_not_used_is_used(tmp_path, in_process):
    write(tmp_path, "a/1.dcm", seed=1)
    write(tmp_path, "clear/1.dcm", seed=1)
    assert codes(check_folder(tmp_path, TWO)) == {"a/1.dcm": "DATA_LABEL", "clear/1.dcm": ""}


def test_identifiers_are_hashed_under_the_key(tmp_path):
    path = str(write(tmp_path, "1.dcm", PatientID="Nora-1"))
    found = [
        worker.examine(path, worker.Task(32, frozenset({"CR"}), key, Limits()))
        for key in (KEY, KEY, b"another key of 16")
    ]
    assert found[0].patient == found[1].patient != found[2].patient
    assert len(found[0].patient) == 32
    assert "Nora" not in repr(found)
    with pytest.raises(CryptoError, match="KEY_FORMAT"):
        load_patients(tmp_path, ONE, pseudonym_key=b"short")


# ---- labels


def test_labels_from_sub_folders(tmp_path, in_process):
    write(tmp_path, "opacity/1.dcm", seed=1)
    write(tmp_path, "clear/deep/2.dcm", seed=2)
    write(tmp_path, "other/clear/3.dcm", seed=3)
    write(tmp_path, "clear.dcm", seed=4)
    found = load(tmp_path, TWO)
    assert found.labels_N.tolist() == [0, 1]
    assert found.report.left_out == {"DATA_LABEL": 2}


def test_labels_from_a_table(tmp_path, in_process):
    for n in range(1, 6):
        write(tmp_path, f"clear/{n}.dcm", seed=n)
    (tmp_path / "labels.csv").write_bytes(
        b"\xef\xbb\xbfpath,age,label\r\nclear/1.dcm,40,opacity\r\n./clear/2.dcm,41,clear\r\n"
        b'"clear\\3.dcm",42,opacity\r\n\r\nclear/4.dcm,43,fracture\r\nclear/9.dcm,44,clear\r\n'
    )
    found = load(tmp_path, TWO)
    assert found.labels_N.tolist() == [1, 0, 1]
    assert codes(found.report)["clear/4.dcm"] == codes(found.report)["clear/5.dcm"] == "DATA_LABEL"
    assert "labels.csv" not in codes(found.report)
    assert load(tmp_path, ONE).labels_N.tolist() == [0] * 5


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"ZZNORA,clear\n",
        b"path;label\nZZNORA;clear\n",
        b"path,label,label\n",
        b"path,label\nZZNORA\n",
        b"path,label\nZZNORA,\n",
        b"path,label\nZZNORA,clear\n./ZZNORA,opacity\n",
        b"path,label\n\xff\xfe\n",
        b'path,label\n"ZZNORA,clear\n',
        b"path,label\n" + b"ZZNORA" * 40_000 + b",clear\n",
    ],
)
def test_a_damaged_table_is_one_clear_error_without_its_cells(tmp_path, content):
    write(tmp_path, "clear/1.dcm")
    (tmp_path / "labels.csv").write_bytes(content)
    with pytest.raises(DataError) as caught:
        check_folder(tmp_path, TWO)
    assert caught.value.code == "DATA_LABEL"
    assert "labels.csv" in caught.value.line()
    assert "NORA" not in caught.value.line()


def test_a_table_that_is_a_pipe_is_not_waited_for(tmp_path):
    write(tmp_path, "clear/1.dcm")
    os.mkfifo(tmp_path / "labels.csv")
    with pytest.raises(DataError, match="DATA_LABEL"):
        check_folder(tmp_path, TWO)


@given(st.binary(max_size=200))
@settings(deadline=None, max_examples=100)
def test_any_table_is_labels_or_one_error(content):
    for table in (content, b"path,label\n" + content):
        try:
            found = labels.parse(table)
        except DataError as error:
            found = error.code
        assert found == "DATA_LABEL" or all(path and label for path, label in found.items())


# ---- the folder


def test_what_is_not_a_folder(tmp_path):
    file = write(tmp_path, "1.dcm")
    for place in (tmp_path / "absent", file):
        with pytest.raises(DataError, match="DATA_PATH"):
            check_folder(place, ONE)
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    (tmp_path / "empty" / ".hidden").write_text("x")
    with pytest.raises(DataError, match="DATA_EMPTY"):
        check_folder(tmp_path / "empty", ONE)


def test_nothing_usable_says_why(tmp_path, in_process):
    write(tmp_path, "1.dcm", Modality="MR")
    (tmp_path / "notes.txt").write_text("x")
    report = check_folder(tmp_path, ONE)
    assert (report.images, report.patients, len(report.files)) == (0, 0, 2)
    with pytest.raises(DataError) as caught:
        load(tmp_path)
    assert caught.value.code == "DATA_EMPTY"
    assert "2 files: DICOM_MODALITY 1, DICOM_NOT_DICOM 1" in caught.value.line()


def test_unsafe_entries_are_listed_and_never_opened(tmp_path, monkeypatch):
    outside = write(tmp_path, "outside/secret.dcm", seed=9)
    folder = tmp_path / "data"
    write(folder, "1.dcm")
    os.mkfifo(folder / "pipe.dcm")
    (folder / "link-out.dcm").symlink_to(outside)
    (folder / "link-up").symlink_to(tmp_path)
    (folder / "link-loop.dcm").symlink_to("link-loop.dcm")
    (folder / "link-nowhere.dcm").symlink_to("absent")
    (folder / "link-device.dcm").symlink_to("/dev/zero")
    (folder / "link-in.dcm").symlink_to("1.dcm")
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(folder)  # the path of a socket must be short
        listener.bind("socket.dcm")
        began = time.monotonic()
        report = check_folder(folder, ONE, workers=1)
    assert time.monotonic() - began < 20
    found = codes(report)
    assert found.pop("1.dcm") == ""
    assert found.pop("link-in.dcm") == "DATA_DUPLICATE"
    assert len(found) == 7
    assert set(found.values()) == {"DATA_UNSAFE_PATH"}


def test_a_pipe_that_takes_the_place_of_a_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    task = worker.Task(32, frozenset({"CR"}), KEY, Limits())
    assert worker.examine(str(tmp_path / "pipe"), task).code == "DATA_UNSAFE_PATH"
    assert worker.examine(str(tmp_path / "link"), task).code == "DATA_PATH"
    assert worker.examine(str(tmp_path / "absent"), task).code == "DATA_PATH"


def test_odd_names(tmp_path, in_process):
    folder = os.fsencode(tmp_path)
    for name in (b"caf\xc3\xa9.dcm", b"\xff\xfe.dcm", b"two\nlines [red].dcm"):
        with open(folder + b"/" + name, "wb") as file:
            file.write(encode(make(seed=len(name))))
    found = check_folder(tmp_path, ONE)
    assert [f.path for f in found.files] == ["café.dcm", "two\nlines [red].dcm", "\\xff\\xfe.dcm"]
    assert found.images == 3


# ---- workers


def test_a_worker_that_is_killed_loses_no_file(tmp_path):
    paths = [str(write(tmp_path, f"{n}.dcm", seed=n)) for n in range(30)]
    found = {}
    with WorkerPool(32, ("CR",), KEY, Limits(), 2) as workers:
        for index, result in workers.examine(paths):
            found[index] = result
            if len(found) in (1, 10):
                os.kill(workers.pids[0], signal.SIGKILL)
        pids = workers.pids
        assert len(pids) == 2
    assert sorted(found) == list(range(30))
    assert {result.code for result in found.values()} == {""}
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def poison(folder: Path, monkeypatch, ending: str) -> None:
    """Let workers run `ending` on files that start with the word poison, as a decoder with a fault would."""
    program = folder / "poisoned.py"
    program.write_text(
        textwrap.dedent(f"""
            import os, time
            from fedmedgan.client.data import dicom, worker
            read = dicom.read
            def poisoned(data, limits):
                if data.startswith(b"poison"):
                    {ending}
                return read(data, limits)
            dicom.read = poisoned
            worker.main()
        """)
    )
    monkeypatch.setattr(pool, "_PROGRAM", (str(program),))


@pytest.mark.parametrize("ending", ["os.abort()", "os._exit(0)", "os.kill(os.getpid(), 11)"])
def test_a_file_that_crashes_its_decoder_is_the_only_one_lost(tmp_path, monkeypatch, ending):
    poison(tmp_path, monkeypatch, ending)
    folder = tmp_path / "data"
    for n in range(6):
        write(folder, f"{n}.dcm", seed=n)
    for name in ("2x.dcm", "last.dcm"):
        (folder / name).write_bytes(b"poison")
    report = check_folder(folder, ONE, workers=2)
    assert report.left_out == {"DICOM_DECODE": 2}
    assert codes(report)["2x.dcm"] == codes(report)["last.dcm"] == "DICOM_DECODE"
    assert report.images == 6


@pytest.mark.parametrize("name", ["DOE^JANE", "", "A" * 32, "a" * 31])
def test_a_worker_that_names_a_patient_by_anything_but_a_hash_is_not_believed(tmp_path, monkeypatch, name):
    poison(tmp_path, monkeypatch, f"data = data[6:]; worker._pseudonym = lambda *_: {name!r}")
    folder = tmp_path / "data"
    write(folder, "1.dcm", seed=1)
    (folder / "2.dcm").write_bytes(b"poison" + encode(make(seed=2)))
    found = load(folder)
    assert codes(found.report)["1.dcm"] == ""
    assert codes(found.report)["2.dcm"] in ("DICOM_DECODE", "DATA_PATIENT_ID")
    assert len(found.pseudonyms) == found.n_patients == 1


def test_a_file_whose_worker_died_goes_to_an_idle_one(tmp_path, monkeypatch):
    poison(tmp_path, monkeypatch, "time.sleep(0.5); os.abort()")
    paths = [str(write(tmp_path, f"{n}.dcm", seed=n)) for n in range(2)]
    (tmp_path / "poison").write_bytes(b"poison")
    with WorkerPool(32, ("CR",), KEY, Limits(), 2) as workers:
        found = dict(workers.examine([*paths, str(tmp_path / "poison")]))  # hangs where the idle one is forgotten
    assert [found[n].code for n in range(3)] == ["", "", "DICOM_DECODE"]


def test_a_file_that_hangs_is_given_up_and_not_remembered(tmp_path, monkeypatch):
    poison(tmp_path, monkeypatch, "time.sleep(600)")
    folder, cache = tmp_path / "data", tmp_path / "cache"
    write(folder, "1.dcm", seed=1)
    (folder / "2.dcm").write_bytes(b"poison")
    write(folder, "3.dcm", seed=3)
    report = load(folder, limits=Limits(seconds=2), cache=cache).report
    assert codes(report) == {"1.dcm": "", "2.dcm": "DICOM_DECODE", "3.dcm": ""}
    assert report.files[1].reason == pool.TIMED_OUT
    assert not cache.exists()  # slow today is not slow for ever


def big(folder: Path) -> Path:
    ds = make()
    ds.Rows = ds.Columns = 4000
    ds.BitsAllocated = ds.BitsStored = 8
    ds.HighBit, ds.PatientID, ds.SOPInstanceUID = 7, "big", "9.9"
    ds.PixelData = bytes(range(250)) * 64_000
    path = folder / "big.dcm"
    path.write_bytes(encode(ds))
    return path


def test_memory_is_limited_for_each_file(tmp_path):
    write(tmp_path, "1.dcm", seed=1)
    write(tmp_path, "z.dcm", seed=2)
    big(tmp_path)
    assert codes(check_folder(tmp_path, ONE, workers=1)) == {"1.dcm": "", "big.dcm": "", "z.dcm": ""}
    small = check_folder(tmp_path, ONE, limits=Limits(memory_bytes=300 << 20), workers=1)
    assert codes(small) == {"1.dcm": "", "big.dcm": "DICOM_TOO_LARGE", "z.dcm": ""}


def test_a_bomb_does_not_fill_the_worker(tmp_path):
    path = tmp_path / "bomb.dcm"
    path.write_bytes(bomb(500))
    code = textwrap.dedent(f"""
        import resource
        from fedmedgan.client.data import worker
        from fedmedgan.client.data.limits import Limits
        task = worker.Task(32, frozenset(), b"k" * 16, Limits())
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(worker.examine({str(path)!r}, task).code)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """)
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    code, kibibytes = answer.split()
    assert code == "DICOM_TOO_LARGE"
    assert int(kibibytes) < 16 * 1024


def test_workers_that_do_not_start_are_one_error(tmp_path, monkeypatch):
    write(tmp_path, "1.dcm")
    monkeypatch.setattr(pool, "_PROGRAM", ("-c", "raise SystemExit(1)"))
    with pytest.raises(RunError, match="RUN_EXTRA"):
        check_folder(tmp_path, ONE)


def test_a_module_in_the_working_folder_is_not_imported(tmp_path, monkeypatch):
    write(tmp_path, "1.dcm")
    (tmp_path / "numpy.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    assert codes(check_folder(tmp_path, ONE)) == {"1.dcm": "", "numpy.py": "DICOM_NOT_DICOM"}


def test_flipped_bytes_of_compressed_files_lose_only_themselves(tmp_path):
    random = np.random.default_rng(2)
    names = ["MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm", "MR_small_RLE.dcm", "JPEG2000.dcm"]
    for name in names:
        data = (PACKAGED / name).read_bytes()
        for n in range(40):
            broken = bytearray(data)
            broken[random.integers(len(data) // 3, len(data))] ^= 1 << random.integers(8)
            (tmp_path / f"{n}-{name}").write_bytes(broken)
    report = check_folder(tmp_path, Images(size=28, classes=("image",), modalities=("MR", "NM")))
    assert len(report.files) == 160
    assert set(report.left_out) <= set(HINTS)


def test_the_parent_imports_no_decoder():
    code = (
        "import sys, fedmedgan.client.data.patients\n"
        "print(*(m for m in ('torch', 'pydicom', 'gdcm', 'PIL') if m in sys.modules))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == ""


# ---- the cache


@pytest.fixture
def cached(tmp_path, in_process, monkeypatch):
    """A folder, its cache, and a list that grows with every decoding."""
    folder, decodings = tmp_path / "data", []
    for n in range(3):
        write(folder, f"clear/{n}.dcm", seed=n)
    write(folder, "opacity/9.dcm", seed=9)
    collect = patients._collect
    monkeypatch.setattr(patients, "_collect", lambda *given: decodings.append(1) or collect(*given))
    return folder, tmp_path / "home" / "images.safetensors", decodings


def same(a: PatientImages, b: PatientImages) -> bool:
    names = ("images_N1HW", "labels_N", "patient_N")
    arrays = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in names)
    return arrays and (a.report, a.n_patients, a.pseudonyms) == (b.report, b.n_patients, b.pseudonyms)


def test_the_cache_gives_back_what_was_decoded(cached):
    folder, cache, decodings = cached
    first = load(folder, TWO, cache=cache)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o600
    assert stat.S_IMODE(cache.parent.stat().st_mode) == 0o700
    assert [p.name for p in cache.parent.iterdir()] == [cache.name]
    second = load(folder, TWO, cache=cache)
    assert same(first, second)
    assert second.images_N1HW.dtype == np.float16
    assert len(decodings) == 1
    assert b"patient-" not in cache.read_bytes()


def change_content(folder):
    path = folder / "clear" / "0.dcm"
    before = path.stat()
    path.write_bytes(encode(make(seed=7)))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: write(folder, "clear/new.dcm", seed=20),
        lambda folder: (folder / "clear" / "0.dcm").unlink(),
        lambda folder: (folder / "clear" / "0.dcm").rename(folder / "opacity" / "0.dcm"),
        lambda folder: os.utime(folder / "clear" / "0.dcm"),
        lambda folder: (folder / "labels.csv").write_text("path,label\nclear/0.dcm,opacity\n"),
        change_content,
    ],
    ids=["new file", "file removed", "file moved", "time", "labels", "same size and time"],
)
def test_a_changed_folder_is_decoded_again(cached, change):
    folder, cache, decodings = cached
    load(folder, TWO, cache=cache)
    change(folder)
    fresh, found = load(folder, TWO), load(folder, TWO, cache=cache)
    assert len(decodings) == 3
    assert same(fresh, found)


def test_other_rules_limits_or_keys_do_not_use_the_cache(cached):
    folder, cache, decodings = cached
    load(folder, TWO, cache=cache)
    assert load(folder, Images(size=28), cache=cache).images_N1HW.shape[-1] == 28
    load(folder, Images(size=28), cache=cache, limits=Limits(frames_used=1))
    load_patients(folder, Images(size=28), pseudonym_key=KEY[::-1], cache=cache, limits=Limits(frames_used=1))
    assert len(decodings) == 4


def test_a_damaged_cache_is_decoded_again(cached):
    folder, cache, decodings = cached
    first = load(folder, TWO, cache=cache)
    good, random = cache.read_bytes(), np.random.default_rng(0)
    damaged = [b"", b"x", good[:-1], good[: len(good) // 2], good + b"x"]
    for _ in range(60):
        broken = bytearray(good)
        broken[random.integers(len(good))] ^= 1 << random.integers(8)
        damaged.append(bytes(broken))
    for content in damaged:
        cache.write_bytes(content)
        assert same(first, load(folder, TWO, cache=cache))
    assert len(decodings) == 1 + len(damaged)


def test_a_cache_that_cannot_be_written_is_no_error(cached):
    folder, cache, _ = cached
    cache.mkdir(parents=True)
    assert same(load(folder, TWO, cache=cache), load(folder, TWO))
    assert [p.name for p in cache.parent.iterdir()] == [cache.name]
