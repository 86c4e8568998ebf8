"""The four-phase cycle as the coordinator sees it. It holds the study, opaque sums and no key that opens one.

case                                   what happens
a hospital fails, refuses or is late   left out; the others seal the same update for the smaller cohort
it comes back                          it is sent the keys and sums that it missed, then takes part again
this process dies                      started again, it goes on from its journal, in the middle of a round too
an upload crashes SEAL                 only the worker process dies; that hospital is left out of the attempt
a ledger is shorter than it was        that hospital's update is refused
fewer than three hospitals are left    the run stops, RUN_QUORUM
... because the budgets are spent      the cycle ends here, as agreed
two hospitals report different models  the run stops, MODEL_DIVERGED
the generator's loss has settled       the run ends before its last round
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.serverapp import Grid

from fedmedgan.server.aggregation import RoundSum
from fedmedgan.server.journal import Journal
from fedmedgan.server.key_epochs import KeyCeremony, Member
from fedmedgan.server.wire import AWAY_SECONDS, MAX_REPLY_BYTES, POLL_SECONDS, NoAnswer, Wire, reason, sent
from fedmedgan.server.worker import WorkerSum
from fedmedgan.shared import crash
from fedmedgan.shared.agreement import Agreement
from fedmedgan.shared.errors import CryptoError, FedMedGanError, MessageError, ModelError, PrivacyError, RunError
from fedmedgan.shared.eventlog import EventLog
from fedmedgan.shared.messages import (
    Applied,
    Approval,
    Certificate,
    Envelope,
    Header,
    Leave,
    Present,
    Roll,
    RoundOpen,
    Update,
    open_certificate,
    open_shown,
)
from fedmedgan.shared.secure_sum.cipher import max_frame_bytes
from fedmedgan.shared.secure_sum.proof import update_blobs
from fedmedgan.shared.study import MIN_SITES

BROADCAST_WINDOW = 4
"""Sums under way at once: memory does not grow with the number of hospitals."""
ROLL_SECONDS = 120.0
"""A node that is online and does not say who it is holds nobody up for longer."""


class Coordinator:
    """Runs one study over a Flower grid.

    Args:
        agreement: the study with every hospital's signature.
        private: the coordinator's signing key; its public half is in the study.
        folder: the coordinator's own folder, which holds the journal.

    Raises:
        StudyError: STUDY_SIGNATURE, STUDY_KEYS. RunError: RUN_JOURNAL.
    """

    def __init__(self, grid: Grid, agreement: Agreement, private: Ed25519PrivateKey, folder: Path) -> None:
        agreement.require_all()
        self.agreement, self.study, self.private = agreement, agreement.study, private
        self.wire = Wire(grid, self.study)
        self.log = EventLog(folder / "events.jsonl")
        self.journal = Journal(folder, self.study.hash)
        self.ceremony = KeyCeremony(self.study, self.journal, self.log, self._ask_for_keys)
        self.members: dict[str, Member] = {}
        """Hospitals that are there."""
        self.parameters = 0
        self._seconds: dict[str, float] = {}

    def run(self) -> None:
        """All rounds, from wherever the journal says that the study is.

        Raises:
            RunError: RUN_QUORUM. ModelError: MODEL_DIVERGED.
        """
        with self.journal:
            self._call_roll(wait=True)
            self.log.write(
                "run_opened",
                study_hash=self.study.hash,
                sites=sorted(self.members),
                parameters=self.parameters,
                float32_bytes=4 * self.parameters,
            )
            first = 1 + max([self.journal.last_round() - 1, *(m.applied for m in self.members.values())])
            losses = [self._loss(number) for number in range(1, first)]
            self._catch_up(first)
            if first <= self.study.training.rounds and self.journal.certificate(first) is None:
                self._renew_key(first)
            why, number = "failed", first - 1
            try:
                while number < self.study.training.rounds and not self._converged(losses):
                    number += 1
                    losses.append(self.round(number))
                self._call_roll()
                self._catch_up(number + 1)  # whoever came back during the last round
                why = "converged" if self._converged(losses) else "rounds"
            except _BudgetSpent:
                why, number = "budget", number - 1
            except RunError:
                why, number = "quorum", number - 1
                raise
            finally:
                self.log.write("run_closed", rounds=number, reason=why, model_hash=self.journal.model_hash(number))

    def round(self, number: int) -> float:
        """One round of the cycle; returns the cohort's mean generator loss."""
        self._call_roll()
        self._catch_up(number)
        if self._unusable(number) or self.journal.certificate(number) is None:
            self._renew_key(number)
            self._collect(number, self.journal.attempt_under_way() or self._next_attempt(number))
        began = time.perf_counter()
        refused = self._broadcast(number, list(self.members))
        holders = sorted(name for name, member in self.members.items() if member.applied == number)
        if len(holders) < MIN_SITES:
            if not holders and "KEY_STOPPED" in refused:  # the hospitals decide whether there will be another key
                self.journal.request_rotation()
            why = ", ".join(sorted(set(refused)))
            raise RunError("RUN_QUORUM", f"{len(holders)} hospitals applied round {number} ({why})", "round")
        loss = self._loss(number)
        self.log.write(
            "round_applied",
            round=number,
            sites=holders,
            model_hash=self.journal.model_hash(number),
            generator_loss=loss,
            seconds={"broadcast": time.perf_counter() - began},
        )
        return loss

    # ---- phases 1 and 2

    def _unusable(self, number: int) -> bool:
        """Is there a sum that no hospital could use, and a new key, or the wish for one, to make another with?"""
        stored, current = self.journal.certificate(number), self.journal.current_epoch()
        if stored is None or current is None or self.journal.model_hash(number):
            return False
        return self.journal.rotation_requested() or stored[0].epoch < current.number

    def _next_attempt(self, number: int) -> RoundOpen:
        """With everybody who is ready; where there was a sum that nobody could use, with nobody new (decision 0006)."""
        epoch, stored = self._current_epoch(), self.journal.certificate(number)
        cohort = {n for n, m in self.members.items() if m.applied == number - 1 and m.epoch == epoch}
        if stored:
            cohort &= set(stored[0].cohort)
        return self._attempt(number, stored[0].attempt + 1 if stored else 1, tuple(sorted(cohort)))

    def _attempt(self, number: int, attempt: int, cohort: tuple[str, ...]) -> RoundOpen:
        row = self.journal.current_epoch()
        if row is None:
            raise RunError("RUN_JOURNAL", "no key epoch is in use", "journal.db")
        return RoundOpen(
            study=self.study.hash, round=number, attempt=attempt, cohort=cohort, epoch=row.number, key_id=row.key_id
        )

    def _collect(self, number: int, opened: RoundOpen) -> None:
        """Open the round, add what arrives; where somebody is missing, a further attempt with the rest."""
        missing: dict[str, str] = {s.name: "not there" for s in self.study.sites if s.name not in opened.cohort}
        while True:
            if len(opened.cohort) < MIN_SITES:
                if set(missing.values()) == {"BUDGET_EXHAUSTED"}:
                    raise _BudgetSpent
                why = "; ".join(f"{name}: {code}" for name, code in sorted(missing.items()))
                what = f"{len(opened.cohort)} of {len(self.study.sites)} hospitals are left in round {number} ({why})"
                raise RunError("RUN_QUORUM", what, "round")
            self.journal.open_attempt(opened)
            crash.point("server.attempt-opened")
            self.log.write("round_opened", round=number, attempt=opened.attempt, cohort=opened.cohort)
            blobs = update_blobs(self.study, self.parameters)
            self.wire.max_reply_bytes = max(MAX_REPLY_BYTES, max_frame_bytes(blobs, "update"))
            with WorkerSum(blobs) as worker:
                total = RoundSum(self.study, opened, worker, self.journal.model_hash(number - 1))
                self._gather(total, worker, missing)
                survivors = tuple(sorted(total.signed))
                if survivors == tuple(sorted(opened.cohort)):
                    self._certify(total)
                    return
            opened = self._attempt(number, opened.attempt + 1, survivors)

    def _gather(self, total: RoundSum, worker: WorkerSum, missing: dict[str, str]) -> None:
        """Everybody's update of one attempt: from the journal, and from those who still have to send it."""
        opened = total.opened
        for envelope in self.journal.accepted(opened):
            name = total.verify(envelope).hospital
            try:
                self._add(total, worker, name, envelope)
            except CryptoError as problem:
                self._missing(opened, name, problem, missing)
        began, adding = time.perf_counter(), 0.0
        message = Envelope.seal(opened, self.private)
        lacking = [name for name in opened.cohort if name not in total.signed and name not in missing]
        requests = {name: (self.members[name].node, message) for name in lacking if name in self.members}
        for name in lacking:
            if name not in requests:
                self._missing(opened, name, NoAnswer("not there"), missing)
        spare = len(opened.cohort) > MIN_SITES  # without a spare hospital, waiting is better than stopping
        away = min(AWAY_SECONDS, self.study.round_timeout) if spare else self.study.round_timeout
        for name, answer in self.wire.ask(requests, "train", seconds=self.study.round_timeout, away_seconds=away):
            start = time.perf_counter()
            try:
                update = self._accept(total, worker, name, sent(answer))
            except (FedMedGanError, NoAnswer) as problem:
                self._missing(opened, name, problem, missing)
                continue
            adding += time.perf_counter() - start
            self.log.write(
                "update_accepted",
                round=opened.round,
                attempt=opened.attempt,
                site=name,
                bytes_up=update.payload_bytes,
                generator_loss=update.generator_loss,
            )
        self._seconds = {"local": time.perf_counter() - began, "aggregation": adding}

    def _accept(self, total: RoundSum, worker: WorkerSum, name: str, envelope: Envelope) -> Update:
        """Verify, journal, add."""
        update = total.verify(envelope)
        if update.hospital != name:
            raise MessageError("MSG_SENDER", "the answer is of another hospital", "Update")
        self._check_anchor(update)
        self.journal.accept(total.opened, envelope, update)
        self._add(total, worker, name, envelope)
        return update

    def _add(self, total: RoundSum, worker: WorkerSum, name: str, envelope: Envelope) -> None:
        """An upload that crashes the worker twice is refused; the others are added again."""
        try:
            total.add(envelope)
            return
        except CryptoError as error:
            if error.code != "HE_WORKER":
                raise
        self.log.write("worker_restarted", round=total.opened.round, site=name)
        self._add_again(total, worker)
        try:
            total.add(envelope)
        except CryptoError:
            self._add_again(total, worker)
            raise

    def _add_again(self, total: RoundSum, worker: WorkerSum) -> None:
        """A new worker with everything that was counted before."""
        worker.restart()
        counted = set(total.signed)
        total.signed.clear()
        for envelope in self.journal.accepted(total.opened):
            if total.verify(envelope).hospital in counted:
                total.add(envelope)

    def _check_anchor(self, update: Update) -> None:
        """A ledger only grows.

        Raises:
            PrivacyError: LEDGER_ROLLBACK, LEDGER_FORK.
        """
        for signed in self.journal.anchors():
            known = open_shown(Update, signed, self.study)
            if known.hospital == update.hospital:
                if update.ledger_seq < known.ledger_seq:
                    raise PrivacyError("LEDGER_ROLLBACK", "the ledger is shorter than it was", update.hospital)
                if update.ledger_seq == known.ledger_seq and update.ledger_head != known.ledger_head:
                    raise PrivacyError("LEDGER_FORK", "the ledger is another one than it was", update.hospital)

    def _certify(self, total: RoundSum) -> None:
        began = time.perf_counter()
        certificate, payload = total.certify()
        self.journal.certify(certificate, payload)
        self._seconds["aggregation"] += time.perf_counter() - began
        self.log.write(
            "round_aggregated",
            round=certificate.round,
            attempt=certificate.attempt,
            cohort=certificate.cohort,
            bytes_down=len(payload),
            seconds=self._seconds,
        )

    def _missing(self, at: RoundOpen, name: str, problem: Exception, missing: dict[str, str]) -> None:
        missing[name] = reason(problem)
        self._ask_again_if_left(name, reason(problem))
        self.log.write("site_missing", round=at.round, attempt=at.attempt, site=name, reason=reason(problem))

    def _ask_again_if_left(self, name: str, code: str) -> None:
        """The next roll gets the signed Leave of a hospital that has left, so that there is a key without it."""
        if code == "RUN_LEFT":
            self.members.pop(name, None)

    # ---- phase 3

    def _broadcast(self, number: int, names: list[str]) -> list[str]:
        """Send a sum to hospitals and hear which model they hold then. Returns the reasons of those who do not."""
        certificate, payload = self._stored(number)
        refused = dict[str, str]()
        message = Envelope.seal(certificate, self.private, payload)
        for start in range(0, len(names), BROADCAST_WINDOW):
            window = {n: (self.members[n].node, message) for n in names[start : start + BROADCAST_WINDOW]}
            for name, answer in self.wire.ask(window, "train.apply", seconds=self.study.round_timeout):
                try:
                    self._hold(name, sent(answer).open(Applied, self.study), number)
                except (MessageError, NoAnswer) as problem:
                    self._missing(certificate, name, problem, refused)
                    continue
                crash.point("server.broadcast-half")
        return list(refused.values())

    def _hold(self, name: str, applied: Applied, number: int) -> None:
        """Note which model a hospital holds; all must hold the same."""
        if applied.hospital != name or applied.round != number:
            raise MessageError("MSG_ROUND", "the answer is of another hospital or round", "Applied")
        self._same_model(name, number, applied.model_hash)
        self.members[name].applied = number

    def _same_model(self, name: str, number: int, model_hash: str) -> None:
        known = self.journal.model_hash(number)
        if known and known != model_hash:
            raise ModelError("MODEL_DIVERGED", f"{name} holds another model after round {number}", "model hash")
        self.journal.note_applied(number, name, model_hash)

    def _catch_up(self, number: int) -> None:
        """Send hospitals the sums of the rounds that they missed, and the keys that those were made with."""
        for missed in range(1, number):
            late = [name for name, member in self.members.items() if member.applied == missed - 1]
            if late:
                self._bring_up(self._stored(missed)[0].epoch, late)
                self._broadcast(missed, late)

    def _stored(self, number: int) -> tuple[Certificate, bytes]:
        stored = self.journal.certificate(number)
        if stored is None:
            raise RunError("RUN_JOURNAL", f"the journal does not hold the sum of round {number}", "journal.db")
        return stored

    # ---- keys

    def _current_epoch(self) -> int:
        row = self.journal.current_epoch()
        return row.number if row else 0

    def _renew_key(self, next_round: int) -> None:
        """A new key epoch where one is due, never in the middle of a round; and everybody who is there uses it."""
        if self.journal.attempt_under_way() is None and self.ceremony.due(next_round):
            self.ceremony.renew(self.members, next_round)
        current = self._current_epoch()
        self._bring_up(current, [name for name, m in self.members.items() if m.applied == next_round - 1])

    def _bring_up(self, number: int, names: list[str]) -> None:
        """Let hospitals use a key epoch that they do not have yet."""
        row = next((row for row in self.journal.epochs() if row.number == number), None)
        behind = [name for name in names if self.members[name].epoch < number]
        if row is None or not behind:
            return
        for name, answer in self.ceremony.bring_up(behind, row):
            if isinstance(answer, Present):
                self.members[name].epoch = answer.epoch
            else:
                self.log.write("node_refused", site=name, reason=str(answer))
                self._ask_again_if_left(name, str(answer))

    def _ask_for_keys(self, requests: Mapping[str, tuple[Header, bytes]]) -> Iterator[tuple[str, Envelope | NoAnswer]]:
        sealed = {
            name: (self.members[name].node, Envelope.seal(header, self.private, payload))
            for name, (header, payload) in requests.items()
        }
        yield from self.wire.ask(sealed, "train.key", seconds=self.study.round_timeout)

    # ---- who is there

    def _call_roll(self, *, wait: bool = False) -> None:
        """Ask each unknown node once which hospital it is; `wait` until every hospital has answered."""
        patience = self.study.round_timeout if not self._current_epoch() else AWAY_SECONDS
        deadline = time.monotonic() + min(patience, self.study.round_timeout)
        approvals = tuple(Approval(hospital=n, signature=s) for n, s in sorted(self.agreement.signatures.items()))
        roll = Roll(study=self.study.hash, approvals=approvals, anchors=self.journal.anchors())
        message = Envelope.seal(roll, self.private)
        asked, pause = set[int](), POLL_SECONDS
        while True:
            online = self.wire.online()
            self.members = {name: member for name, member in self.members.items() if member.node in online}
            unknown = online - {member.node for member in self.members.values()} - asked
            asked |= unknown
            for node, answer in self.wire.ask({n: (n, message) for n in unknown}, "query", seconds=ROLL_SECONDS):
                try:
                    self._enrol(node, sent(answer))
                except (MessageError, NoAnswer) as problem:
                    self.log.write("node_refused", reason=reason(problem))
                    if reason(problem) in ("RUN_NODE", "RUN_TIMEOUT"):  # not a no
                        asked, pause = asked - {node}, min(60.0, 1.0 + 2 * pause)
            answered = len(asked) >= len(self.ceremony.members())  # whoever refused will not be there by waiting
            if not wait or answered or time.monotonic() > deadline:
                return
            time.sleep(pause)

    def _enrol(self, node: int, answer: Envelope) -> None:
        """A hospital has shown, by its signature, that it is behind this node."""
        if answer.kind == Leave.__name__:
            leave = answer.open(Leave, self.study)
            self.journal.note_leave(leave.hospital, answer.shown())
            self.log.write("site_left", site=leave.hospital)
            return
        present = answer.open(Present, self.study)
        if present.hospital in self.members:
            raise MessageError("MSG_SENDER", f"{present.hospital} is behind two nodes", "Present")
        if self.parameters and present.parameters != self.parameters:
            raise MessageError("MSG_KEY", f"{present.hospital} holds another network", "Present")
        self._same_model(present.hospital, present.applied_round, present.model_hash)
        self.parameters = present.parameters
        self.members[present.hospital] = Member(node, present.applied_round, present.epoch)

    # ---- what the phases share

    def _loss(self, number: int) -> float:
        """Mean generator loss of the cohort of a round, from its certificate."""
        stored = self.journal.certificate(number)
        return fmean(u.generator_loss for u in open_certificate(stored[0], self.study).values()) if stored else 0.0

    def _converged(self, losses: list[float]) -> bool:
        """Has the generator's loss (of generated images alone) stayed within the tolerance?"""
        patience, tolerance = self.study.convergence.patience, self.study.convergence.tolerance
        recent = losses[-(patience + 1) :]
        return 0 < patience < len(losses) and max(recent) - min(recent) <= tolerance


class _BudgetSpent(Exception):
    """Too few hospitals are left because the round would break the others' budgets: the cycle ends as agreed."""
