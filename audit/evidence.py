"""What an auditor was handed, gathered: hospitals' ledgers, studies, certificates; checked by nobody yet.

    a ledger.jsonl                  its ledger
    a hospital's home               ledger.jsonl, study.json, certificates/, past/<study>/{study.json, certificates/}
    a bundle, zip or unpacked       the same, and SHA256SUMS with its signature
    a simulation's run folder       every home in hospitals/
    a folder of any of these        all of them; what is none of these is passed over

Everything here may have been made by somebody who wants to be believed. Nothing is unpacked onto the disk, nothing is
followed out of the folder that was given, and sizes are limited before anything is read.

    case                                                  result
    a zip that names ../x, /x, a\\b, or a link            AUDIT_EVIDENCE
    a zip that says it is small and is not, or encrypted  AUDIT_EVIDENCE, after MAX_BYTES at most
    two members of one name                               AUDIT_EVIDENCE
    a symbolic link in a folder                           passed over: it is not what was handed over
    a study or a certificate that cannot be read          kept as a problem, which `verify` reports
    no ledger anywhere                                    AUDIT_EVIDENCE
"""

from __future__ import annotations

import json
import re
import stat
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from fedmedgan.shared.agreement import Agreement
from fedmedgan.shared.errors import FedMedGanError, RunError
from fedmedgan.shared.messages import Signed
from fedmedgan.shared.study import from_agreed

LEDGER, STUDY, SUMS, SEAL = "ledger.jsonl", "study.json", "SHA256SUMS", "SHA256SUMS.sig"
INSECURE_MARK = "INSECURE-SEED"
"""A simulation with repeatable noise leaves this file in its run folder (simulations/consortium.py)."""
MAX_BYTES = 1 << 30
"""Of one bundle or one ledger; 100,000 records are about 80 MB."""
MAX_SMALL_BYTES = 16 << 20
MAX_FILES = 50_000
_OF_A_STUDY = (STUDY, "certificates/*.json")


@dataclass(frozen=True)
class HospitalEvidence:
    """What was handed over about one ledger."""

    hospital: str
    """As the ledger's first record says; where that cannot be read, the name of the file or folder."""
    ledger: bytes = field(repr=False)
    """Raw."""
    where: str
    """For display; never an absolute path."""
    agreements: Mapping[str, Agreement] = field(default_factory=dict, repr=False)
    """Study hash -> the study, with the signatures that are there; each was verified."""
    certificates: Mapping[str, tuple[Signed, ...]] = field(default_factory=dict, repr=False)
    """Study hash -> its rounds' certificates; no signature was checked yet."""
    problems: tuple[str, ...] = ()
    """Files that could not be read, in words."""
    sealed: Mapping[str, bytes] | None = field(default=None, repr=False)
    """All files of a bundle by name; None where this is not a bundle."""
    owner_key: str = ""
    """Public key of the data owner, where a home's policy names one."""
    insecure_simulation: bool = False
    """From a simulation whose noise could be repeated on purpose."""


def gather(path: Path) -> list[HospitalEvidence]:
    """All ledgers at a place, with what lies beside them.

    Raises:
        RunError: AUDIT_EVIDENCE, no ledger is there, or a bundle is not one.
    """
    found = list(_gather(path, path.name or path.resolve().name))
    if not found:
        raise RunError("AUDIT_EVIDENCE", "there is no ledger", path.name)
    return found


def _gather(path: Path, where: str) -> Iterator[HospitalEvidence]:
    if path.is_file():
        if zipfile.is_zipfile(path):
            yield from _bundles(_unzipped(path), where)
        else:
            yield _evidence({LEDGER: _read(path, MAX_BYTES)}, where)
    elif (path / LEDGER).is_file() and not (path / LEDGER).is_symlink():
        run = path.resolve().parents[1] if path.resolve().parent.name == "hospitals" else path
        yield _home(path, where, insecure_simulation=(run / INSECURE_MARK).exists())
    elif path.is_dir():
        mark = (path / INSECURE_MARK).exists()
        hospitals = path / "hospitals"
        for child in sorted((hospitals if hospitals.is_dir() else path).iterdir()):
            if child.is_symlink():
                continue
            if (child / LEDGER).is_file() and not (child / LEDGER).is_symlink():
                yield _home(child, f"{where}/{child.name}", insecure_simulation=mark)
            elif child.is_file() and child.suffix in (".zip", ".jsonl") and child.name != "events.jsonl":
                yield from _gather(child, f"{where}/{child.name}")


def _home(home: Path, where: str, insecure_simulation: bool = False) -> HospitalEvidence:
    """A home folder or an unpacked bundle."""
    wanted = ["**/*"]
    if not (home / SUMS).is_file():
        wanted = [LEDGER, "policy.toml"] + [f"{place}{name}" for place in ("", "past/*/") for name in _OF_A_STUDY]
    files: dict[str, bytes] = {}
    left = MAX_BYTES
    for path in sorted({path for pattern in wanted for path in home.glob(pattern)}):
        if _is_link_below(path, home) or not path.is_file():
            continue
        name = path.relative_to(home).as_posix()
        files[name] = _read(path, left)
        left -= len(files[name])
        if len(files) > MAX_FILES:
            raise _refused("there are too many files", where)
    return _evidence(files, where, insecure_simulation)


def _is_link_below(path: Path, home: Path) -> bool:
    return any((home / part).is_symlink() for part in [path.relative_to(home), *path.relative_to(home).parents][:-1])


def _bundles(files: Mapping[str, bytes], where: str) -> Iterator[HospitalEvidence]:
    """Each folder of a zip that holds a ledger."""
    folders = sorted(name.removesuffix(LEDGER) for name in files if name == LEDGER or name.endswith("/" + LEDGER))
    if not folders:
        raise _refused("the zip holds no ledger", where)
    for folder in folders:
        own = {name.removeprefix(folder): content for name, content in files.items() if name.startswith(folder)}
        yield _evidence(own, f"{where}/{folder}".rstrip("/") if len(folders) > 1 else where)


def _unzipped(path: Path) -> dict[str, bytes]:
    """The members of a zip in memory."""
    files: dict[str, bytes] = {}
    left = MAX_BYTES
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            if len(members) > MAX_FILES:
                raise _refused("the zip holds too many files", path.name)
            for member in members:
                name = member.filename
                parts = name.split("/")
                if "\\" in name or "\0" in name or name in files or any(part in ("", ".", "..") for part in parts):
                    raise _refused("the zip names a file twice, or outside of itself", path.name)
                if stat.S_ISLNK(member.external_attr >> 16):
                    raise _refused("the zip holds a link", path.name)
                with archive.open(member) as stream:
                    files[name] = stream.read(left + 1)
                left -= len(files[name])
                if left < 0:
                    raise _refused(f"the zip unpacks to more than {MAX_BYTES >> 20} MiB", path.name)
    except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError, EOFError, ValueError) as error:
        raise _refused(f"not a zip that can be read ({type(error).__name__})", path.name) from None
    return files


def _evidence(files: Mapping[str, bytes], where: str, insecure_simulation: bool = False) -> HospitalEvidence:
    agreements: dict[str, Agreement] = {}
    certificates: dict[str, tuple[Signed, ...]] = {}
    problems: list[str] = []
    for name in sorted(name for name in files if re.fullmatch(f"(past/[^/]+/)?{STUDY}", name)):
        folder = name.removesuffix(STUDY)
        try:
            agreement = _agreement(files[name], name)
        except FedMedGanError as error:
            problems.append(f"{name}: {error.what}")
            continue
        agreements[agreement.study.hash] = agreement
        own = sorted(n for n in files if re.fullmatch(f"{re.escape(folder)}certificates/[^/]+[.]json", n))
        certificates[agreement.study.hash] = tuple(_certificates(files, own, problems))
    return HospitalEvidence(
        hospital=_hospital(files[LEDGER]) or where,
        ledger=files[LEDGER],
        where=where,
        agreements=agreements,
        certificates=certificates,
        problems=tuple(problems),
        sealed=files if SUMS in files else None,
        owner_key=_owner_key(files.get("policy.toml", b"")),
        insecure_simulation=insecure_simulation,
    )


def _agreement(raw: bytes, name: str) -> Agreement:
    """What `Agreement.load` reads from a file."""
    try:
        if len(raw) > MAX_SMALL_BYTES:
            raise ValueError
        values = json.loads(raw)
        agreement = Agreement(from_agreed(values, name))
        for site, signature in values["signatures"].items():
            agreement = agreement.with_signature(site, signature)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _refused("this is not an agreed study", name) from None
    return agreement


def _certificates(files: Mapping[str, bytes], names: list[str], problems: list[str]) -> Iterator[Signed]:
    for name in names:
        try:
            if len(files[name]) > MAX_SMALL_BYTES:
                raise ValueError
            yield Signed.model_validate_json(files[name])
        except (ValidationError, ValueError):
            problems.append(f"{name}: this is not a certificate")


def _hospital(ledger: bytes) -> str:
    """The hospital that the first line names, unverified; empty where it names none."""
    try:
        name = json.loads(ledger[: ledger.find(b"\n", 0, 1 << 16) + 1])["body"]["hospital"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return name if isinstance(name, str) and re.fullmatch("[a-z0-9][a-z0-9-]{0,30}", name) else ""


def _owner_key(policy: bytes) -> str:
    try:
        key = tomllib.loads(policy.decode()).get("data_owner_key", "")
    except (ValueError, RecursionError):
        return ""
    return key if isinstance(key, str) and re.fullmatch("[0-9a-f]{64}", key) else ""


def _read(path: Path, most: int) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise _refused(f"cannot be read ({error.strerror})", path.name) from None
    if len(content) > most:
        raise _refused(f"more than {MAX_BYTES >> 20} MiB", path.name)
    return content


def _refused(what: str, where: str) -> RunError:
    return RunError("AUDIT_EVIDENCE", what, where)
