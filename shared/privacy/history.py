"""The verified records of one ledger, and what follows from them: what was spent, and who has seen it.

    case                                             result
    last line without its newline                    never acknowledged: `torn_bytes` tells of it
    last newline altered, any other byte altered     LEDGER_CORRUPT or LEDGER_SIGNATURE
    a line dropped, swapped, doubled, put in         LEDGER_CORRUPT
    a file that is no ledger                         LEDGER_CORRUPT
    lines of another hospital, or of another ledger  LEDGER_OWNER, LEDGER_CORRUPT
    charge for more steps than reserved              LEDGER_STATE
    release of a round for which nothing is spent    LEDGER_STATE
    void of a round of which an update was released  LEDGER_STATE

Every line holds the hash of the line before, signature included, so the signature of the last line vouches for the
whole file: `verify` checks that one. `fedmedgan audit verify` checks every one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedmedgan.shared.errors import PrivacyError
from fedmedgan.shared.privacy.events import TrainingSteps, merge
from fedmedgan.shared.privacy.records import (
    LINE_START,
    Record,
    Terms,
    decode,
    events_of,
    failed_checks,
    is_signed,
    line_hash,
)

NOTHING = "0" * 64
"""What the first record names as its predecessor."""
MAX_TAIL = 1 << 20
"""A record is far smaller, so a longer piece without a newline is not a torn write."""
_OF_NO_STUDY = ("begin", "override", "tail_repaired")


class History:
    """Verified records in their order, and what follows from them."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.torn_bytes = 0
        """Bytes after the last complete line: a write that was never acknowledged, or that is under way."""
        self.overrides: list[dict[str, Any]] = []
        """Bodies of `override` records."""
        self.peers: dict[str, tuple[int, str]] = {}
        """signing key -> number and hash of the newest record of that hospital's ledger, as certificates told."""
        self._opened: dict[str, dict[str, Any]] = {}
        self._closed: set[str] = set()
        self._unsettled: dict[int, dict[str, Any]] = {}
        self._charged: list[tuple[str, TrainingSteps]] = []
        self._steps: dict[tuple[str, int], int] = {}
        self._released: set[tuple[str, int]] = set()
        self._epochs: dict[str, int] = {}
        self._unproven: set[str] = set()

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
        return self._first("hospital")

    @property
    def ledger_id(self) -> str:
        """Random name of this ledger, 64 hex digits."""
        return self._first("ledger")

    @property
    def signing_key(self) -> str:
        """The key that the ledger says it is signed with. Compare it with the hospital's, from the study."""
        return self._first("signing_key")

    @property
    def book(self) -> str:
        """Public id of the budget book under which the ledger was begun."""
        return self._first("book")

    def _first(self, field: str) -> str:
        return self.records[0].body[field] if self.records else ""

    @property
    def studies(self) -> tuple[str, ...]:
        """Hashes of all studies that were ever opened here, in that order."""
        return tuple(self._opened)

    def spent(self, study: str | None = None) -> list[TrainingSteps]:
        """Everything that counts as done: charged steps, and every unsettled reservation in full.

        Args:
            study: hash of one study; all studies of this ledger by default.
        """
        reserved = [(b["study"], event) for b in self._unsettled.values() for event in events_of(b)]
        return merge(event for name, event in self._charged + reserved if study in (None, name))

    def terms(self, study: str) -> Terms | None:
        """The latest terms of a study; None where it was never opened."""
        body = self._opened.get(study)
        return Terms.of(body) if body else None

    @property
    def total_ceiling(self) -> float:
        """The newest ceiling over all studies; infinite where no study was ever opened."""
        opened = (record.body for record in reversed(self.records) if record.kind == "open")
        return next((float(body["total_ceiling"]) for body in opened), math.inf)

    def is_closed(self, study: str) -> bool:
        """Whether nothing can be recorded for the study any more."""
        return study in self._closed

    def key_epoch(self, study: str) -> int:
        """The latest key epoch of a study on record; 0 if none is."""
        return self._epochs.get(study, 0)

    def proof_failed(self, study: str) -> bool:
        """Whether a test of the study's latest charged round failed, and the study was not opened again since."""
        return study in self._unproven

    def refuse(self, body: Mapping[str, Any]) -> None:
        """Raise LEDGER_STATE where a new record does not fit what came before."""
        kind, study = body["kind"], body["study"]
        if (kind == "begin") != (self.seq == 0):
            raise _state(f"{kind}: a ledger has one record `begin`, its first", body)
        if kind in _OF_NO_STUDY:
            return
        if study in self._closed:
            raise _state(f"{kind}: the study is closed", body)
        opened = self._opened.get(study)
        if kind == "open":
            if opened and opened["delta"] != body["delta"]:
                raise _state("open: the study was opened with another delta", body)
        elif opened is None:
            raise _state(f"{kind}: the study was never opened", body)
        if kind in ("charge", "void"):
            self._refuse_settling(body)
        if kind == "release" and not self.steps_paid(study, body["round"]):
            raise _state("release: nothing is spent for that round", body)
        if kind == "rotate" and body["epoch"] <= self.key_epoch(study):
            raise _state("rotate: the key epoch is not a later one", body)

    def steps_paid(self, study: str, round: int) -> int:
        """The most steps that one reservation of a round paid for: those charged, or all where it is unsettled."""
        place = (study, round)
        waiting = [_steps(b) for b in self._unsettled.values() if (b["study"], b["round"]) == place]
        return max([self._steps.get(place, 0), *waiting])

    def _refuse_settling(self, body: Mapping[str, Any]) -> None:
        kind, reserved = body["kind"], self._unsettled.get(body["reserve"])
        if reserved is None or reserved["study"] != body["study"]:
            raise _state(f"{kind}: record {body['reserve']} is no open reservation of this study", body)
        if kind == "void" and (reserved["study"], reserved["round"]) in self._released:
            raise _state("void: an update of that round was released", body)
        if kind == "charge":
            limits = [event.steps for event in events_of(reserved)]
            if len(body["steps"]) != len(limits):
                raise _state("charge: another number of events than reserved", body)
            if any(done > limit for done, limit in zip(body["steps"], limits, strict=True)):
                raise _state("charge: more steps than reserved", body)

    def add(self, record: Record) -> None:
        """Take in a record that `refuse` let through."""
        body, study = record.body, record.body["study"]
        match record.kind:
            case "open":
                self._opened[study] = body
                self._unproven.discard(study)
            case "close":
                self._closed.add(study)
            case "reserve":
                self._unsettled[record.seq] = body
            case "void":
                del self._unsettled[body["reserve"]]
            case "charge":
                reserved = self._unsettled.pop(body["reserve"])
                done = zip(events_of(reserved), body["steps"], strict=True)
                self._charged += [(study, event.with_steps(steps)) for event, steps in done]
                place = (study, reserved["round"])
                self._steps[place] = max(self._steps.get(place, 0), sum(body["steps"]))
                if failed_checks(body["checks"]):
                    self._unproven.add(study)
            case "release":
                self._released.add((study, body["round"]))
            case "anchor":
                self.peers |= {key: (seq, head) for key, (seq, head) in body["heads"].items()}
            case "rotate":
                self._epochs[study] = body["epoch"]
            case "override":
                self.overrides.append(body)
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


def read(path: Path) -> History:
    """Verify a ledger without locking or changing it; `torn_bytes` tells of an unfinished last line.

    Raises:
        PrivacyError: LEDGER_CORRUPT, LEDGER_SIGNATURE, LEDGER_STATE, LEDGER_OWNER (two hospitals),
            LEDGER_WRITE (unreadable).
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        what = error.strerror or type(error).__name__
        raise PrivacyError("LEDGER_WRITE", what, path.name, hint="give a ledger that can be read") from None
    return verify(raw, path.name)


def verify(raw: bytes, name: str) -> History:
    """Check form, chain, order and the last signature of a ledger's bytes. Errors as `read`, which calls it."""
    history, lines = History(), complete_lines(raw)
    for line in lines:
        where = f"{name} record {history.seq + 1}"
        body = decode(line, where)
        if body["seq"] != history.seq + 1 or body["prev"] != history.head:
            raise PrivacyError("LEDGER_CORRUPT", "the chain is broken", where)
        if body["seq"] == len(lines) and not is_signed(line, history.signing_key or body.get("signing_key", "")):
            raise PrivacyError("LEDGER_SIGNATURE", "the ledger's key did not sign this", where)
        if history.records and body["hospital"] != history.hospital:
            raise PrivacyError("LEDGER_OWNER", "records of two hospitals in one ledger", where)
        history.refuse(body)
        history.add(Record(body, line_hash(line)))
    tail = raw[raw.rfind(b"\n") + 1 :]
    if tail:
        _refuse_strange_tail(tail, f"{name} record {history.seq + 1}")
    history.torn_bytes = len(tail)
    return history


def complete_lines(raw: bytes) -> list[bytes]:
    """The lines that end with a newline, with it."""
    return [line + b"\n" for line in raw.split(b"\n")[:-1]]


def _refuse_strange_tail(tail: bytes, where: str) -> None:
    """A torn write leaves the beginning of a line (after a power loss, zero bytes). All else is damage."""
    written = tail.rstrip(b"\0")[: len(LINE_START)]
    torn = len(tail) <= MAX_TAIL and LINE_START.startswith(written)
    if torn:
        with suppress(PrivacyError):
            decode(tail[:-1] + b"\n", where)
            torn = False  # a whole record whose newline was altered: it may have been acknowledged
    if not torn:
        raise PrivacyError("LEDGER_CORRUPT", "the last line is damaged", where)


def _steps(reserve: Mapping[str, Any]) -> int:
    return sum(event["steps"] for event in reserve["events"])


def _state(what: str, body: Mapping[str, Any]) -> PrivacyError:
    return PrivacyError("LEDGER_STATE", what, f"record {body['seq']}")
