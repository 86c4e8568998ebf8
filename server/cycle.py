"""The four-phase cycle as the coordinator sees it. It holds the study, opaque sums and no key of any kind.

case                                   what happens
a hospital fails, refuses or is late   left out; the others seal the same update for the smaller cohort
it comes back                          it is sent the sums that it missed, then takes part again
fewer than three hospitals are left    the run stops, RUN_QUORUM
... because the budgets are spent      the cycle ends here, as agreed
two hospitals report different models  the run stops, MODEL_DIVERGED
the generator's loss has settled       the run ends before its last round
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from flwr.app import Message
from flwr.serverapp import Grid

from fedmedgan.server.aggregation import RoundSum
from fedmedgan.shared.errors import FedMedGanError, MessageError, ModelError, RunError
from fedmedgan.shared.eventlog import EventLog
from fedmedgan.shared.messages import Applied, Certificate, Envelope, Present, Refusal, Roll, RoundOpen, parse
from fedmedgan.shared.secure_sum.proof import update_blobs
from fedmedgan.shared.study import MIN_SITES, Study

K = TypeVar("K")

BROADCAST_WINDOW = 4
"""Sums under way at once: memory does not grow with the number of hospitals."""
POLL_SECONDS = 0.05
ROLL_SECONDS = 120.0
"""A node that is online and does not say who it is holds nobody up for longer."""
MAX_REPLY_BYTES = 4 << 30


class Coordinator:
    """Runs one study over a Flower grid.

    Args:
        folder: the coordinator's own folder; ``sums/`` in it keeps the encrypted sum of each round for latecomers.
    """

    def __init__(self, grid: Grid, study: Study, folder: Path) -> None:
        self.grid, self.study, self.folder = grid, study, folder
        self.log = EventLog(folder / "events.jsonl")
        self.nodes: dict[str, int] = {}
        self.applied: dict[str, int] = {}
        self.model_hashes: dict[int, str] = {}
        """round -> hash of the model that every hospital holds after it"""
        self.key_id, self.parameters = "", 0

    def run(self) -> None:
        """All rounds.

        Raises:
            RunError: RUN_QUORUM.
            ModelError: MODEL_DIVERGED.
        """
        self._call_roll(wait=True)
        self.log.write(
            "run_opened",
            study_hash=self.study.hash,
            sites=sorted(self.nodes),
            parameters=self.parameters,
            float32_bytes=4 * self.parameters,
        )
        losses: list[float] = []
        first = 1 + max(self.applied.values(), default=0)
        reason, number = "failed", first - 1
        try:
            for number in range(first, self.study.training.rounds + 1):
                losses.append(self.round(number))
                if self._converged(losses):
                    reason = "converged"
                    break
            else:
                reason = "rounds"
        except _BudgetSpent:
            reason, number = "budget", number - 1
        except RunError:
            reason, number = "quorum", number - 1
            raise
        finally:
            self.log.write("run_closed", rounds=number, reason=reason, model_hash=self.model_hashes.get(number, ""))

    def round(self, number: int) -> float:
        """One round of the cycle; returns the cohort's mean generator loss."""
        self._call_roll()
        self._catch_up(number)
        cohort = tuple(sorted(name for name in self.nodes if self.applied[name] == number - 1))
        certificate, payload, loss = self._collect(number, cohort)
        began = time.perf_counter()
        refused = self._broadcast(certificate, payload, list(self.nodes))
        holders = sorted(name for name in self.nodes if self.applied[name] == number)
        if len(holders) < MIN_SITES:
            reasons = ", ".join(sorted(set(refused)))
            raise RunError("RUN_QUORUM", f"{len(holders)} hospitals applied round {number} ({reasons})", "round")
        self.log.write(
            "round_applied",
            round=number,
            sites=holders,
            model_hash=self.model_hashes.get(number, ""),
            generator_loss=loss,
            seconds={"broadcast": time.perf_counter() - began},
        )
        return loss

    # ---- phases 1 and 2

    def _collect(self, number: int, cohort: tuple[str, ...]) -> tuple[Certificate, bytes, float]:
        """Open the round, add what arrives; where somebody is missing, a further attempt with the rest.

        Returns the certificate, the encrypted sum and the cohort's mean generator loss.
        """
        missing: dict[str, str] = {s.name: "not there" for s in self.study.sites if s.name not in cohort}
        for attempt in range(1, len(self.study.sites) + 1):
            if len(cohort) < MIN_SITES:
                if set(missing.values()) == {"BUDGET_EXHAUSTED"}:
                    raise _BudgetSpent
                why = "; ".join(f"{name}: {reason}" for name, reason in sorted(missing.items()))
                what = f"{len(cohort)} of {len(self.study.sites)} hospitals are left in round {number} ({why})"
                raise RunError("RUN_QUORUM", what, "round")
            opened = RoundOpen(study=self.study.hash, round=number, attempt=attempt, cohort=cohort, key_id=self.key_id)
            self.log.write("round_opened", round=number, attempt=attempt, cohort=cohort)
            blobs = update_blobs(self.study, self.parameters)
            total = RoundSum(self.study, opened, blobs, self.model_hashes[number - 1])
            began, adding = time.perf_counter(), 0.0
            message = Envelope.seal(opened)
            for name, answer in self._ask({n: (self.nodes[n], message) for n in cohort}, "train"):
                start = time.perf_counter()
                try:
                    update = total.add(self._accepted(name, answer))
                except (FedMedGanError, _NoAnswer) as problem:
                    self._missing(number, attempt, name, problem)
                    missing[name] = _reason(problem)
                    continue
                adding += time.perf_counter() - start
                self.log.write(
                    "update_accepted",
                    round=number,
                    attempt=attempt,
                    site=name,
                    bytes_up=update.payload_bytes,
                    generator_loss=update.generator_loss,
                )
            survivors = tuple(sorted(total.signed))
            if survivors == cohort:
                certified = time.perf_counter()
                certificate, payload = total.certify()
                self._store(certificate, payload)
                adding += time.perf_counter() - certified
                self.log.write(
                    "round_aggregated",
                    round=number,
                    attempt=attempt,
                    cohort=cohort,
                    bytes_down=len(payload),
                    seconds={"local": certified - began, "aggregation": adding},
                )
                return certificate, payload, sum(total.losses) / len(total.losses)
            cohort = survivors
        raise RunError("RUN_QUORUM", f"no attempt of round {number} was complete", "round")

    def _missing(self, number: int, attempt: int, name: str, problem: Exception) -> None:
        self.log.write("site_missing", round=number, attempt=attempt, site=name, reason=_reason(problem))

    # ---- phase 3

    def _broadcast(self, certificate: Certificate, payload: bytes, names: list[str]) -> list[str]:
        """Send a sum to hospitals and hear which model they hold then. Returns the reasons of those who do not."""
        refused = []
        message = Envelope.seal(certificate, payload=payload)
        for start in range(0, len(names), BROADCAST_WINDOW):
            window = {n: (self.nodes[n], message) for n in names[start : start + BROADCAST_WINDOW]}
            for name, answer in self._ask(window, "train.apply"):
                try:
                    self._hold(name, self._accepted(name, answer).open(Applied, self.study), certificate.round)
                except (MessageError, _NoAnswer) as problem:
                    self._missing(certificate.round, certificate.attempt, name, problem)
                    refused.append(_reason(problem))
        return refused

    def _hold(self, name: str, applied: Applied, number: int) -> None:
        """Note which model a hospital holds; all must hold the same."""
        if applied.hospital != name or applied.round != number:
            raise MessageError("MSG_ROUND", "the answer is of another hospital or round", "Applied")
        self._same_model(name, number, applied.model_hash)
        self.applied[name] = number

    def _same_model(self, name: str, number: int, model_hash: str) -> None:
        if self.model_hashes.setdefault(number, model_hash) != model_hash:
            raise ModelError("MODEL_DIVERGED", f"{name} holds another model after round {number}", "model hash")

    def _catch_up(self, number: int) -> None:
        """Send hospitals the sums of the rounds that they missed."""
        for missed in range(1 + min(self.applied.values(), default=0), number):
            late = [name for name in self.nodes if self.applied[name] == missed - 1]
            if late:
                self._broadcast(*self._stored(missed), late)

    def _store(self, certificate: Certificate, payload: bytes) -> None:
        folder = self.folder / "sums"
        folder.mkdir(exist_ok=True)
        (folder / f"round-{certificate.round:04d}.json").write_bytes(certificate.canonical())
        (folder / f"round-{certificate.round:04d}.bin").write_bytes(payload)

    def _stored(self, number: int) -> tuple[Certificate, bytes]:
        stem = self.folder / "sums" / f"round-{number:04d}"
        return parse(stem.with_suffix(".json").read_bytes(), Certificate), stem.with_suffix(".bin").read_bytes()

    # ---- who is there

    def _call_roll(self, *, wait: bool = False) -> None:
        """Ask each unknown node once which hospital it is; `wait` until every site has answered."""
        deadline = time.monotonic() + self.study.round_timeout
        roll = Envelope.seal(Roll(study=self.study.hash))
        asked: set[int] = set()
        while True:
            online = set(self.grid.get_node_ids())
            self.nodes = {name: node for name, node in self.nodes.items() if node in online}
            unknown = online - set(self.nodes.values()) - asked
            asked |= unknown
            for node, answer in self._ask({node: (node, roll) for node in unknown}, "query", ROLL_SECONDS):
                try:
                    self._enrol(node, self._accepted("", answer).open(Present, self.study))
                except (MessageError, _NoAnswer) as problem:
                    self.log.write("node_refused", reason=_reason(problem))
            if not wait or len(self.nodes) == len(self.study.sites) or time.monotonic() > deadline:
                return
            time.sleep(POLL_SECONDS)

    def _enrol(self, node: int, present: Present) -> None:
        """A hospital has shown, by its signature, that it is behind this node."""
        if present.hospital in self.nodes:
            raise MessageError("MSG_SENDER", f"{present.hospital} is behind two nodes", "Present")
        holds = (present.key_id, present.parameters)
        if holds != ((self.key_id, self.parameters) if self.key_id else holds):
            raise MessageError("MSG_KEY", f"{present.hospital} holds another key or network", "Present")
        self._same_model(present.hospital, present.applied_round, present.model_hash)
        self.key_id, self.parameters = present.key_id, present.parameters
        self.nodes[present.hospital] = node
        self.applied[present.hospital] = present.applied_round

    # ---- the wire

    def _ask(
        self, requests: dict[K, tuple[int, Envelope]], message_type: str, seconds: float | None = None
    ) -> Iterator[tuple[K, Envelope | _NoAnswer]]:
        """Push one message a node, and yield each answer as soon as it is there, so that it can be forgotten.

        Args:
            seconds: how long to wait for all of them; by default the study's `round_timeout`.
        """
        pending: dict[str, K] = {}
        for key, (node, envelope) in requests.items():
            message = Message(envelope.to_record(), dst_node_id=node, message_type=message_type)
            for message_id in self.grid.push_messages([message]):
                pending[message_id] = key
        deadline = time.monotonic() + (self.study.round_timeout if seconds is None else seconds)
        while pending and time.monotonic() < deadline:
            for message_id in list(pending):  # one at a time: at most one answer is in memory here
                for answer in self.grid.pull_messages([message_id]):
                    yield pending.pop(message_id), _opened(answer)
            time.sleep(POLL_SECONDS)
        for key in pending.values():
            yield key, _NoAnswer("RUN_TIMEOUT")

    def _accepted(self, name: str, answer: Envelope | _NoAnswer) -> Envelope:
        """An answer that is not a no. A no counts only when it is signed by the hospital that was asked."""
        if isinstance(answer, _NoAnswer):
            raise answer
        if answer.kind == Refusal.__name__:
            refusal = answer.open(Refusal, self.study)
            raise _NoAnswer(refusal.code if refusal.hospital == name else "MSG_SENDER")
        return answer

    def _converged(self, losses: list[float]) -> bool:
        """Has the generator's loss (of generated images alone) stayed within the tolerance?"""
        patience, tolerance = self.study.convergence.patience, self.study.convergence.tolerance
        recent = losses[-(patience + 1) :]
        return 0 < patience < len(losses) and max(recent) - min(recent) <= tolerance


class _BudgetSpent(Exception):
    """Too few hospitals are left because the round would break the others' budgets: the cycle ends as agreed."""


class _NoAnswer(Exception):
    """A hospital did not answer, or said no; the text is the reason's code."""


def _opened(answer: Message) -> Envelope | _NoAnswer:
    if answer.has_error():
        return _NoAnswer("RUN_NODE")
    try:
        return Envelope.from_record(answer.content, MAX_REPLY_BYTES)
    except MessageError as error:
        return _NoAnswer(error.code)


def _reason(problem: Exception) -> str:
    return problem.code if isinstance(problem, FedMedGanError) else str(problem)
