"""The bad-input catalogue of the security design, its 98 ids in one table: what is wrong -> which error of ours.

TYPED   what a person can type, through the real command line: exit code 2, one line ``error[CODE]:``, no traceback,
        nothing written, nothing lost
MET     bytes and values that a program meets, through the function that meets them: an error of ours, one line
AT_HOME messages and files of a hospital in the middle of a study, through the real hospital and the real server
ALREADY ids whose cases live in another test file, by the names of the tests there
NOT_OURS ids that cannot happen here, and why

Where the design names another code (MANIFEST_*, HE_CONTEXT, ...), the code of this table is the one that counts. Every
file and key carries the marker ZZPHI where a patient's name could stand; it may appear in no error.
"""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import resource
import shutil
import stat
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tenseal
import tenseal.sealapi as sealapi
import test_cipher
import test_dicom
import test_ledger
import torch
from conftest import tiny_study
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from ledgers import ledger_at, ledger_of, terms
from torch import nn

from fedmedgan.cli import main, output
from fedmedgan.client import checkpoint
from fedmedgan.client.cycle import Hospital
from fedmedgan.client.gans import recipe
from fedmedgan.client.training.local_round import LocalTrainer
from fedmedgan.client.training.private_step import refuse_unsafe
from fedmedgan.server.aggregation import RoundSum
from fedmedgan.server.app import KEY_FILE, refuse_secrets
from fedmedgan.shared.agreement import Agreement, Identity, assemble, sign
from fedmedgan.shared.errors import FedMedGanError
from fedmedgan.shared.messages import (
    MAX_HEADER_BYTES,
    Applied,
    Approval,
    Certificate,
    Envelope,
    Roll,
    RoundOpen,
    Update,
    parse,
)
from fedmedgan.shared.privacy.events import TrainingSteps
from fedmedgan.shared.privacy.history import read as read_ledger
from fedmedgan.shared.secure_sum import cipher, epochs, keys, proof
from fedmedgan.shared.secure_sum.keys import HospitalKeys, load_signing_key
from fedmedgan.shared.secure_sum.quantize import PLAIN_MODULUS, SlotPlan
from fedmedgan.shared.study import Study
from fedmedgan.simulations import DEFAULT_STUDY, arms, consortium

MARKER = "ZZPHI"
TAKEN = ""
"""Not bad after all: the input is taken, as the design says."""

EXAMPLE = DEFAULT_STUDY.read_text(encoding="utf-8") + f"\n# {MARKER}^DOE\n"
SITES = EXAMPLE.split("[images]")[0]
FIRST_SITE = 'name = "north"\n'


@dataclass(frozen=True)
class Case:
    """One bad input."""

    id: str
    what: str
    code: str
    """Expected code of ours, or TAKEN."""
    make: Callable[[Path], Any]
    """Builds the input in a folder. Returns, for TYPED, the arguments of the command line, for MET, the action."""

    @property
    def name(self) -> str:
        return f"{self.id} {self.what}"


# ---- TYPED: through the command line


def study(*changes: tuple[str, str], raw: bytes | None = None, command: str = "check") -> Callable[[Path], list[str]]:
    """`study check` of the example with some text replaced, or of other bytes."""

    def make(folder: Path) -> list[str]:
        text = EXAMPLE
        for old, new in changes:
            assert old in text, old
            text = text.replace(old, new, 1)
        (folder / "study.toml").write_bytes(text.encode() if raw is None else raw)
        return ["study", command, "study.toml"]

    return make


def privacy(line: str) -> Callable[[Path], list[str]]:
    """The example with one line of its section [privacy] replaced or added."""
    key = line.split(" ")[0]
    text = re.sub(rf"(?m)^{key} = .*$", line, EXAMPLE) if re.search(rf"(?m)^{key} = ", EXAMPLE) else None
    return study(raw=(text or EXAMPLE.replace("[privacy]", f"[privacy]\n{line}", 1)).encode())


def weight(value: str) -> Callable[[Path], list[str]]:
    return study(("weight = 1", f"weight = {value}"))


def site_name(value: str) -> Callable[[Path], list[str]]:
    return study((FIRST_SITE, f'name = "{value}"\n'))


def two_sites(folder: Path) -> list[str]:
    start, end = EXAMPLE.index('[[sites]]\nname = "west"'), EXAMPLE.index("[images]")
    (folder / "study.toml").write_text(EXAMPLE[:start] + EXAMPLE[end:])
    return ["study", "check", "study.toml"]


def many_sites(folder: Path) -> list[str]:
    more = "".join(f'[[sites]]\nname = "more-{i}"\npatients = 400\n' for i in range(99))
    (folder / "study.toml").write_text(EXAMPLE + more)
    return ["study", "check", "study.toml"]


def one_gibibyte(folder: Path) -> list[str]:
    with (folder / "study.toml").open("wb") as file:
        file.truncate(1 << 30)
    return ["study", "check", "study.toml"]


def a_pipe(folder: Path) -> list[str]:
    os.mkfifo(folder / "study.toml")
    return ["study", "check", "study.toml"]


def same_key_twice(folder: Path) -> list[str]:
    text = EXAMPLE.replace("weight = 1", f'weight = 1\nsigning_key = "{"ab" * 32}"')
    (folder / "study.toml").write_text(text)
    return ["study", "check", "study.toml"]


def example(*arguments: str) -> Callable[[Path], list[str]]:
    """A command with a good study file beside it; {} is its name."""

    def make(folder: Path) -> list[str]:
        (folder / "study.toml").write_text(EXAMPLE)
        return [a.replace("{}", "study.toml") for a in arguments]

    return make


def simulate(*arguments: str) -> Callable[[Path], list[str]]:
    return example("simulate", "{}", "--out", "run", *arguments)


def dicom_folder(*contents: bytes, command: tuple[str, ...] = ("dataset", "check", "data")) -> Callable:
    """A folder of such files."""

    def make(folder: Path) -> list[str]:
        (folder / "data").mkdir()
        for number, content in enumerate(contents):
            (folder / "data" / f"{number}.dcm").write_bytes(content)
        return list(command)

    return make


def marked(**changes) -> bytes:
    """A DICOM file of a patient whose name is the marker."""
    values = {"PatientName": f"{MARKER}^DOE", "PatientID": f"{MARKER}-1", "InstitutionName": f"{MARKER} CLINIC"}
    return test_dicom.encode(test_dicom.make(**(values | changes)))


def a_run_in_use(folder: Path) -> list[str]:
    (folder / "run").mkdir()
    (folder / "run" / "thesis.txt").write_text("precious")
    return simulate()(folder)


def run_folder_is_a_file(folder: Path) -> list[str]:
    (folder / "run").write_text("precious")
    return simulate()(folder)


def kit_file(raw: bytes) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        (folder / "consortium.toml").write_bytes(raw)
        return ["kit", "make", "consortium.toml"]

    return make


def no_passphrase_file(folder: Path) -> list[str]:
    return ["site", "rotate", "--home", ".", "--passphrase-file", "nowhere"]


TYPED = [
    Case("C01", "no such file", "CONFIG_NOT_FOUND", lambda f: ["study", "check", "nothing.toml"]),
    Case("C01", "a folder", "CONFIG_NOT_FOUND", lambda f: ["study", "check", "."]),
    Case("C01", "a pipe", "CONFIG_NOT_FOUND", a_pipe),
    Case("C01", "a device", "CONFIG_NOT_FOUND", lambda f: ["study", "check", "/dev/zero"]),
    Case("C01", "an endless name", "CONFIG_NOT_FOUND", lambda f: ["study", "check", "a" * 5000]),
    Case("C01", "to simulate", "CONFIG_NOT_FOUND", lambda f: ["simulate", "nothing.toml", "--out", "run"]),
    Case("C01", "for a data set", "CONFIG_NOT_FOUND", lambda f: ["dataset", "check", ".", "--study", "nothing"]),
    Case("C02", "empty", "CONFIG_EMPTY", study(raw=b"")),
    Case("C02", "blank", "CONFIG_EMPTY", study(raw=b" \n\t\n")),
    Case("C03", "no value", "CONFIG_SYNTAX", study(("epsilon = 8.0", "epsilon ="))),
    Case("C03", "a NUL byte", "CONFIG_SYNTAX", study(raw=EXAMPLE.encode() + b"\0")),
    Case("C03", "another kind of file", "CONFIG_SYNTAX", study(raw=b'{"name": "demo"}')),
    Case("C04", "a key twice", "CONFIG_SYNTAX", privacy("epsilon = 8.0\nepsilon = 9.0")),
    Case("C04", "a section twice", "CONFIG_SYNTAX", study(("[privacy]", "[privacy]\n[privacy]"))),
    Case("C05", "noise_multipler", "CONFIG_UNKNOWN_KEY", privacy("noise_multipler = 1.0")),
    Case("C05", "a section", "CONFIG_UNKNOWN_KEY", study(("[privacy]", "[privcy]"))),
    Case("C05", "a missing key", "CONFIG_MISSING_KEY", study(("patients = 400\n", "\n"))),
    Case("C06", "epsilon nan", "CONFIG_NOT_FINITE", privacy("epsilon = nan")),
    Case("C06", "clip_norm nan", "CONFIG_NOT_FINITE", privacy("clip_norm = nan")),
    Case("C07", "epsilon 0", "CONFIG_RANGE", privacy("epsilon = 0.0")),
    Case("C07", "epsilon -1", "CONFIG_RANGE", privacy("epsilon = -1.0")),
    Case("C08", "delta 0", "CONFIG_DELTA", privacy("delta = 0.0")),
    Case("C08", "delta 1", "CONFIG_DELTA", privacy("delta = 1.0")),
    Case("C08", "delta 2", "CONFIG_DELTA", privacy("delta = 2.0")),
    Case("C08", "delta 1/n", "CONFIG_DELTA", privacy("delta = 0.0025")),
    Case("C08", "delta nan", "CONFIG_NOT_FINITE", privacy("delta = nan")),
    Case("C09", "nobody in a batch", "CONFIG_RANGE", study(("patients_per_step = 32", "patients_per_step = 0"))),
    Case("C09", "more than all", "CONFIG_RANGE", study(("patients_per_step = 32", "patients_per_step = 341"))),
    Case("C10", "rounds 0", "CONFIG_RANGE", study(("rounds = 10", "rounds = 0"))),
    Case("C10", "rounds -5", "CONFIG_RANGE", study(("rounds = 10", "rounds = -5"))),
    Case("C10", "rounds 1e12", "CONFIG_RANGE", study(("rounds = 10", "rounds = 1_000_000_000_000"))),
    Case("C10", "rounds of 5000 digits", "CONFIG_SYNTAX", study(("rounds = 10", "rounds = " + "9" * 5000))),
    Case("C10", "steps 0", "CONFIG_RANGE", study(("local_steps = 20", "local_steps = 0"))),
    Case("C10", "steps 2.5", "CONFIG_TYPE", study(("local_steps = 20", "local_steps = 2.5"))),
    Case("C10", "--rounds 0", "CONFIG_RANGE", simulate("--rounds", "0")),
    Case("C10", "--rounds 1e24", "CONFIG_RANGE", simulate("--rounds", "1" + "0" * 24)),
    Case("C10", "--rounds abc", "RUN_USAGE", simulate("--rounds", "abc")),
    Case(
        *("C10", "100 million steps", "PRIVACY_RANGE"),
        study(("rounds = 10", "rounds = 10_000"), ("local_steps = 20", "local_steps = 10_000")),
    ),
    Case("C11", "ceiling inf", "CONFIG_NOT_FINITE", privacy("epsilon = inf")),
    Case("C11", "ceiling true", "CONFIG_TYPE", privacy("epsilon = true")),
    Case("C11", 'ceiling "4"', "CONFIG_TYPE", privacy('epsilon = "4"')),
    Case("C11", "ceiling a date", "CONFIG_TYPE", privacy("epsilon = 1979-05-27")),
    Case("C11", "a section that is a number", "CONFIG_TYPE", study(raw=f"privacy = 3\n{SITES}".encode())),
    Case("C12", "weight -1", "CONFIG_RANGE", weight("-1")),
    Case("C12", "weight 0", "CONFIG_RANGE", weight("0")),
    Case("C12", "weight nan", "CONFIG_NOT_FINITE", weight("nan")),
    Case("C12", "weight 1e12", "CONFIG_RANGE", weight("1_000_000_000_000")),
    Case("C12", "weight 1.5", "CONFIG_TYPE", weight("1.5")),
    Case("C13", "two sites", "STUDY_ROSTER", two_sites),
    Case("C13", "101 sites and more", "STUDY_ROSTER", many_sites),
    Case("C13", "a name twice", "STUDY_ROSTER", site_name("south")),
    Case("C13", "a slash", "STUDY_ROSTER", site_name("a/b")),
    Case("C13", "dots", "STUDY_ROSTER", site_name("../x")),
    Case("C13", "a newline", "STUDY_ROSTER", site_name("a\\n")),
    Case("C13", "a NUL", "STUDY_ROSTER", site_name("a\\u0000")),
    Case("C13", "nothing", "STUDY_ROSTER", site_name("")),
    Case("C13", "capitals", "STUDY_ROSTER", site_name("North")),
    Case("C13", "look-alike letters", "STUDY_ROSTER", site_name("nоrth")),
    Case("C13", "--data of a stranger", "STUDY_ROSTER", simulate("--data", "nobody=.")),
    Case("C13", "--drop of a stranger", "STUDY_ROSTER", simulate("--drop", "nobody@1")),
    Case("C15", "settings of the encryption", "CONFIG_UNKNOWN_KEY", study(("[secure_sum]", "[secure_sum]\nn = 1024"))),
    Case("C17", "1 GiB", "CONFIG_TOO_LARGE", one_gibibyte),
    Case("C17", "nested 10k", "CONFIG_SYNTAX", study(raw=b"a = " + b"[" * 10_000)),
    Case("C17", "tables nested 10k", "CONFIG_SYNTAX", study(raw=b"a = " + b"{b = " * 10_000)),
    Case("C18", "not UTF-8", "CONFIG_ENCODING", study(raw=EXAMPLE.encode() + b"# \xff\xfe")),
    Case("C18", "UTF-16", "CONFIG_ENCODING", study(raw=EXAMPLE.encode("utf-16"))),
    Case("C18", "a byte order mark", TAKEN, study(raw=b"\xef\xbb\xbf" + EXAMPLE.encode(), command="show")),
    Case("C18", "CRLF", TAKEN, study(raw=EXAMPLE.replace("\n", "\r\n").encode(), command="show")),
    Case("K08", "two hospitals, one key", "STUDY_ROSTER", same_key_twice),
    Case("D01", "no such folder", "DATA_PATH", lambda f: ["dataset", "check", "nowhere"]),
    Case("D01", "a file", "DATA_PATH", example("dataset", "check", "{}")),
    Case("D01", "to simulate with", "DATA_PATH", simulate("--data", "north=nowhere")),
    Case("D01", "to test with", "DATA_PATH", simulate("--test", "nowhere")),
    Case("D02", "an empty folder", "DATA_EMPTY", dicom_folder()),
    Case("D02", "no usable image", "DATA_EMPTY", dicom_folder(marked(Modality="OT"), MARKER.encode())),
    Case("D05", "cut", "DATA_EMPTY", dicom_folder(marked()[:400])),
    Case("D29", "burned in", "DATA_EMPTY", dicom_folder(marked(BurnedInAnnotation="YES"))),
    # what the design does not list, and a person types all the same
    Case("C05", "a command", "RUN_USAGE", lambda f: ["nosuch"]),
    Case("C05", "an option", "RUN_USAGE", simulate("--epsilon", "3")),
    Case("C05", "no argument", "RUN_USAGE", lambda f: ["study", "check"]),
    Case("C05", "another format", "RUN_USAGE", lambda f: ["--format", "xml", "study", "check", "x"]),
    Case("C05", "--insecure-seed -1", "RUN_USAGE", simulate("--insecure-seed", "-1")),
    Case("C05", "--device", "RUN_DEVICE", simulate("--device", "abacus")),
    Case("C05", "--data without a site", "CONFIG_TYPE", simulate("--data", "north")),
    Case("C05", "--drop without a round", "CONFIG_TYPE", simulate("--drop", "north@")),
    Case("C05", "--drop in no round", "CONFIG_TYPE", simulate("--drop", "north@one")),
    Case("C01", "no kit file", "KIT_PATH", lambda f: ["kit", "make", "nothing.toml"]),
    Case("C02", "an empty kit file", "KIT_CONFIG", kit_file(b"")),
    Case("C03", "a kit file that is a study", "KIT_CONFIG", example("kit", "make", "{}")),
    Case("C17", "a nested kit file", "KIT_CONFIG", kit_file(b"a = " + b"[" * 10_000)),
    Case("C18", "a kit file not UTF-8", "KIT_CONFIG", kit_file(b"\xff\xfe")),
    Case("C01", "no kit", "KIT_PATH", lambda f: ["kit", "verify", "nowhere"]),
    Case("C01", "no kit to begin with", "KIT_PATH", example("server", "init", "--kit", "{}", "--folder", "f")),
    Case("C01", "no kit to start with", "KIT_PATH", lambda f: ["site", "start", "--home", "."]),
    Case("C01", "no kit for a coordinator", "KIT_PATH", lambda f: ["server", "start", "--folder", "nowhere"]),
    Case("C01", "no study at a coordinator", "RUN_PATH", lambda f: ["server", "status", "--folder", "."]),
    Case("C01", "no study to leave", "CONFIG_NOT_FOUND", lambda f: ["site", "leave", "--home", ".", "--yes"]),
    Case("C01", "no study to sign", "CONFIG_NOT_FOUND", lambda f: ["study", "sign", "no.json", "--home", ".", "--yes"]),
    Case("C03", "no agreement to sign", "CONFIG_SYNTAX", example("study", "sign", "{}", "--home", ".", "--yes")),
    Case("C03", "no agreement to collect for", "CONFIG_SYNTAX", example("study", "collect", "{}")),
    Case("C16", "no identity", "STUDY_KEYS", example("study", "assemble", "{}", "{}")),
    Case("K01", "no key to rotate", "KEY_MISSING", lambda f: ["site", "rotate", "--home", "."]),
    Case("K03", "no file with a passphrase", "KEY_PASSPHRASE", no_passphrase_file),
    Case("C01", "a study over another file", "RUN_PATH", example("study", "new", "{}")),
    Case("C01", "a study in no folder", "RUN_PATH", lambda f: ["study", "new", "no/study.toml"]),
    Case("C01", "a run over another", "RUN_PATH", a_run_in_use),
    Case("C01", "a run in the place of a file", "RUN_PATH", run_folder_is_a_file),
]


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    """A folder to work in, with something in it that nobody may touch."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    yield tmp_path
    output.use_format("human")


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file with its mode and its bytes (of huge ones the size)."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        regular = stat.S_ISREG(status.st_mode)
        data = path.read_bytes() if regular and status.st_size < 1 << 20 else str(status.st_size if regular else 0)
        found[str(path.relative_to(folder))] = (status.st_mode, data)
    return found


@pytest.mark.parametrize("case", TYPED, ids=lambda case: case.name)
def test_typed(case, sandbox, monkeypatch, capfd):
    arguments = case.make(sandbox)
    before = contents(sandbox)
    monkeypatch.setattr(sys, "argv", ["fedmedgan", *arguments])
    monkeypatch.setattr(os, "environ", dict(os.environ))  # a command may name its passphrase there
    with pytest.raises(SystemExit) as ended:
        main.run()
    shown = capfd.readouterr()
    assert MARKER not in shown.out + shown.err
    assert "Traceback" not in shown.out + shown.err
    assert contents(sandbox) == before, "something was written or lost"
    if case.code == TAKEN:
        assert ended.value.code in (0, None), shown.err
        return
    assert ended.value.code == 2
    errors = [line for line in shown.err.splitlines() if line.startswith("error[")]
    assert len(errors) == 1, shown.err
    assert errors[0].startswith(f"error[{case.code}]: "), errors[0]
    assert shown.err.endswith(errors[0] + "\n")
    progress = shown.err.splitlines()[:-1]
    assert len(progress) <= 1 and all(line.startswith("study ") for line in progress)


def test_every_bad_dicom_file_through_the_command_line(sandbox, monkeypatch, capfd):
    """D03 to D25, all in one folder of one patient: each file is listed with its code, and one line ends it."""
    (sandbox / "data").mkdir()
    files = {f"{n:02}.dcm": case for n, case in enumerate(test_dicom.CATALOGUE.values())}
    for name, (build, _) in files.items():
        (sandbox / "data" / name).write_bytes(build().replace(b"Nobody^Nora", b"ZZPHI^Nora "))
    monkeypatch.setattr(sys, "argv", ["fedmedgan", "dataset", "check", "data"])
    with pytest.raises(SystemExit) as ended:
        main.run()
    shown = capfd.readouterr()
    assert ended.value.code == 2
    assert [line.split(":")[0] for line in shown.err.splitlines()] == ["error[DATA_EMPTY]"]
    assert MARKER not in shown.out + shown.err
    listed = dict(re.findall(r"(?m)^(\d\d\.dcm): .*\(([A-Z_]+)\)$", shown.out))
    assert listed == {name: code for name, (_, code) in files.items()}


# ---- MET: through the function that meets such bytes

STUDY = tiny_study(3)
SLOTS = test_cipher.any_slots(cipher.RING_DEGREE)
HOSPITAL = test_cipher.HOSPITAL
BINDING = {**test_cipher.BINDING, "kind": "update", "n_blobs": 1}
BLOB = HOSPITAL.encrypt(SLOTS)[0]
FRAME = cipher.frame([BLOB], kind="update", **test_cipher.BINDING)

PEOPLE = {site.name: keys.generate_identity() for site in STUDY.sites}
COORDINATOR = keys.generate_identity()
EPOCH = keys.new_epoch(1, tuple(PEOPLE))
WRAP = {"study_hash": STUDY.hash, "sender": "site-0", "recipient": "site-1"}
BLOB_FOR_SITE_1 = epochs.wrap(EPOCH, PEOPLE["site-1"].wrapping_public, **WRAP)


def call(function: Callable, *arguments: Any, **options: Any) -> Callable[[Path], Callable]:
    """An action that needs no file."""
    return lambda folder: partial(function, *arguments, **options)


def identity(name: str) -> Identity:
    own = PEOPLE[name]
    public = {f"{use}_key": getattr(own, f"{use}_public") for use in ("signing", "exchange", "wrapping")}
    return Identity(role="hospital", name=name, **public).signed(own.signing)


def agreed() -> Agreement:
    """The study with everybody's keys, and no signature under it."""
    coordinator = Identity(role="coordinator", name="coordinator", signing_key=COORDINATOR.signing_public)
    return Agreement(assemble(STUDY, [*map(identity, PEOPLE), coordinator.signed(COORDINATOR.signing)]))


AGREED = agreed()
SIGNED = {name: sign(AGREED.study, own.signing) for name, own in PEOPLE.items()}


def start_with(*signed: tuple[str, str]) -> Callable[[Path], Callable]:
    """A party starts with these signatures under the study."""

    def make(folder: Path) -> Callable:
        values = json.loads(AGREED.to_json()) | {"signatures": dict(signed)}
        (folder / "study.json").write_text(json.dumps(values))
        return lambda: Agreement.load(folder / "study.json").require_all()

    return make


def agreement_file(data: bytes) -> Callable[[Path], Callable]:
    def make(folder: Path) -> Callable:
        (folder / "study.json").write_bytes(data)
        return partial(Agreement.load, folder / "study.json")

    return make


# keys


def key_folder(
    spoil: Callable[[Path], object], *, sealed: bytes | None = None, given: bytes | None = None
) -> Callable[[Path], Callable]:
    """A hospital's keys, one file spoilt."""

    def make(folder: Path) -> Callable:
        PEOPLE["site-0"].save(folder / "keys", sealed)
        spoil(folder / "keys" / "identity.key")
        return partial(HospitalKeys.load, folder / "keys", given)

    return make


def pem(private: Any) -> bytes:
    return private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def content(data: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data(path.read_bytes()))


def public_pem(_: bytes) -> bytes:
    public = PEOPLE["site-0"].signing.public_key()
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


def unwrapped(blob: bytes, hospital: str = "site-1", **changes: Any) -> Callable[[Path], Callable]:
    """A wrapped key arrives at a hospital."""
    about = {"number": 1, "key_id": EPOCH.key_id, "members": EPOCH.members, **WRAP} | changes
    return call(epochs.unwrap, PEOPLE[hospital], blob, **about)


# ciphertexts


def added(blob: bytes) -> Callable[[Path], Callable]:
    """The server adds a ciphertext."""
    return call(cipher.AddOnly(1).add, [blob])


def unframed(data: bytes, **changes: Any) -> Callable[[Path], Callable]:
    return call(cipher.unframe, data, **(BINDING | changes))


def context(**kept: bool) -> bytes:
    """A TenSEAL context of our parameters with the keys that are kept."""
    made = tenseal.context(
        tenseal.SCHEME_TYPE.BFV, cipher.RING_DEGREE, plain_modulus=PLAIN_MODULUS, coeff_mod_bit_sizes=[60, 20]
    )
    names = ("save_public_key", "save_secret_key", "save_galois_keys", "save_relin_keys")
    return made.serialize(**(dict.fromkeys(names, False) | kept))


def server_beside_keys(folder: Path) -> Callable:
    PEOPLE["site-0"].save(folder / "keys")
    return partial(refuse_secrets, folder)


MAC = bytes(range(32))


def opened_sum(spoil: Callable[[np.ndarray], np.ndarray] = lambda total: total, **changes: Any) -> Callable:
    """Three honest hospitals' sum, spoilt, and checked."""
    parts = [proof.seal(SLOTS[:50], n_sites=3, site_index=i, weight=1, mac_key=MAC) for i in range(3)]
    total = spoil(sum(parts) % PLAIN_MODULUS)
    return call(proof.open_sum, total, **({"n_sites": 3, "weights": {0: 1, 1: 1, 2: 1}, "mac_key": MAC} | changes))


def of_another_key() -> np.ndarray:
    """What decrypting under another key gives: no error, other numbers."""
    sealed = proof.seal(SLOTS[:50], n_sites=3, site_index=0, weight=1, mac_key=MAC)
    return cipher.HospitalCipher(cipher.new_secret()).decrypt(HOSPITAL.encrypt(sealed), sealed.size)


PLAN = SlotPlan(n_values=100, bits=8, value_range=0.05, total_weight=3)
ROUNDING = np.random.default_rng(0)


def quantized(value: float) -> Callable[[Path], Callable]:
    update = np.full(100, 0.01, np.float32)
    update[7] = value
    return call(PLAN.quantize, update, ROUNDING)


# messages


def applied(**changes: Any) -> Applied:
    return Applied(**({"study": AGREED.study.hash, "hospital": "site-0", "round": 1, "model_hash": "a" * 64} | changes))


MESSAGE = Envelope.seal(applied(), PEOPLE["site-0"].signing)


def received(message: Envelope, **changes: Any) -> Callable[[Path], Callable]:
    return call(message.model_copy(update=changes).open, Applied, AGREED.study)


def from_the_wire(header: bytes = MESSAGE.header, payload: bytes = b"", cap: int = 100) -> Callable[[Path], Callable]:
    record = MESSAGE.model_copy(update={"header": header, "payload": payload}).to_record()
    return call(Envelope.from_record, record, cap)


def an_update(**changes: Any) -> dict[str, Any]:
    fields = {"round": 1, "attempt": 1, "cohort": tuple(PEOPLE), "epoch": 1, "key_id": EPOCH.key_id, "weight": 1}
    fields |= {"study": AGREED.study.hash, "hospital": "site-0", "model_hash": "a" * 64, "ledger_seq": 1}
    fields |= {"ledger_head": "b" * 64, "generator_loss": 0.5, "payload_bytes": 3, "payload_sha256": "c" * 64}
    return fields | changes


# ledgers


def edited_ledger(edit: Callable[[list[bytes]], list[bytes]], owner: str = "clinic-a") -> Callable[[Path], Callable]:
    """A ledger of thirty records, edited, and opened by its hospital."""

    def make(folder: Path) -> Callable:
        path = folder / "ledger.jsonl"
        lines = test_ledger.fill(path, 30).splitlines(keepends=True)
        path.write_bytes(b"".join(edit(lines)))
        return lambda: ledger_at(path, owner).close_file()

    return make


def in_record(old: bytes, new: bytes, number: int = -1) -> Callable[[list[bytes]], list[bytes]]:
    """One record says something else, as text."""

    def edit(lines: list[bytes]) -> list[bytes]:
        assert old in lines[number]
        lines[number] = lines[number].replace(old, new, 1)
        return lines

    return edit


def torn_tail(folder: Path) -> Callable:
    path = folder / "ledger.jsonl"
    raw = test_ledger.fill(path, 8)
    path.write_bytes(raw + b'{"body":{"hos')
    return partial(read_ledger, path)


def locked(folder: Path) -> Callable:
    path = folder / "ledger.jsonl"
    test_ledger.fill(path, 8)
    other = ledger_at(path)  # as another process would: locks are of the open file

    def act() -> None:
        try:
            ledger_at(path)
        finally:
            other.close_file()

    return act


def full_disk(folder: Path) -> Callable:
    path = folder / "ledger.jsonl"
    test_ledger.fill(path, 8)

    def act() -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        with ledger_at(path) as ledger:
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 50, hard))
            try:
                ledger.reserve(test_ledger.STUDY, 9, [test_ledger.EVENT])
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return act


def input_output_error(folder: Path) -> Callable:
    """The disk's own failures cannot be made on demand, so the system call is made to fail."""
    path = folder / "ledger.jsonl"
    test_ledger.fill(path, 8)

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    def act() -> None:
        with ledger_at(path) as ledger, pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "write", fail)
            ledger.reserve(test_ledger.STUDY, 9, [test_ledger.EVENT])

    return act


def no_folder(folder: Path) -> Callable:
    return partial(ledger_at, folder / "absent" / "ledger.jsonl")


# checkpoints


NETWORKS = recipe.load(STUDY).networks()
WEIGHTS = checkpoint.network_arrays(*NETWORKS)


def model_file(spoil: Callable[[bytes], bytes] = bytes, arrays: dict | None = None) -> Callable[[Path], Callable]:
    """A checkpoint, spoilt, read and loaded."""

    def make(folder: Path) -> Callable:
        path = folder / "model.safetensors"
        checkpoint.write(path, WEIGHTS if arrays is None else arrays, round=1, study=STUDY.hash)
        path.write_bytes(spoil(path.read_bytes()))
        return lambda: checkpoint.load_networks(checkpoint.read(path)[0], *NETWORKS)

    return make


def changed_weights(**changes: Any) -> dict[str, np.ndarray]:
    """The weights, the first array changed; None takes it away."""
    first = sorted(WEIGHTS)[0]
    return {n: a for n, a in (WEIGHTS | {first: changes["first"]}).items() if a is not None}


FIRST = WEIGHTS[sorted(WEIGHTS)[0]]


class _Touch:
    """A pickle that writes a file when somebody loads it."""

    def __reduce__(self) -> tuple:
        return (os.mkdir, ("pwned",))


def optimizer_file(arrays: dict[str, np.ndarray]) -> Callable[[Path], Callable]:
    adam = torch.optim.Adam(NETWORKS[0].parameters())
    return call(checkpoint.load_optimizers, arrays, generator=adam)


def header_only(header: dict) -> Callable[[bytes], bytes]:
    raw = json.dumps(header).encode()
    return lambda _: struct.pack("<Q", len(raw)) + raw


HUGE = {"a": {"dtype": "F32", "shape": [4 * 10**12], "data_offsets": [0, 16 * 10**12]}}

MET = [
    Case("C06", "sigma nan", "PRIVACY_RANGE", call(TrainingSteps, float("nan"), 0.1, 5)),
    Case("C07", "sigma 0", "PRIVACY_RANGE", call(TrainingSteps, 0.0, 0.1, 5)),
    Case("C07", "sigma -1", "PRIVACY_RANGE", call(TrainingSteps, -1.0, 0.1, 5)),
    Case("C09", "rate 0", "PRIVACY_RANGE", call(TrainingSteps, 1.0, 0.0, 5)),
    Case("C09", "rate above 1", "PRIVACY_RANGE", call(TrainingSteps, 1.0, 1.1, 5)),
    Case("C10", "-5 steps", "PRIVACY_RANGE", call(TrainingSteps, 1.0, 0.1, -5)),
    Case("C14", "overflow", "STUDY_OVERFLOW", call(SlotPlan, 100, 32, 0.05, 100_000)),
    Case("C16", "nobody signed", "STUDY_SIGNATURE", start_with()),
    Case("C16", "one is missing", "STUDY_SIGNATURE", start_with(*list(SIGNED.items())[:2])),
    Case("C16", "another's signature", "STUDY_SIGNATURE", start_with(("site-0", SIGNED["site-1"]))),
    Case("C16", "of another study", "STUDY_SIGNATURE", start_with(("site-0", sign(STUDY, PEOPLE["site-0"].signing)))),
    Case("C16", "of a stranger", "STUDY_SIGNATURE", start_with(("stranger", SIGNED["site-0"]))),
    Case("C16", "no hex", "STUDY_SIGNATURE", start_with(("site-0", "xyz"))),
    Case("C16", "all signed", TAKEN, start_with(*SIGNED.items())),
    Case("C16", "a digit changed", "STUDY_HASH", agreement_file(AGREED.to_json().replace(b"20.0", b"21.0"))),
    Case("C03", "agreement no JSON", "CONFIG_SYNTAX", agreement_file(b"{")),
    Case("C03", "agreement a list", "CONFIG_SYNTAX", agreement_file(b"[]")),
    Case("C05", "agreement of nothing", "CONFIG_MISSING_KEY", agreement_file(b'{"study": {}}')),
    Case("C17", "agreement nested", "CONFIG_SYNTAX", agreement_file(b'{"study":' + b"[" * 100_000)),
    Case("C17", "agreement of 2 MiB", "CONFIG_TOO_LARGE", agreement_file(bytes(2 << 20))),
    Case("C01", "no agreement", "CONFIG_NOT_FOUND", lambda f: partial(Agreement.load, f / "study.json")),
    # keys
    Case("K01", "missing", "KEY_MISSING", key_folder(Path.unlink)),
    Case("K02", "mode 0644", "KEY_PERMISSIONS", key_folder(lambda path: path.chmod(0o644))),
    Case("K02", "mode 0620", "KEY_PERMISSIONS", key_folder(lambda path: path.chmod(0o620))),
    Case("K03", "wrong passphrase", "KEY_PASSPHRASE", key_folder(bool, sealed=b"right", given=b"wrong")),
    Case("K03", "no passphrase", "KEY_PASSPHRASE", key_folder(bool, sealed=b"right")),
    Case("K04", "a public key", "KEY_FORMAT", key_folder(content(public_pem))),
    Case(*("K05", "RSA", "KEY_FORMAT"), key_folder(content(lambda _: pem(rsa.generate_private_key(65537, 2048))))),
    Case("K05", "ECDSA", "KEY_FORMAT", key_folder(content(lambda _: pem(ec.generate_private_key(ec.SECP256R1()))))),
    Case("K06", "cut", "KEY_FORMAT", key_folder(content(lambda data: data[:-40]))),
    Case("K06", "a cut sealed one", "KEY_PASSPHRASE", key_folder(content(lambda d: d[:-4]), sealed=b"x", given=b"x")),
    Case("K06", "empty", "KEY_FORMAT", key_folder(content(lambda data: b""))),
    Case("K06", "one digit changed", "KEY_FORMAT", key_folder(content(lambda data: flip(data, len(data) // 2)))),
    Case("K07", "not in the roster", "MSG_SENDER", received(Envelope.seal(applied(hospital="x"), COORDINATOR.signing))),
    Case("K09", "for another hospital", "KEY_UNWRAP", unwrapped(BLOB_FOR_SITE_1, "site-2")),
    Case("K09", "renamed to us", "KEY_UNWRAP", unwrapped(BLOB_FOR_SITE_1, "site-2", recipient="site-2")),
    Case("K10", "of another epoch", "KEY_UNWRAP", unwrapped(BLOB_FOR_SITE_1, number=2)),
    Case("K10", "of another key", "KEY_UNWRAP", unwrapped(BLOB_FOR_SITE_1, key_id="0" * 32)),
    Case("K10", "of another study", "KEY_UNWRAP", unwrapped(BLOB_FOR_SITE_1, study_hash="0" * 64)),
    Case("K11", "a bit flipped", "KEY_UNWRAP", unwrapped(flip(BLOB_FOR_SITE_1, 2000))),
    Case("K12", "10 bytes", "KEY_UNWRAP", unwrapped(bytes(10))),
    Case("K12", "nothing", "KEY_UNWRAP", unwrapped(b"")),
    Case("K12", "1 MiB", "KEY_UNWRAP", unwrapped(bytes(1 << 20))),
    # ciphertexts
    Case("H01", "empty context", "HE_PARAMS_MISMATCH", call(cipher.refuse_keys, b"")),
    Case("H01", "garbage", "HE_PARAMS_MISMATCH", call(cipher.refuse_keys, os.urandom(90))),
    Case("H02", "secret key", "HE_SECRET_AT_SERVER", call(cipher.refuse_keys, test_cipher.SECRET)),
    Case("H02", "with secret", "HE_SECRET_AT_SERVER", call(cipher.refuse_keys, context(save_secret_key=True))),
    Case("H02", "keys in the server's folder", "HE_SECRET_AT_SERVER", server_beside_keys),
    Case("H03", "public context", "KEY_FORMAT", call(cipher.HospitalCipher, context(save_public_key=True))),
    Case("H04", "no key at all", "KEY_FORMAT", call(cipher.HospitalCipher, b"")),
    Case("H04", "no epoch yet", "KEY_MISSING", lambda f: lambda: PEOPLE["site-0"].he_secret),
    Case("H05", "other N", "HE_PARAMS_MISMATCH", added(test_cipher.bad_blobs()["other degree"])),
    Case("H05", "other t", "HE_PARAMS_MISMATCH", added(test_cipher.bad_blobs()["other plain modulus"])),
    Case("H05", "other q", "HE_PARAMS_MISMATCH", added(test_cipher.bad_blobs()["other modulus"])),
    Case("H06", "empty", "HE_CT_EMPTY", unframed(b"")),
    Case("H07", "cut", "HE_CT_SIZE", unframed(FRAME[:-1])),
    Case("H07", "cut to half", "HE_CT_SIZE", unframed(FRAME[: len(FRAME) // 2])),
    Case("H08", "bit flipped", "HE_CT_HASH", unframed(flip(FRAME, 9000))),
    Case("H09", "random", "HE_CT_HASH", unframed(os.urandom(len(FRAME)))),
    Case("H10", "another key", "ROUND_REJECTED", opened_sum(lambda _: of_another_key(), weights={0: 1})),
    Case("H11", "CKKS", "HE_PARAMS_MISMATCH", added(test_cipher.foreign(sealapi.SCHEME_TYPE.CKKS, 4096, [60, 20]))),
    Case("H13", "two for one", "HE_SHAPE", unframed(cipher.frame([BLOB] * 2, kind="update", **test_cipher.BINDING))),
    Case("H13", "one more to add", "HE_SHAPE", call(cipher.AddOnly(1).add, [BLOB, BLOB])),
    Case("H14", "t", "HE_RANGE", call(HOSPITAL.encrypt, np.array([PLAIN_MODULUS]))),
    Case("H14", "below 0", "HE_RANGE", call(HOSPITAL.encrypt, np.array([-1]))),
    Case("H15", "floats", "HE_RANGE", call(HOSPITAL.encrypt, np.array([1.7]))),
    Case("H16", "nan", "HE_NOT_FINITE", quantized(float("nan"))),
    Case("H16", "inf", "HE_NOT_FINITE", quantized(float("-inf"))),
    Case("H17", "frame of another round", "HE_CT_STUDY", unframed(FRAME, round=4)),
    Case("H17", "frame of another attempt", "HE_CT_STUDY", unframed(FRAME, attempt=2)),
    Case("H17", "frame of another key", "HE_CT_STUDY", unframed(FRAME, key_id="00" * 16)),
    Case("H18", "zeros", "MSG_SIGNATURE", received(MESSAGE, signature="0" * 128)),
    Case("H18", "none", "MSG_SIGNATURE", received(MESSAGE, signature="")),
    Case("H18", "by another key", "MSG_SIGNATURE", received(Envelope.seal(applied(), COORDINATOR.signing))),
    Case(
        "H18", "edited", "MSG_SIGNATURE", received(MESSAGE, header=MESSAGE.header.replace(b'"round":1', b'"round":2'))
    ),
    Case("H18", "a key twice", "MSG_FORMAT", received(MESSAGE, header=MESSAGE.header.replace(b"{", b'{"round":9,'))),
    Case("H18", "another kind", "MSG_FORMAT", received(MESSAGE, kind="Leave")),
    Case("H18", "another study", "MSG_STUDY", received(Envelope.seal(applied(study="0" * 64), COORDINATOR.signing))),
    Case("H19", "header over cap", "MSG_TOO_LARGE", from_the_wire(header=bytes(MAX_HEADER_BYTES + 1))),
    Case("H19", "payload over cap", "MSG_TOO_LARGE", from_the_wire(payload=bytes(101))),
    Case("H19", "a payload that was not announced", "MSG_FORMAT", received(MESSAGE, payload=b"abc")),
    Case("H19", "a stored length that lies", "MSG_FORMAT", call(Envelope.from_bytes, b"\xff" * 8 + b"abc")),
    Case(
        "H19",
        "a loss of 1e308",
        "MSG_FORMAT",
        call(parse, json.dumps(an_update(generator_loss=1e308)).encode(), Update),
    ),
    Case("H19", "nested", "MSG_FORMAT", call(parse, b"[" * 100_000, Update)),
    Case("H20", "one slot moved", "ROUND_REJECTED", opened_sum(lambda total: np.roll(total, 1))),
    Case(
        "H20", "one value changed", "ROUND_REJECTED", opened_sum(lambda total: total + np.eye(1, total.size, 3, int)[0])
    ),
    Case("H20", "one left out", "ROUND_REJECTED", opened_sum(weights={0: 1, 1: 1})),
    Case("H20", "counted twice", "ROUND_REJECTED", opened_sum(lambda total: total * 2 % PLAIN_MODULUS)),
    Case("H20", "zeros", "ROUND_REJECTED", opened_sum(np.zeros_like)),
    Case("H20", "another round's MAC", "ROUND_REJECTED", opened_sum(mac_key=bytes(32))),
    Case("H20", "above the bound", "ROUND_REJECTED", call(PLAN.unpack, np.full(PLAN.n_slots, PLAIN_MODULUS - 1), 3)),
    # ledgers
    Case("L04", "a bit", "LEDGER_CORRUPT", edited_ledger(in_record(b'"round":1', b'"round":7', 6))),
    Case("L05", "one dropped", "LEDGER_CORRUPT", edited_ledger(lambda lines: lines[:8] + lines[9:])),
    Case(
        "L05",
        "two swapped",
        "LEDGER_CORRUPT",
        edited_ledger(lambda ls: [*ls[:5], ls[6], ls[5], *ls[7:]]),
    ),
    Case("L05", "one twice", "LEDGER_CORRUPT", edited_ledger(lambda lines: [*lines, lines[-1]])),
    Case("L06", "a torn tail", TAKEN, torn_tail),
    Case("L07", "another hospital's", "LEDGER_OWNER", edited_ledger(list, owner="clinic-b")),
    Case("L08", "NaN", "LEDGER_CORRUPT", edited_ledger(in_record(b'"round":99', b'"round":NaN'))),
    Case("L08", "1e999", "LEDGER_CORRUPT", edited_ledger(in_record(b'"round":99', b'"round":1e999'))),
    Case("L08", "a key twice", "LEDGER_CORRUPT", edited_ledger(in_record(b'"v":2', b'"v":2,"v":2'))),
    Case("L08", "no ledger at all", "LEDGER_CORRUPT", edited_ledger(lambda lines: [MARKER.encode() * 99])),
    Case("L09", "two at once", "LEDGER_LOCKED", locked),
    Case("L10", "disk full", "LEDGER_WRITE", full_disk),
    Case("L10", "input/output error", "LEDGER_WRITE", input_output_error),
    Case("L10", "no folder", "LEDGER_WRITE", no_folder),
    # checkpoints
    Case("M01", "cut", "MODEL_HASH", model_file(lambda data: data[:-1])),
    Case("M02", "empty", "MODEL_HASH", model_file(lambda data: b"")),
    Case("M03", "pickle", "MODEL_HASH", model_file(lambda data: pickle.dumps(_Touch()))),
    Case("M04", "a byte of a tensor", "MODEL_HASH", model_file(lambda data: flip(data, len(data) - 9))),
    Case(
        "M04", "the round in its notes", "MODEL_HASH", model_file(lambda d: d.replace(b'round\\": 1', b'round\\": 7'))
    ),
    Case("M05", "NaN", "MODEL_NOT_FINITE", model_file(arrays=changed_weights(first=FIRST * np.float32("nan")))),
    Case("M06", "one missing", "MODEL_MISMATCH", model_file(arrays=changed_weights(first=None))),
    Case("M06", "one more", "MODEL_MISMATCH", model_file(arrays=WEIGHTS | {"more": FIRST})),
    Case("M06", "another shape", "MODEL_MISMATCH", model_file(arrays=changed_weights(first=FIRST[:1]))),
    Case("M06", "a header of 4e12 values", "MODEL_HASH", model_file(header_only(HUGE))),
    Case("M06", "a nested header", "MODEL_HASH", model_file(lambda _: struct.pack("<Q", 100_000) + b"[" * 100_000)),
    Case("M07", "float64", "MODEL_MISMATCH", model_file(arrays=changed_weights(first=FIRST.astype(np.float64)))),
    Case("M08", "a model as optimiser states", "MODEL_MISMATCH", optimizer_file(WEIGHTS)),
    Case("M08", "states of other networks", "MODEL_MISMATCH", optimizer_file({"generator.0.exp_avg": np.ones(3)})),
    Case(
        "M08", "BatchNorm", "PRIVACY_MODEL", call(refuse_unsafe, nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)))
    ),
]


@pytest.mark.parametrize("case", MET, ids=lambda case: case.name)
def test_met(case, sandbox, capfd):
    act = case.make(sandbox)
    before = contents(sandbox)
    code = line = ""
    try:
        act()
    except FedMedGanError as error:  # any other exception is a hole
        code, line = error.code, error.line()
    assert code == case.code, line
    assert "\n" not in line and MARKER not in line and "PRIVATE KEY" not in line
    assert capfd.readouterr() == ("", ""), "a library printed something"
    assert contents(sandbox) == before, "something was written or lost"


# ---- AT_HOME: through a real hospital and a real server, in the middle of a study


@dataclass
class Played:
    """A consortium that has finished round 1, and sealed and added round 2."""

    study: Study
    homes: list[Path]
    opened: RoundOpen
    updates: list[Envelope]
    """Signed updates of round 2, one a hospital."""
    certificate: Certificate
    total: bytes
    """The encrypted sum of round 2."""
    early: Path
    """Home of the first hospital as it was before round 1."""
    coordinator: Ed25519PrivateKey

    def hospital(self, home: Path) -> Hospital:
        return Hospital(home)

    def signing(self, place: int) -> Ed25519PrivateKey:
        return HospitalKeys.load(self.homes[place] / "keys").signing

    def sum_of(self, opened: RoundOpen | None = None) -> RoundSum:
        start = Hospital(self.homes[0])
        adder = cipher.AddOnly(proof.update_blobs(self.study, start.plan.n_values))
        return RoundSum(self.study, opened or self.opened, adder, start.model_hash)

    def short_sum(self) -> bytes:
        """What a server could send that leaves the last hospital out."""
        short = self.sum_of()
        for update in self.updates[:-1]:
            short.add(update)
        return short.certify()[1]

    def resigned(self, place: int, **changes: Any) -> Envelope:
        """An update that its own hospital signed with other words in it."""
        update = self.updates[place].open(Update, self.study).model_copy(update=changes)
        return Envelope.seal(update, self.signing(place), self.updates[place].payload)

    def certified(self, **changes: Any) -> Certificate:
        return self.certificate.model_copy(update=changes)

    def with_update(self, place: int, envelope: Envelope) -> Certificate:
        updates = [*self.certificate.updates]
        updates[place] = envelope.shown()
        return self.certified(updates=tuple(updates))


@pytest.fixture(scope="module")
def played(tmp_path_factory) -> Played:
    folder = tmp_path_factory.mktemp("played") / "run"
    study = consortium.prepare(tiny_study(3, training={"rounds": 3}), folder, {})
    epoch = consortium.give_key(folder, study)
    homes = consortium.homes(folder, study)
    early = folder / "early"
    shutil.copytree(homes[0], early, ignore=shutil.ignore_patterns("dicom"))
    shutil.copytree(folder / "budget-books" / homes[0].name, folder / "early-book")
    cohort = tuple(sorted(site.name for site in study.sites))
    for number in (1, 2):
        opened = RoundOpen(study=study.hash, round=number, attempt=1, cohort=cohort, epoch=1, key_id=epoch.key_id)
        updates = [Hospital(home).local_update(opened) for home in homes]
        made = Played(study, homes, opened, updates, None, b"", early, load_signing_key(folder / KEY_FILE))
        total = made.sum_of()
        for update in updates:
            total.add(update)
        made.certificate, made.total = total.certify()
        if number == 1:
            for home in homes:
                Hospital(home).apply_sum(made.certificate, made.total)
    return made


@pytest.fixture
def home(played, sandbox) -> Path:
    """A copy of the first hospital's home. Its images stay where they are: the policy names them."""
    original, copy = played.homes[0], sandbox / "hospitals" / "site-0"
    shutil.copytree(original, copy, ignore=shutil.ignore_patterns("dicom"))
    shutil.copytree(original.parents[1] / "budget-books" / "site-0", sandbox / "budget-books" / "site-0")
    return copy


def asked(**changes: Any) -> Callable:
    """The server asks for a round."""
    return lambda p, home: Hospital(home).local_update(p.opened.model_copy(update=changes))


def spoilt(name: str, data: bytes | None, act: Callable | None = None) -> Callable:
    """A file of the home is damaged (None: gone), and the hospital is asked again."""

    def make(p: Played, home: Path) -> None:
        (home / name).unlink(missing_ok=True)
        if data is not None:
            (home / name).write_bytes(data)
        (act or asked())(p, home)

    return make


def policy(line: str) -> Callable:
    """A line of policy.toml, in the place of the one of that key."""

    def make(p: Played, home: Path) -> None:
        text = (home / "policy.toml").read_text()
        key = line.split(" =")[0]
        changed = re.sub(rf"(?m)^{key} = .*$", line.replace("\\", "\\\\"), text)
        (home / "policy.toml").write_text(changed if changed != text else f"{text}\n{line}\n")
        Hospital(home).load_patients()

    return make


def few_patients(p: Played, home: Path) -> None:
    """The folder holds fewer patients than were declared, and one image of another modality."""
    few = home / "few" / "clear"
    few.mkdir(parents=True)
    for number in range(3):
        (few / f"{number}.dcm").write_bytes(marked(PatientID=f"{MARKER}-{number}"))
    (few / "mr.dcm").write_bytes(marked(Modality="MR"))
    policy(f'data = "{home / "few"}"')(p, home)


def applied_sum(certificate: Callable[[Played], Certificate], total: Callable[[Played], bytes] = lambda p: p.total):
    """The server broadcasts a sum."""
    return lambda p, home: Hospital(home).apply_sum(certificate(p), total(p))


def server_adds(envelopes: Callable[[Played], list[Envelope]]) -> Callable:
    def make(p: Played, home: Path) -> None:
        total = p.sum_of()
        for envelope in envelopes(p):
            total.add(envelope)

    return make


def cut_ledger(lines: int) -> Callable:
    def make(p: Played, home: Path) -> None:
        kept = (home / "ledger.jsonl").read_bytes().splitlines(keepends=True)[:lines]
        (home / "ledger.jsonl").write_bytes(b"".join(kept))
        asked()(p, home)

    return make


def other_ledger(p: Played, home: Path) -> None:
    """As long as ours, whole, ours by name, and another story."""
    length = len((home / "ledger.jsonl").read_bytes().splitlines())
    (home / "ledger.jsonl").unlink()
    with ledger_of(home) as ledger:
        ledger.open_study(p.study.hash, terms(delta=p.study.privacy.delta, ceiling=p.study.privacy.epsilon))
        while ledger.history.seq < length:
            ledger.void(ledger.reserve(p.study.hash, 1, [test_ledger.EVENT]), "never happened")
    asked()(p, home)


def whole_home_restored(p: Played, home: Path) -> None:
    """A backup from before round 1, model and ledger alike: only what the server brings back can tell."""
    book = home.parents[1] / "budget-books" / home.name
    for now, early in ((home, p.early), (book, p.early.with_name("early-book"))):
        shutil.rmtree(now)
        shutil.copytree(early, now)
    approvals = tuple(
        Approval(hospital=n, signature=s) for n, s in Agreement.load(home / "study.json").signatures.items()
    )
    roll = Roll(study=p.study.hash, approvals=approvals, anchors=(p.updates[0].shown(),))
    Hospital(home).present(roll)


def model_of_another_study(p: Played, home: Path) -> None:
    arrays, notes = checkpoint.read(home / "model.safetensors")
    checkpoint.write(home / "model.safetensors", arrays, **(notes | {"study": "0" * 64}))
    Hospital(home)


def another_model(p: Played, home: Path) -> None:
    arrays, notes = checkpoint.read(home / "model.safetensors")
    checkpoint.write(home / "model.safetensors", {n: a + 1 for n, a in arrays.items()}, **notes)
    applied_sum(lambda p: p.certificate)(p, home)


def one_file_for_another(name: str, source: str) -> Callable:
    def make(p: Played, home: Path) -> None:
        shutil.copyfile(home / source, home / name)
        asked(attempt=2)(p, home)

    return make


def model_as_update(p: Played, home: Path) -> None:
    shutil.copyfile(home / "model.safetensors", home / "update.safetensors")
    (home / "outbox.msg").unlink()
    asked()(p, home)


def judged_on_training_images(p: Played, home: Path) -> None:
    arms.refuse_training_images(p.homes[0].parents[1], p.study, [p.homes[1] / consortium.PHANTOMS])


AT_HOME = [
    Case("D27", "tested on training images", "DATA_DUPLICATE", judged_on_training_images),
    Case("C01", "no policy", "CONFIG_NOT_FOUND", spoilt("policy.toml", None)),
    Case("C03", "policy no TOML", "CONFIG_TYPE", spoilt("policy.toml", b"site = ")),
    Case("C05", "policy with another key", "CONFIG_TYPE", policy("max_epsilonn = 3.0")),
    Case("C11", "policy ceiling inf", "CONFIG_TYPE", policy("max_epsilon = inf")),
    Case("C11", "policy ceiling true", "CONFIG_TYPE", policy("max_epsilon = true")),
    Case("C11", 'policy ceiling "4"', "CONFIG_TYPE", policy('max_epsilon = "4"')),
    Case("C11", "policy ceiling 0", "CONFIG_TYPE", policy("max_epsilon = 0.0")),
    Case("C13", "policy of a stranger", "STUDY_ROSTER", policy('site = "stranger"')),
    Case("C13", "policy with a cohort of two", "CONFIG_TYPE", policy("min_cohort = 2")),
    Case("C15", "policy without encryption", "CONFIG_TYPE", policy("require_encryption = false")),
    Case("C17", "policy nested", "CONFIG_TYPE", spoilt("policy.toml", b"site = " + b"[" * 10_000)),
    Case("C17", "policy of 2 MiB", "CONFIG_TYPE", spoilt("policy.toml", b"#" * (2 << 20))),
    Case("C18", "policy not UTF-8", "CONFIG_TYPE", spoilt("policy.toml", b"site = '\xff'")),
    Case("D01", "data folder gone", "DATA_PATH", policy('data = "/nowhere"')),
    Case("D01", "data folder with a NUL", "DATA_PATH", policy('data = "a\\u0000b"')),
    Case("D30", "fewer than declared, mixed", "DATA_TOO_FEW", few_patients),
    Case("H17", "another round", "MSG_ROUND", asked(round=3)),
    Case("H17", "a round that is over", "MSG_ROUND", asked(round=1)),
    Case("H17", "another key", "MSG_KEY", asked(key_id="0" * 32)),
    Case("H17", "another key epoch", "MSG_KEY", asked(epoch=2)),
    Case("H17", "a cohort of two", "MSG_SENDER", asked(cohort=("site-0", "site-1"))),
    Case("H17", "a cohort with a stranger", "MSG_SENDER", asked(cohort=("site-0", "site-1", "stranger"))),
    Case("H17", "a cohort with one twice", "MSG_SENDER", asked(cohort=("site-0", "site-0", "site-1"))),
    Case("H17", "a new attempt of the same cohort", "MSG_REPLAY", asked(attempt=2)),
    Case("H17", "sent twice", "MSG_REPLAY", server_adds(lambda p: [p.updates[0], p.updates[0]])),
    Case("H17", "another attempt", "MSG_ROUND", server_adds(lambda p: [p.resigned(0, attempt=2)])),
    Case("H17", "another weight", "MSG_SENDER", server_adds(lambda p: [p.resigned(0, weight=9)])),
    Case("H17", "another model", "MODEL_DIVERGED", server_adds(lambda p: [p.resigned(0, model_hash="0" * 64)])),
    Case("H17", "sum of another round", "MSG_ROUND", applied_sum(lambda p: p.certified(round=3))),
    Case("H17", "sum under another key", "MSG_KEY", applied_sum(lambda p: p.certified(key_id="0" * 32))),
    Case("H17", "sum of an attempt before", "MSG_ROUND", applied_sum(lambda p: p.certified(attempt=3))),
    Case("H17", "sum with one twice", "MSG_SENDER", applied_sum(lambda p: p.with_update(2, p.updates[0]))),
    Case(
        *("H17", "sum with an update that we did not send", "MSG_SENDER"),
        applied_sum(lambda p: p.with_update(0, p.resigned(0, generator_loss=0.25))),
    ),
    Case(
        "H18",
        "one speaks for another",
        "MSG_SIGNATURE",
        server_adds(
            lambda p: [
                Envelope.seal(
                    p.updates[1].open(Update, p.study).model_copy(update={"hospital": "site-0"}),
                    p.signing(1),
                    p.updates[1].payload,
                )
            ]
        ),
    ),
    Case(
        "H18",
        "a hospital speaks for the server",
        "MSG_SIGNATURE",
        lambda p, home: Envelope.seal(p.opened, p.signing(1)).open(RoundOpen, Hospital(home).study),
    ),
    Case(
        "H18",
        "a forged update in a sum",
        "MSG_SIGNATURE",
        applied_sum(lambda p: p.with_update(1, p.resigned(1).model_copy(update={"signature": "0" * 128}))),
    ),
    Case(
        "H19",
        "a payload cut behind its header",
        "MSG_FORMAT",
        server_adds(lambda p: [p.updates[0].model_copy(update={"payload": p.updates[0].payload[:-1]})]),
    ),
    Case("H20", "one left out of the sum", "ROUND_REJECTED", applied_sum(lambda p: p.certificate, Played.short_sum)),
    Case("H20", "a sum cut", "HE_CT_SIZE", applied_sum(lambda p: p.certificate, lambda p: p.total[:-1])),
    Case("H20", "a sum altered", "HE_CT_HASH", applied_sum(lambda p: p.certificate, lambda p: flip(p.total, 9000))),
    Case("L01", "gone", "LEDGER_ROLLBACK", spoilt("ledger.jsonl", None)),
    Case("L01", "empty", "LEDGER_ROLLBACK", spoilt("ledger.jsonl", b"")),
    Case("L02", "shorter", "LEDGER_ROLLBACK", cut_ledger(1)),
    Case("L02", "restored with all of the home", "LEDGER_ROLLBACK", whole_home_restored),
    Case("L02", "a peer's", "LEDGER_ROLLBACK", applied_sum(lambda p: p.with_update(1, p.resigned(1, ledger_seq=1)))),
    Case("L03", "another story", "LEDGER_FORK", other_ledger),
    Case(
        "L03",
        "a peer's",
        "LEDGER_FORK",
        applied_sum(lambda p: p.with_update(1, p.resigned(1, ledger_seq=6, ledger_head="0" * 64))),
    ),
    Case(
        "L10",
        "a folder in its place: no training",
        "LEDGER_WRITE",
        lambda p, home: ((home / "ledger.jsonl").unlink(), (home / "ledger.jsonl").mkdir(), asked()(p, home)),
    ),
    Case("M01", "model cut", "MODEL_HASH", spoilt("model.safetensors", bytes(100))),
    Case("M01", "attempt cut", "RUN_STATE", spoilt("attempt.json", b'{"round": 2', asked(attempt=2))),
    Case("M01", "attempt of other words", "RUN_STATE", spoilt("attempt.json", b"[2]", asked(attempt=2))),
    Case("M01", "noise cut", "STUDY_HASH", spoilt("noise.json", b"{")),
    Case("M01", "count of rejected sums cut", "RUN_STATE", spoilt("rejected.json", b'{"epoch": 1, "su')),
    Case("M08", "the model in the place of the update", "MODEL_MISMATCH", model_as_update),
    Case("M02", "agreement empty", "CONFIG_SYNTAX", spoilt("study.json", b"")),
    Case("M08", "model of another study", "MODEL_MISMATCH", model_of_another_study),
    Case("M08", "another model", "MODEL_DIVERGED", another_model),
    Case(
        "M08",
        "states in the place of the model",
        "MODEL_MISMATCH",
        one_file_for_another("model.safetensors", "optimizers.safetensors"),
    ),
    Case(
        "M08",
        "the update in the place of the model",
        "MODEL_MISMATCH",
        one_file_for_another("model.safetensors", "update.safetensors"),
    ),
]


@pytest.mark.parametrize("case", AT_HOME, ids=lambda case: case.name)
def test_at_home(case, played, home, capfd):
    code = line = ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalTrainer, "train", lambda *_: pytest.fail("it trained"))
        try:
            case.make(played, home)
        except FedMedGanError as error:  # any other exception is a hole
            code, line = error.code, error.line()
    assert code == case.code, line
    assert "\n" not in line and MARKER not in line
    assert MARKER not in "".join(capfd.readouterr())


# ---- ALREADY and NOT_OURS

ALREADY = {
    "D01": (
        "test_patients.py::test_what_is_not_a_folder",
        "test_cli_dataset.py::test_no_folder_and_an_empty_one_are_errors",
    ),
    "D02": ("test_patients.py::test_nothing_usable_says_why",),
    **{f"D{n:02}": ("test_dicom.py::test_catalogue",) for n in (3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14)},
    **{f"D{n:02}": ("test_dicom.py::test_catalogue",) for n in (16, 17, 18, 19, 20, 22, 23, 24, 25)},
    "D07": ("test_dicom.py::test_every_prefix_is_refused_as_cut_or_is_whole",),
    "D15": ("test_dicom.py::test_inversion_happens_once",),
    "D21": (
        "test_dicom.py::test_what_only_claims_to_be_large_is_refused_without_allocating",
        "test_patients.py::test_a_bomb_does_not_fill_the_worker",
    ),
    "D26": (
        "test_patients.py::test_unsafe_entries_are_listed_and_never_opened",
        "test_patients.py::test_a_pipe_that_takes_the_place_of_a_file_is_not_waited_for",
    ),
    "D27": ("test_patients.py::test_copies_are_used_once",),
    "D28": ("test_patients.py::test_rules",),
    "D29": ("test_patients.py::test_rules",),
    "L09": ("test_ledger.py::test_two_processes_cannot_write_one_ledger",),
    "L10": (
        "test_ledger.py::test_a_full_disk_refuses_the_round_and_loses_nothing",
        "test_ledger.py::test_a_read_only_disk_refuses_the_round",
    ),
}
NOT_OURS = {
    "H12": "BFV has no scale; nothing in here is CKKS",
}


def test_every_id_of_the_design_has_its_place():
    families = {"C": 18, "D": 30, "K": 12, "H": 20, "L": 10, "M": 8}
    ids = {f"{letter}{n:02}" for letter, count in families.items() for n in range(1, count + 1)}
    assert len(ids) == 98
    tabled = {case.id for case in TYPED + MET + AT_HOME} | set(ALREADY)
    assert tabled | set(NOT_OURS) == ids
    assert not tabled & set(NOT_OURS)
    names = [case.name for case in TYPED + MET + AT_HOME]
    assert len(set(names)) == len(names) >= 80


def test_what_is_pointed_at_is_there():
    for id, tests in ALREADY.items():
        for name in tests:
            file, _, function = name.partition("::")
            tree = ast.parse((Path(__file__).parent / file).read_text(encoding="utf-8"))
            assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name
            if function == "test_catalogue":
                assert any(case.startswith(id) for case in test_dicom.CATALOGUE), id
