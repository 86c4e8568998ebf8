"""Key epochs as the coordinator sees them: it asks a hospital for a key, and carries wrapped keys that it cannot open.

    EpochOpen -> leader      leader -> KeyOffer + one wrapped key a member     kept in the journal
    KeyGrant  -> member      member -> KeyReady
    EpochStart -> member     member -> Present

The first epoch needs every hospital that has not left; a later one at least three, and the others get their wrapped key
from the journal when they come back. A leader that fails is followed by the next hospital in the order of the roster,
with the next number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from fedmedgan.server.journal import EpochRow, Journal
from fedmedgan.server.wire import NoAnswer, reason, sent
from fedmedgan.shared import crash
from fedmedgan.shared.errors import FedMedGanError, MessageError, RunError
from fedmedgan.shared.eventlog import EventLog
from fedmedgan.shared.messages import (
    Envelope,
    EpochOpen,
    EpochStart,
    Header,
    KeyGrant,
    KeyOffer,
    KeyReady,
    Present,
    open_shown,
    split_parts,
)
from fedmedgan.shared.study import MIN_SITES, Study

Ask = Callable[[Mapping[str, tuple[Header, bytes]]], Iterator[tuple[str, Envelope | NoAnswer]]]
"""Sends a message of this ceremony to each hospital, and yields the answers."""


@dataclass
class Member:
    """What the coordinator knows of a hospital that is there."""

    node: int
    applied: int
    """Round that it has applied."""
    epoch: int


class KeyCeremony:
    """The coordinator's side. It never sees a key."""

    def __init__(self, study: Study, journal: Journal, log: EventLog, ask: Ask) -> None:
        self.study, self.journal, self.log, self.ask = study, journal, log, ask

    def members(self) -> tuple[str, ...]:
        """Hospitals of the study that have not left, sorted."""
        return tuple(sorted(site.name for site in self.study.sites if site.name not in self.journal.leaves()))

    def due(self, next_round: int) -> bool:
        """Must there be a new key before this round?"""
        current = self.journal.current_epoch()
        if current is None or current.members != self.members() or self.journal.rotation_requested():
            return True
        every = self.study.secure_sum.rotate_every
        return every > 0 and next_round >= current.since_round + every

    def renew(self, present: Mapping[str, Member], next_round: int) -> EpochRow:
        """Make a new key epoch with the hospitals that are there.

        Raises:
            RunError: RUN_QUORUM, no leader or too few members.
        """
        members, problems = self.members(), dict[str, str]()
        missing = [name for name in members if name not in present]
        if missing and self.journal.current_epoch() is None:
            what = f"the first key needs every hospital; not there: {', '.join(missing)}"
            raise RunError("RUN_QUORUM", what, "key epoch")
        # one that is behind needs older keys first: it gets this one when it has caught up
        able = [name for name in members if name in present and present[name].applied == next_round - 1]
        newest = max([self.journal.newest_number(), *(member.epoch for member in present.values())])
        for turn in range(len(members)):
            number, leader = newest + 1 + turn, members[(newest + turn) % len(members)]
            if leader in able:
                try:
                    offer = self._offer(number, leader, members)
                    self._confirm(offer, able)
                    return self._seal(offer, next_round)
                except (FedMedGanError, NoAnswer) as problem:
                    problems[leader] = reason(problem)
                    self.log.write("epoch_failed", epoch=number, leader=leader, reason=reason(problem))
        why = "; ".join(f"{name}: {code}" for name, code in problems.items()) or "no hospital is there"
        raise RunError("RUN_QUORUM", f"the hospitals did not agree on a key ({why})", "key epoch")

    def bring_up(self, names: list[str], row: EpochRow) -> Iterator[tuple[str, Present | NoAnswer]]:
        """Let hospitals use an epoch: those that were not there when it was made get their wrapped key now."""
        offer = self._stored_offer(row.number)
        lacking = [name for name in names if name not in self.journal.readies(row.number)]
        failed = self._grant(offer, lacking) if lacking else {}
        for name, problem in failed.items():
            yield name, NoAnswer(reason(problem))
        ready = tuple(self.journal.readies(row.number).values())
        start = EpochStart(study=self.study.hash, epoch=row.number, key_id=row.key_id, ready=ready)
        for name, answer in self.ask({name: (start, b"") for name in names if name not in failed}):
            yield name, self._present(name, answer)

    # ---- the steps

    def _offer(self, number: int, leader: str, members: tuple[str, ...]) -> KeyOffer:
        leaves = tuple(self.journal.leaves().values())
        opened = EpochOpen(study=self.study.hash, epoch=number, leader=leader, members=members, leaves=leaves)
        for _, answer in self.ask({leader: (opened, b"")}):
            envelope = sent(answer)
            offer = envelope.open(KeyOffer, self.study)
            blobs = split_parts(envelope.payload)
            listed = {w.hospital: w.sha256 for w in offer.wrapped}
            given = {name: hashlib.sha256(blob).hexdigest() for name, blob in zip(offer.members, blobs, strict=False)}
            agreed = (offer.hospital, offer.epoch, offer.members) == (leader, number, members)
            if not agreed or listed != given or set(given) != set(members) or len(blobs) != len(members):
                raise MessageError("MSG_FORMAT", "the offer is not what was asked for", "KeyOffer")
            self.journal.store_offer(number, leader, envelope.shown(), dict(zip(members, blobs, strict=True)))
            return offer
        raise NoAnswer("RUN_NODE")

    def _stored_offer(self, number: int) -> KeyOffer:
        signed = self.journal.offer(number)
        if signed is None:
            raise RunError("RUN_JOURNAL", f"the journal does not hold the key offer {number}", "journal.db")
        return open_shown(KeyOffer, signed, self.study)

    def _confirm(self, offer: KeyOffer, present: list[str]) -> None:
        """Every member that is there takes the key; the first epoch waits for all of them."""
        failed = self._grant(offer, present)
        confirmed = [name for name in present if name not in failed]
        first = self.journal.current_epoch() is None
        if len(confirmed) < (len(offer.members) if first else MIN_SITES):
            why = ", ".join(f"{name}: {reason(problem)}" for name, problem in failed.items()) or "not there"
            what = f"{len(confirmed)} of {len(offer.members)} hospitals have the key ({why})"
            raise RunError("RUN_QUORUM", what, "key epoch")

    def _grant(self, offer: KeyOffer, names: list[str]) -> dict[str, Exception]:
        """Give each its wrapped key; returns what went wrong, by hospital."""
        shown = self.journal.offer(offer.epoch)
        failed = dict[str, Exception]()
        leaves = tuple(leave for name, leave in self.journal.leaves().items() if name not in offer.members)
        requests: dict[str, tuple[Header, bytes]] = {}
        for name in names:
            blob = self.journal.blob(offer.epoch, name)
            if shown is None or blob is None:
                failed[name] = NoAnswer("KEY_EPOCH")
                continue
            grant = KeyGrant(
                study=self.study.hash,
                recipient=name,
                offer=shown,
                leaves=leaves,
                payload_bytes=len(blob),
                payload_sha256=hashlib.sha256(blob).hexdigest(),
            )
            requests[name] = (grant, blob)
        for name, answer in self.ask(requests):
            try:
                envelope = sent(answer)
                ready = envelope.open(KeyReady, self.study)
                if (ready.hospital, ready.epoch, ready.key_id) != (name, offer.epoch, offer.key_id):
                    raise MessageError("MSG_KEY", "the confirmation is of another key", "KeyReady")
                self.journal.note_ready(offer.epoch, name, envelope.shown())
            except (FedMedGanError, NoAnswer) as problem:
                failed[name] = problem
        return failed

    def _seal(self, offer: KeyOffer, next_round: int) -> EpochRow:
        self.journal.seal_epoch(offer.epoch, offer.key_id, offer.members, next_round)
        crash.point("server.epoch-sealed")
        self.log.write("epoch_opened", epoch=offer.epoch, leader=offer.hospital, members=offer.members)
        current = self.journal.current_epoch()
        assert current is not None
        return current

    def _present(self, name: str, answer: Envelope | NoAnswer) -> Present | NoAnswer:
        try:
            present = sent(answer).open(Present, self.study)
        except (FedMedGanError, NoAnswer) as problem:
            return NoAnswer(reason(problem))
        return present if present.hospital == name else NoAnswer("MSG_SENDER")
