"""The privacy ledger of one hospital: what was done to its patients' data, for ever.

A file of lines (JSONL). Each line is one record in canonical JSON (RFC 8785):

    {"body": {...}, "sha256": hash of the canonical body, "signature": null}

The body carries a running number, the SHA-256 of the previous RAW LINE with its newline (zeros for the
first), the time, the hospital, the study and the kind of record. So a dropped, swapped, repeated or edited
line breaks the chain, and a line that is not byte for byte the canonical encoding of what it says is refused
(no spare white space, doubled keys, NaN, or capital hex digits to hide a change in). `sha256` guards the last
line, whose hash no later line holds yet. `signature` is null in this version: it keeps the place for the
hospital's signature, and heads anchored with server and peers will show a roll-back, which a ledger alone
cannot.

Two phases: a round's steps are RESERVED, written and fsynced before any patient's image is touched;
afterwards the steps that were really done are CHARGED. A reservation that was never settled (a crash) is
spent in full.

    case                                         result
    another process has the ledger open          LEDGER_LOCKED
    folder read-only, disk full, I/O error       LEDGER_WRITE; the file is cut back and still verifies
    any write after a failed one                 LEDGER_WRITE, until the ledger is opened (and verified) again
    last line without its newline                never acknowledged: cut off; a record `tail_repaired` says so
    last newline altered, any other byte altered LEDGER_CORRUPT, nothing is repaired
    a file that is no ledger                     LEDGER_CORRUPT, the file is left as it is
    the file was changed while it was open       LEDGER_CORRUPT
    ledger of another hospital                   LEDGER_OWNER
    charge for more steps than reserved          LEDGER_STATE
    charge or void of an earlier process' work   LEDGER_STATE: it stays spent in full
    second reservation for the same round        allowed, and costs again
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import rfc8785

from fedmedgan.shared.errors import PrivacyError
from fedmedgan.shared.privacy.events import UNIT, TrainingSteps, check_delta, merge, real

FORMAT = 1
NOTHING = "0" * 64
"""What the first record names as its predecessor."""
MAX_TAIL = 1 << 16
"""A record is far smaller, so a longer piece without a newline is not a torn write."""
_LINE_START = b'{"body":{"'


@dataclass(frozen=True)
class Record:
    """One verified record.

    `body` holds what was written. `line_sha256` is the hash of the raw line, which the next record names.
    """

    body: dict[str, Any]
    line_sha256: str

    @property
    def seq(self) -> int:
        """Running number, from 1."""
        return self.body["seq"]

    @property
    def kind(self) -> str:
        """open, reserve, charge, void, close or tail_repaired."""
        return self.body["kind"]


class History:
    """Verified records in their order, and what follows from them."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.torn_bytes = 0
        """Bytes after the last complete line: a write that was never acknowledged, or that is under way."""
        self._terms: dict[str, dict[str, Any]] = {}
        self._closed: set[str] = set()
        self._unsettled: dict[int, dict[str, Any]] = {}
        self._charged: list[tuple[str, TrainingSteps]] = []

    @property
    def seq(self) -> int:
        """Number of the last record; 0 for an empty ledger."""
        return len(self.records)

    @property
    def head(self) -> str:
        """Hash of the last raw line, 64 hex digits: with `seq`, it names this whole history."""
        return self.records[-1].line_sha256 if self.records else NOTHING

    @property
    def hospital(self) -> str:
        """Whose ledger this is; empty for an empty ledger."""
        return self.records[0].body["hospital"] if self.records else ""

    def spent(self, study: str | None = None) -> list[TrainingSteps]:
        """Everything that counts as done: charged steps, and every unsettled reservation in full.

        Args:
            study: hash of one study; all studies of this ledger by default.
        """
        reserved = [(b["study"], event) for b in self._unsettled.values() for event in _events(b)]
        return merge(event for name, event in self._charged + reserved if study in (None, name))

    def refuse(self, body: dict[str, Any]) -> None:
        """Raise LEDGER_STATE where a new record does not fit what came before."""
        kind, study = body["kind"], body["study"]
        if kind == "tail_repaired":
            return
        if study in self._closed:
            raise _state(f"{kind}: the study is closed", body)
        if kind == "open":
            terms = self._terms.get(study)
            if terms and terms["delta"] != body["delta"]:
                raise _state("open: the study was opened with another delta", body)
        elif study not in self._terms:
            raise _state(f"{kind}: the study was never opened", body)
        if kind in ("charge", "void"):
            reserved = self._unsettled.get(body["reserve"])
            if reserved is None or reserved["study"] != study:
                raise _state(f"{kind}: record {body['reserve']} is no open reservation of this study", body)
            if kind == "charge":
                limits = [event.steps for event in _events(reserved)]
                if len(body["steps"]) != len(limits):
                    raise _state("charge: another number of events than reserved", body)
                if any(done > limit for done, limit in zip(body["steps"], limits, strict=True)):
                    raise _state("charge: more steps than reserved", body)

    def add(self, record: Record) -> None:
        """Take in a record that `refuse` let through."""
        body, study = record.body, record.body["study"]
        match record.kind:
            case "open":
                self._terms[study] = body
            case "close":
                self._closed.add(study)
            case "reserve":
                self._unsettled[record.seq] = body
            case "void":
                del self._unsettled[body["reserve"]]
            case "charge":
                events = _events(self._unsettled.pop(body["reserve"]))
                done = zip(events, body["steps"], strict=True)
                self._charged += [(study, event.with_steps(steps)) for event, steps in done]
        self.records.append(record)

    def check_anchor(self, seq: int, head: str) -> None:
        """Does this history hold the record that somebody saw at its head once?

        =====================================  ====================
        case                                   result
        =====================================  ====================
        seq 0: nothing was there to be seen    nothing
        the record is there, with that hash    nothing
        the ledger is shorter, or empty        LEDGER_ROLLBACK
        another record stands at that number   LEDGER_FORK
        =====================================  ====================

        Raises:
            PrivacyError: LEDGER_ROLLBACK, LEDGER_FORK.
        """
        if seq > self.seq:
            what = f"the ledger ends at record {self.seq}, others have seen record {seq}"
            raise PrivacyError("LEDGER_ROLLBACK", what, "ledger.jsonl")
        if seq > 0 and self.records[seq - 1].line_sha256 != head:
            raise PrivacyError("LEDGER_FORK", f"record {seq} is not the one that others have seen", "ledger.jsonl")

    def terms(self, study: str) -> dict[str, Any] | None:
        """The latest `open` record of a study; None where it was never opened, or is closed."""
        return None if study in self._closed else self._terms.get(study)


def read(path: Path) -> History:
    """Verify a ledger without locking or changing it; `torn_bytes` tells of an unfinished last line.

    Raises:
        PrivacyError: LEDGER_CORRUPT, LEDGER_STATE, LEDGER_OWNER (two hospitals), LEDGER_WRITE (unreadable).
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        what = error.strerror or type(error).__name__
        raise PrivacyError("LEDGER_WRITE", what, path.name, hint="give a ledger that can be read") from None
    return _verify(raw, path.name)[0]


class Ledger:
    """The ledger of one hospital, locked for this process and open for writing. Not thread-safe.

    Args:
        path: the file; made with mode 0600 if it is not there. Its folder must exist on a local disk.
        hospital: the roster name; every record carries it.

    Raises:
        PrivacyError: LEDGER_LOCKED, LEDGER_OWNER, LEDGER_CORRUPT, LEDGER_STATE, LEDGER_WRITE. After any of
            them nothing was appended, and nothing may be trained.
    """

    def __init__(self, path: Path, hospital: str) -> None:
        self.path, self.hospital = path, hospital
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,30}", hospital):
            raise PrivacyError("LEDGER_OWNER", "a hospital's name is made of a-z, 0-9 and -", path.name)
        self._own_reservations: set[int] = set()
        self._failed = False
        self._file = _open_locked(path)
        try:
            raw = _read_all(self._file)
            self.history, self._size = _verify(raw, path.name)
            if self.history.hospital not in ("", hospital):
                raise PrivacyError("LEDGER_OWNER", f"it belongs to {self.history.hospital!r}", path.name)
            if self._size < len(raw):
                self._repair(raw[self._size :])
        except BaseException as error:
            os.close(self._file)
            if isinstance(error, OSError):
                raise _unwritable(error, path) from None
            raise

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close_file()

    def close_file(self) -> None:
        """Give up the lock. Unsettled reservations are spent in full from now on."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    @property
    def records(self) -> tuple[Record, ...]:
        """Every record so far."""
        return tuple(self.history.records)

    def spent(self, study: str | None = None) -> list[TrainingSteps]:
        """Charged steps and unsettled reservations, of one study or of ALL studies in this ledger."""
        return self.history.spent(study)

    def open_study(self, study: str, *, delta: float, ceiling: float) -> None:
        """Record the terms of a study: unit, delta, ceiling, versions of the accountants and of this code.

        Opening again under the same terms writes nothing. A new ceiling or a new version is recorded; a new
        delta is refused (LEDGER_STATE), and so is a closed study.

        Args:
            study: its hash, 64 hex digits.
            ceiling: epsilon that the study may spend here.
        """
        terms = {
            "unit": UNIT,
            "delta": check_delta(delta),
            "ceiling": real(ceiling, "ceiling"),
            "versions": _versions(),
        }
        recorded = self.history.terms(study) or {}
        if any(recorded.get(name) != value for name, value in terms.items()):
            self._append("open", study, **terms)

    def reserve(self, study: str, round: int, events: Sequence[TrainingSteps]) -> int:
        """Write down what a round is about to do, before any patient's data is touched.

        The budget is not checked here but in `budget.Budget.reserve`, which calls this.

        Returns:
            The number of the record, for `charge` or `void`.
        """
        seq = self._append("reserve", study, round=round, events=[event.to_dict() for event in events])
        self._own_reservations.add(seq)
        return seq

    def charge(self, reservation: int, *steps_done: int, noise_source: str) -> None:
        """Settle a reservation of this process with the steps really done: one number for each event.

        Fewer steps than reserved are only right where training stopped for a reason that does not depend on
        the data.

        Args:
            noise_source: the `name` of the random source that made the noise.
        """
        self._settle("charge", reservation, steps=list(steps_done), noise_source=noise_source)

    def void(self, reservation: int, reason: str) -> None:
        """Take back a reservation of this process. Only where NO patient's data was touched.

        Args:
            reason: one line of at most 200 characters that names no patient.
        """
        self._settle("void", reservation, reason=reason)

    def close_study(self, study: str) -> None:
        """End a study: nothing can be reserved for it any more, and what was spent stays spent."""
        self._append("close", study)

    def _settle(self, kind: str, reservation: int, **fields: Any) -> None:
        if reservation not in self._own_reservations:
            raise PrivacyError("LEDGER_STATE", f"{kind}: not an open reservation of this process", self.path.name)
        study = self.history.records[reservation - 1].body["study"]
        self._append(kind, study, reserve=reservation, **fields)
        self._own_reservations.discard(reservation)

    def _append(self, kind: str, study: str | None, **fields: Any) -> int:
        body = {
            "v": FORMAT,
            "seq": self.history.seq + 1,
            "prev": self.history.head,
            "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "hospital": self.hospital,
            "study": study,
            "kind": kind,
            **fields,
        }
        problem = _problem(body)
        if problem:
            raise _state(f"{kind}: {problem}", body)
        self.history.refuse(body)
        line = _encode(body)
        self._write(line)
        # What counts from now on is what a reader of the line will see.
        self.history.add(Record(json.loads(line)["body"], hashlib.sha256(line).hexdigest()))
        return self.history.seq

    def _write(self, line: bytes) -> None:
        """Append one line and fsync it, or leave the file as it was."""
        if self._failed or self._file < 0:
            what = "an earlier write failed" if self._failed else "it was closed"
            raise PrivacyError("LEDGER_WRITE", f"{what}; open the ledger again", self.path.name)
        self._refuse_changed_file()
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self._file, rest) :]
            os.fsync(self._file)
        except OSError as error:
            # After a failed fsync nobody knows what is on the disk: cut back, and trust this handle no more.
            self._failed = True
            with suppress(OSError):
                os.ftruncate(self._file, self._size)
                os.fsync(self._file)
            raise _unwritable(error, self.path) from None
        self._size += len(line)

    def _refuse_changed_file(self) -> None:
        mine = os.fstat(self._file)
        try:
            named = os.stat(self.path)
        except OSError as error:
            raise _unwritable(error, self.path) from None
        if (mine.st_dev, mine.st_ino) != (named.st_dev, named.st_ino) or mine.st_size != self._size:
            raise PrivacyError("LEDGER_CORRUPT", "the file was changed while it was open", self.path.name)

    def _repair(self, tail: bytes) -> None:
        """Cut off a line that was never acknowledged, and say so in a record."""
        os.ftruncate(self._file, self._size)
        os.fsync(self._file)
        digest = hashlib.sha256(tail).hexdigest()
        self._append("tail_repaired", None, removed_bytes=len(tail), removed_sha256=digest)


def _open_locked(path: Path) -> int:
    try:
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        raise _unwritable(error, path) from None
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise PrivacyError("LEDGER_WRITE", "it is not a regular file", path.name)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PrivacyError("LEDGER_LOCKED", "it is open in another process", path.name) from None
        os.fchmod(file, 0o600)
        if os.fstat(file).st_size == 0:  # perhaps just made: its name must survive a power loss too
            os.fsync(file)
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        os.close(file)
        raise _unwritable(error, path) from None
    except BaseException:
        os.close(file)
        raise
    return file


def _read_all(file: int) -> bytes:
    with open(os.dup(file), "rb") as stream:
        stream.seek(0)
        return stream.read()


def _verify(raw: bytes, name: str) -> tuple[History, int]:
    """Check every line. Returns the history and the length in bytes of its complete lines."""
    history, start = History(), 0
    while (end := raw.find(b"\n", start)) >= 0:
        line = raw[start : end + 1]
        where = f"{name} record {history.seq + 1}"
        body = _decode(line, where)
        if body["seq"] != history.seq + 1 or body["prev"] != history.head:
            raise PrivacyError("LEDGER_CORRUPT", "the chain is broken", where)
        if history.records and body["hospital"] != history.hospital:
            raise PrivacyError("LEDGER_OWNER", "records of two hospitals in one ledger", where)
        history.refuse(body)
        history.add(Record(body, hashlib.sha256(line).hexdigest()))
        start = end + 1
    tail = raw[start:]
    if tail:
        _refuse_strange_tail(tail, f"{name} record {history.seq + 1}")
    history.torn_bytes = len(tail)
    return history, start


def _refuse_strange_tail(tail: bytes, where: str) -> None:
    """A torn write leaves the beginning of a line (after a power loss, zero bytes). All else is damage."""
    written = tail.rstrip(b"\0")[: len(_LINE_START)]
    torn = len(tail) <= MAX_TAIL and _LINE_START.startswith(written)
    if torn:
        with suppress(PrivacyError):
            _decode(tail[:-1] + b"\n", where)
            torn = False  # a whole record whose newline was altered: it may have been acknowledged
    if not torn:
        raise PrivacyError("LEDGER_CORRUPT", "the last line is damaged", where)


def _encode(body: dict[str, Any]) -> bytes:
    canonical = rfc8785.dumps(body)
    digest = hashlib.sha256(canonical).hexdigest().encode()
    return b'{"body":' + canonical + b',"sha256":"' + digest + b'","signature":null}\n'


def _decode(line: bytes, where: str) -> dict[str, Any]:
    """The body of a line. Raises LEDGER_CORRUPT unless the line is just what `_encode` writes for it."""
    try:
        body = json.loads(line)["body"]
        problem = _problem(body) or ("" if _encode(body) == line else "not canonical, or its hash is wrong")
    except (ValueError, KeyError, TypeError, RecursionError):
        problem = "not a record"
    if problem:
        raise PrivacyError("LEDGER_CORRUPT", problem, where)
    return body


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= 10**9


def _pattern(pattern: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 200 and value.isprintable()


def _number(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e6


def _event_list(value: Any) -> bool:
    try:
        return isinstance(value, list) and all(TrainingSteps.from_dict(v).steps > 0 for v in value) and len(value) > 0
    except PrivacyError:
        return False


_HASH = _pattern("[0-9a-f]{64}")
_COMMON: dict[str, Callable[[Any], bool]] = {
    "v": lambda value: value == FORMAT,
    "seq": _whole(1),
    "prev": _HASH,
    "time": _pattern(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"),
    "hospital": _pattern("[a-z0-9][a-z0-9-]{0,30}"),
    "study": _HASH,
    "kind": lambda value: True,
}
_KINDS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "open": {
        "unit": lambda value: value == UNIT,
        "delta": _number,
        "ceiling": _number,
        "versions": lambda value: isinstance(value, dict) and all(map(_text, [*value, *value.values()])),
    },
    "reserve": {"round": _whole(0), "events": _event_list},
    "charge": {
        "reserve": _whole(1),
        "steps": lambda value: isinstance(value, list) and all(map(_whole(0), value)),
        "noise_source": _text,
    },
    "void": {"reserve": _whole(1), "reason": _text},
    "close": {},
    "tail_repaired": {
        "study": lambda value: value is None,
        "removed_bytes": _whole(1),
        "removed_sha256": _HASH,
    },
}


def _problem(body: Any) -> str:
    """What is wrong with the fields of a body, empty when nothing is."""
    if not isinstance(body, dict) or body.get("kind") not in _KINDS:
        return "not a known kind of record"
    fields = {**_COMMON, **_KINDS[body["kind"]]}
    if set(body) != set(fields):
        return "missing or unknown fields"
    return next((f"{name} is not valid" for name, valid in fields.items() if not valid(body[name])), "")


def _events(reserve: dict[str, Any]) -> list[TrainingSteps]:
    return [TrainingSteps.from_dict(values) for values in reserve["events"]]


def _versions() -> dict[str, str]:
    """Versions of this code and of the accountants, without importing them."""
    versions = {}
    for package in ("fedmedgan", "dp-accounting", "opacus"):
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def _state(what: str, body: dict[str, Any]) -> PrivacyError:
    return PrivacyError("LEDGER_STATE", what, f"record {body['seq']}")


def _unwritable(error: OSError, path: Path) -> PrivacyError:
    return PrivacyError("LEDGER_WRITE", f"{error.strerror or type(error).__name__}", path.name)
