"""The privacy ledger of one hospital: what was done to its patients' data, for ever.

A file of signed lines (JSONL; records.py has their form, history.py how they are verified). Each holds a running
number, the SHA-256 of the previous RAW LINE, the time, the hospital, the study and the kind of record.

Two phases: a round's steps are RESERVED, written and fsynced before any patient's image is touched; afterwards the
steps that were really done are CHARGED. A reservation that was never settled (a crash) is spent in full.

A ledger alone cannot show that an older copy was put back: its head rides in every update, so server and peers hold it,
and the hospital's `anchor` records hold theirs.

    case                                         result
    another process has the ledger open          LEDGER_LOCKED
    folder read-only, disk full, I/O error       LEDGER_WRITE; the file is cut back and still verifies
    any write after a failed one                 LEDGER_WRITE, until the ledger is opened (and verified) again
    last line without its newline                never acknowledged: cut off; a record `tail_repaired` says so
    any byte altered, a file that is no ledger   LEDGER_CORRUPT, LEDGER_SIGNATURE; the file is left as it is
    the file was changed while it was open       LEDGER_CORRUPT
    another hospital's ledger or signing key     LEDGER_OWNER
    begun under another budget book              LEDGER_BOOK
    charge for more steps than reserved          LEDGER_STATE
    charge or void of an earlier process' work   LEDGER_STATE: it stays spent in full
    second reservation for the same round        allowed, and costs again
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import secrets
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmedgan.shared.errors import PrivacyError
from fedmedgan.shared.privacy.events import TrainingSteps
from fedmedgan.shared.privacy.history import verify
from fedmedgan.shared.privacy.records import FORMAT, Record, Terms, encode, event_fields, line_hash


class Ledger:
    """The ledger of one hospital, locked for this process and open for writing. Not thread-safe.

    Args:
        path: the file; made with mode 0600 if it is not there. Its folder must exist on a local disk.
        hospital: the roster name; every record carries it.
        signing: the hospital's key; every record is signed with it.
        book: public id of the hospital's budget book, 64 hex digits.

    Raises:
        PrivacyError: LEDGER_LOCKED, LEDGER_OWNER, LEDGER_BOOK, LEDGER_CORRUPT, LEDGER_SIGNATURE, LEDGER_STATE,
            LEDGER_WRITE. After any of them nothing was appended, and nothing may be trained.
    """

    def __init__(self, path: Path, hospital: str, *, signing: Ed25519PrivateKey, book: str) -> None:
        self.path, self.hospital, self._signing = path, hospital, signing
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,30}", hospital):
            raise PrivacyError("LEDGER_OWNER", "a hospital's name is made of a-z, 0-9 and -", path.name)
        self._own_reservations: set[int] = set()
        self._failed = False
        self._file = _open_locked(path)
        try:
            raw = _read_all(self._file)
            self.history, self._size = verify(raw, path.name), raw.rfind(b"\n") + 1
            self._refuse_other_owner(book)
            if self._size < len(raw):
                os.ftruncate(self._file, self._size)
                os.fsync(self._file)
            if not self.history.seq:
                public = signing.public_key().public_bytes_raw().hex()
                self._append("begin", None, ledger=secrets.token_hex(32), signing_key=public, book=book)
            if tail := raw[raw.rfind(b"\n") + 1 :]:
                digest = hashlib.sha256(tail).hexdigest()
                self._append("tail_repaired", None, removed_bytes=len(tail), removed_sha256=digest)
        except BaseException as error:
            os.close(self._file)
            if isinstance(error, OSError):
                raise _unwritable(error, path) from None
            raise

    def _refuse_other_owner(self, book: str) -> None:
        if not self.history.seq:
            return
        if self.history.hospital != self.hospital:
            raise PrivacyError("LEDGER_OWNER", f"it belongs to {self.history.hospital!r}", self.path.name)
        if self.history.signing_key != self._signing.public_key().public_bytes_raw().hex():
            raise PrivacyError("LEDGER_OWNER", "it is signed with another key than this hospital's", self.path.name)
        if self.history.book != book:
            raise PrivacyError("LEDGER_BOOK", "it was begun under another budget book", self.path.name)

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

    def open_study(self, study: str, terms: Terms) -> None:
        """Record the terms of a study, and the versions of the accountants and of this code.

        Opening again under the same terms writes nothing, unless a round's test failed: then somebody has looked into
        it. A new ceiling, version or set of patients is recorded; a new delta is refused (LEDGER_STATE), and so is a
        closed study.

        Args:
            study: its hash, 64 hex digits.
        """
        recorded = next((r.body for r in reversed(self.records) if (r.kind, r.body["study"]) == ("open", study)), {})
        fields = terms.fields() | {"versions": _versions()}
        changed = any(recorded.get(name) != value for name, value in fields.items())
        if changed or self.history.is_closed(study) or self.history.proof_failed(study):
            self._append("open", study, **fields)

    def reserve(self, study: str, round: int, events: Sequence[TrainingSteps]) -> int:
        """Write down what a round is about to do, before any patient's data is touched.

        The budget is not checked here but in `budget.Budget.reserve`, which calls this.

        Returns:
            The number of the record, for `charge` or `void`.
        """
        seq = self._append("reserve", study, round=round, events=[event_fields(event) for event in events])
        self._own_reservations.add(seq)
        return seq

    def charge(
        self, reservation: int, *steps_done: int, noise_source: str, checks: Mapping[str, str], code: str
    ) -> None:
        """Settle a reservation of this process with the steps really done: one number for each event.

        Fewer steps than reserved are only right where training stopped for a reason that does not depend on
        the data.

        Args:
            noise_source: the `name` of the random source that made the noise.
            checks: what the round's tests said, one verdict for each of `records.CHECKS`.
            code: SHA-256 over the source of the package that ran, 64 hex digits.
        """
        fields = {"steps": list(steps_done), "noise_source": noise_source, "checks": dict(checks), "code": code}
        self._settle("charge", reservation, **fields)

    def void(self, reservation: int, reason: str) -> None:
        """Take back a reservation of this process. Only where NO patient's data was touched.

        Args:
            reason: one line of at most 200 characters that names no patient.
        """
        self._settle("void", reservation, reason=reason)

    def release(self, study: str, *, round: int, attempt: int, sha256: str, size: int) -> None:
        """Record an update before it leaves the hospital.

        Args:
            sha256, size: of the encrypted payload.

        Raises:
            PrivacyError: LEDGER_STATE, nothing is spent for that round.
        """
        self._append("release", study, round=round, attempt=attempt, what="update", sha256=sha256, bytes=size)

    def anchor(self, study: str, *, round: int, certificate: str, heads: Mapping[str, tuple[int, str]]) -> None:
        """Record how long every hospital's ledger was in a round's certificate.

        Args:
            certificate: SHA-256 of its signed bytes.
            heads: signing key -> number and hash of the newest record.
        """
        named = {key: [seq, head] for key, (seq, head) in heads.items()}
        self._append("anchor", study, round=round, certificate=certificate, heads=named)

    def rotate(self, study: str, *, epoch: int, key_id: str, members: Sequence[str]) -> None:
        """Record that sums are opened with another key from now on; the same epoch again writes nothing."""
        if epoch != self.history.key_epoch(study):
            self._append("rotate", study, epoch=epoch, key_id=key_id, members=list(members))

    def override(self, *, ledgers: Sequence[str], reason: str, owner_key: str, owner_signature: str) -> None:
        """Record that the data owner allows this ledger beside those others of the same patients."""
        self._append(
            "override",
            None,
            ledgers=list(ledgers),
            reason=reason,
            owner_key=owner_key,
            owner_signature=owner_signature,
        )

    def close_study(self, study: str) -> None:
        """End a study: nothing can be recorded for it any more, and what was spent stays spent."""
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
        line = encode(body, self._signing)
        self.history.refuse(body)
        self._write(line)
        # What counts from now on is what a reader of the line will see.
        self.history.add(Record(json.loads(line)["body"], line_hash(line)))
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


def _versions() -> dict[str, str]:
    """Versions of Python, this code and the accountants, without importing them."""
    versions = {"python": platform.python_version()}
    for package in ("fedmedgan", "dp-accounting", "opacus"):
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def _unwritable(error: OSError, path: Path) -> PrivacyError:
    return PrivacyError("LEDGER_WRITE", f"{error.strerror or type(error).__name__}", path.name)
