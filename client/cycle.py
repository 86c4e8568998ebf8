"""The four-phase cycle as one hospital sees it: phase 1 (`local_update`) and phases 3 and 4 (`apply_sum`).

    reserve -> read -> train -> store the update -> charge -> seal -> store the message -> send -> (sum) -> model

Each arrow is a place where the process may die (shared/crash.py). What was reserved is spent; what was stored is sent
again byte for byte; nothing is trained twice for one reservation; a model is written once, whole, with its round.
"""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import rfc8785

from fedmedgan.client import anchors, checkpoint
from fedmedgan.client.home import KEPT, Home
from fedmedgan.client.joining import (
    ADAM_STATES,
    ATTEMPT,
    CERTIFICATES,
    LEFT,
    NOISE,
    OUTBOX,
    SIGN_AGAIN,
    keep,
)
from fedmedgan.client.key_epochs import KeyEpochs
from fedmedgan.client.shared_model import part, shared_part
from fedmedgan.client.training.local_round import LocalTrainer, Losses, PatientSampler
from fedmedgan.client.training.randomness import RandomSource
from fedmedgan.shared import crash
from fedmedgan.shared.errors import (
    CryptoError,
    FedMedGanError,
    MessageError,
    ModelError,
    PrivacyError,
    RunError,
    StudyError,
)
from fedmedgan.shared.messages import (
    MAX_LOSS,
    ROUND_FIELDS,
    Applied,
    Certificate,
    Envelope,
    EpochOpen,
    EpochStart,
    KeyGrant,
    Leave,
    Present,
    Roll,
    RoundOpen,
    Signed,
    Update,
    open_certificate,
)
from fedmedgan.shared.privacy.events import TrainingSteps
from fedmedgan.shared.privacy.history import History
from fedmedgan.shared.privacy.ledger import Ledger
from fedmedgan.shared.privacy.records import failed_checks
from fedmedgan.shared.secure_sum import cipher, masks, proof
from fedmedgan.shared.secure_sum.keys import HospitalKeys
from fedmedgan.shared.source import source_hash

ADAM, TURNS = "adam.", "turns"
"""In the file of a hospital's own states, beside KEPT: Adam's; the generator's turns."""


@dataclass(frozen=True)
class _Trained:
    """What one round of local training gave."""

    losses: Losses
    update_P: np.ndarray
    """New shared weights minus old ones, float32."""
    states: checkpoint.Arrays
    """What the next round goes on from."""
    checks: dict[str, str]
    method: str
    private_steps: int
    """That were taken, counted one by one."""


@dataclass(frozen=True)
class _Attempt:
    """For which cohort a round was sealed last; `attempt.json`."""

    round: int = 0
    attempt: int = 0
    cohort: tuple[str, ...] = ()
    epoch: int = 0
    sealed: bool = False
    """Its update was masked: another one under the same masks would show the difference of the two."""


class Hospital(Home):
    """One hospital, ready to answer."""

    # ---- who is there, and with which key

    def present(self, roll: Roll) -> Envelope:
        """Who is there: the answer to `Roll`, once all have signed and the ledger is as long as it ever was.

        Raises:
            StudyError: STUDY_SIGNATURE. PrivacyError: LEDGER_*. MessageError: a signature in the roll is not right.
        """
        if (self.home / LEFT).exists():
            self._close_study()
            return self._signed(Leave(study=self.study.hash, hospital=self.site.name))
        agreement = self.agreement
        for approval in roll.approvals:
            agreement = agreement.with_signature(approval.hospital, approval.signature)
        agreement.require_all()
        if self.agreement.missing():
            keep(self.home, agreement)
        self.agreement = agreement
        self.policy.grant_model(sum(p.numel() for network in self.networks for p in network.parameters()))
        anchors.check_own(self._ledger_history(), self.site.name, roll.anchors, self.study)
        return self._present()

    def _present(self) -> Envelope:
        epoch = self.keys.epoch
        header = Present(
            study=self.study.hash,
            hospital=self.site.name,
            epoch=epoch.number if epoch else 0,
            key_id=epoch.key_id if epoch else "",
            parameters=self.plan.n_values,
            applied_round=self.applied_round,
            model_hash=self.model_hash,
        )
        return self._signed(header)

    def offer_key(self, opened: EpochOpen) -> Envelope:
        """Make and wrap the key of a new epoch: the leader's part. Raises like `KeyEpochs.offer`."""
        self._require_consent()
        header, payload = self._epochs().offer(opened)
        return self._signed(header, payload)

    def take_key(self, grant: KeyGrant, wrapped: bytes) -> Envelope:
        """Keep a wrapped key as the next one. Raises like `KeyEpochs.take`."""
        self._require_consent()
        return self._signed(self._epochs().take(grant, wrapped))

    def start_key(self, started: EpochStart) -> Envelope:
        """Use the next key from now on. Raises like `KeyEpochs.start`."""
        self._require_consent()
        self._epochs().start(started)
        self.keys = HospitalKeys.load(self.home / "keys")
        return self._present()

    def _epochs(self) -> KeyEpochs:
        return KeyEpochs(self.home, self.study, self.policy, self.keys, self.applied_round)

    def _require_consent(self) -> None:
        """All hospitals have signed the study, this one has not left it, and its ledger is whole.

        Raises:
            StudyError: STUDY_SIGNATURE. RunError: RUN_LEFT. PrivacyError: LEDGER_*.
        """
        if (self.home / LEFT).exists():
            raise RunError("RUN_LEFT", "this hospital has left the study", self.site.name)
        self.agreement.require_all()
        self._ledger_history()

    # ---- phase 1: local gradients, encrypted

    def local_update(self, opened: RoundOpen) -> Envelope:
        """Train the round (once), then quantise, prove, mask, encrypt and sign its update.

        A further attempt of the same round seals the stored update for a smaller cohort, at no privacy cost.

        Raises:
            MessageError: MSG_ROUND, MSG_KEY, MSG_SENDER: not what this hospital's own state expects.
            PrivacyError: BUDGET_EXHAUSTED, LEDGER_*: nothing was trained.
            DataError, ModelError, CryptoError: see there.
        """
        self._require_consent()
        self._epochs().check_running()
        self._check(opened)
        sent = self._outbox(opened)
        if sent is not None:
            return sent
        noted = self._remember_attempt(opened)
        start = (opened.round, self.model_hash, self.study.hash)
        if not self._update_file.exists() or self._stored_update()[0] != start:
            if noted.sealed:
                what = "the update that this attempt was sealed with is gone"
                raise RunError("RUN_STATE", what, self._update_file.name)
            self._train(opened.round)  # an update of a round that is over, left by a crash, is replaced
        _, arrays, notes = self._stored_update()
        payload = self._seal(arrays["levels"].astype(np.int64), int(notes["saturated"]), opened)
        digest = hashlib.sha256(payload).hexdigest()
        crash.point("client.sealed")
        history = self._record_release(opened, digest, len(payload))
        crash.point("client.released")
        header = Update(
            **opened.model_dump(),
            hospital=self.site.name,
            weight=self.site.weight,
            model_hash=self.model_hash,
            payload_bytes=len(payload),
            payload_sha256=digest,
            ledger_seq=history.seq,
            ledger_head=history.head,
            generator_loss=max(-MAX_LOSS, min(float(arrays["generator_loss"]), MAX_LOSS)),
        )
        envelope = self._signed(header, payload)
        self._note(replace(noted, sealed=True))
        checkpoint.write_bytes(self.home / OUTBOX, envelope.to_bytes())
        crash.point("client.sent-stored")
        return envelope

    def _record_release(self, opened: RoundOpen, digest: str, size: int) -> History:
        if not self.study.is_private:
            return self._ledger_history()
        with self._open_ledger() as ledger:
            ledger.release(self.study.hash, round=opened.round, attempt=opened.attempt, sha256=digest, size=size)
            self.book.saw(ledger.history)
            return ledger.history

    def _outbox(self, opened: RoundOpen) -> Envelope | None:
        """The update of just this attempt as it was sent; None if it was not, or the file is damaged."""
        try:
            envelope = Envelope.from_bytes((self.home / OUTBOX).read_bytes())
            update = envelope.open(Update, self.study)
        except (OSError, MessageError):
            return None
        return envelope if all(getattr(update, f) == getattr(opened, f) for f in ROUND_FIELDS) else None

    def _check(self, opened: RoundOpen) -> None:
        cohort, epoch = set(opened.cohort), self.keys.epoch
        if epoch is None or (opened.epoch, opened.key_id) != (epoch.number, epoch.key_id):
            raise MessageError("MSG_KEY", "the round names another key", "RoundOpen")
        if opened.round != self.applied_round + 1 or opened.round > self.study.training.rounds:
            what = f"round {opened.round} was opened, this hospital has applied {self.applied_round}"
            raise MessageError("MSG_ROUND", what, "RoundOpen")
        if len(cohort) != len(opened.cohort) or not cohort <= set(epoch.members):
            raise MessageError("MSG_SENDER", "the cohort is not made of this epoch's members", "RoundOpen")
        if self.site.name not in cohort or len(cohort) < self.policy.min_cohort:
            raise MessageError("MSG_SENDER", f"a cohort of {len(cohort)} without or too small for us", "RoundOpen")

    def _stored_update(self) -> tuple[tuple[int, str, str], checkpoint.Arrays, dict[str, str | int]]:
        """What the stored update starts from, its arrays, and its notes."""
        arrays, notes = checkpoint.read(self._update_file)
        if "levels" not in arrays:
            raise ModelError("MODEL_MISMATCH", "this is not an update", self._update_file.name)
        return (int(notes["round"]), str(notes["model_hash"]), str(notes["study"])), arrays, notes

    def _train(self, round: int) -> None:
        """Reserve, read, train, store the update, charge: in this order, so that a crash anywhere spends, never leaks.

        Only where the data cannot be read, so that nothing was trained, is the reservation taken back. Where a test of
        the noise, the clipping or the sampling fails, the round is charged and its update is thrown away.

        Raises:
            PrivacyError: PRIVACY_PROOF, also at every later round until the study is signed again here.
        """
        random = self._random(round)
        steps, rate = self.study.steps_per_round, self.study.sampling_rate(self.site)
        if not self.study.is_private:
            self._train_without_privacy(round, random)
            return
        planned = TrainingSteps(self.sigma, rate, steps)
        with self._open_ledger() as ledger, ExitStack() as until_settled:
            with self.book.locked():  # what other ledgers of these patients spent may not grow while it is counted
                self._require_proof(ledger)
                reservation = until_settled.enter_context(self._budget(ledger).reserve(round, planned))
                self._note_epoch(ledger)
                self.book.saw(ledger.history)
                until_settled.callback(lambda: self.book.saw(ledger.history))
            crash.point("client.reserved")
            try:
                patients = self.load_patients()
            except FedMedGanError:
                reservation.void("the data could not be read; nothing was trained")
                raise
            began = time.perf_counter()
            code = source_hash()
            trained = self._train_networks(PatientSampler(patients, rate, random), random)
            seconds = time.perf_counter() - began
            proof_of_round: dict[str, Any] = {"noise_source": random.name, "checks": trained.checks, "code": code}
            if trained.private_steps > steps:
                reservation.charge(steps, **proof_of_round)
                what = f"{trained.private_steps} private steps were taken, {steps} were reserved"
                raise PrivacyError("PRIVACY_PROOF", what, f"round {round}")
            if failed := failed_checks(trained.checks):  # nothing that was trained is kept, not even Adam's states
                reservation.charge(steps, **proof_of_round)
                raise PrivacyError("PRIVACY_PROOF", f"failed: {', '.join(failed)}", f"round {round}")
            crash.point("client.trained")
            quantize_seconds = self._store_update(round, trained)
            crash.point("client.update-stored")
            reservation.charge(steps, **proof_of_round)
            crash.point("client.charged")
        self.log.write(
            "trained",
            round=round,
            steps=steps,
            seconds=seconds,
            quantize_seconds=quantize_seconds,
            generator_loss=trained.losses.generator,
            discriminator_fake_loss=trained.losses.discriminator_on_fakes,
            epsilon=reservation.decision.after_epsilon,
            ceiling=self.study.privacy.epsilon,
            noise_multiplier=self.sigma,
            sampling_rate=rate,
            checks=trained.checks,
            method=trained.method,
        )

    def _train_without_privacy(self, round: int, random: RandomSource) -> None:
        """For public images: nothing is promised, so nothing is reserved, charged or proved."""
        self.policy.grant(self.study)
        patients, began = self.load_patients(), time.perf_counter()
        trained = self._train_networks(
            PatientSampler(patients, self.study.sampling_rate(self.site), random), random, private=False
        )
        seconds = time.perf_counter() - began
        self.log.write(
            "trained",
            round=round,
            steps=self.study.steps_per_round,
            seconds=seconds,
            quantize_seconds=self._store_update(round, trained),
            generator_loss=trained.losses.generator,
            discriminator_fake_loss=trained.losses.discriminator_on_fakes,
            epsilon=None,
            ceiling=None,
            noise_multiplier=None,
            sampling_rate=self.study.sampling_rate(self.site),
            checks=trained.checks,
            method=trained.method,
        )

    def _store_update(self, round: int, trained: _Trained) -> float:
        """Adam's states, then the update: quantised, as it will be sent. Returns the seconds that quantising took."""
        checkpoint.write(self.home / ADAM_STATES, trained.states, study=self.study.hash, round=round)
        began = time.perf_counter()
        quantized = self.plan.quantize(trained.update_P, self._rounding(round))
        took = time.perf_counter() - began
        checkpoint.write(
            self._update_file,
            {"levels": quantized.levels.astype(np.uint16), "generator_loss": np.array(trained.losses.generator)},
            round=round,
            study=self.study.hash,
            model_hash=self.model_hash,
            saturated=quantized.saturated,
        )
        return took

    def _require_proof(self, ledger: Ledger) -> None:
        """Nothing is trained after a failed test, until a person has signed again; and only as the ledger says."""
        if ledger.history.proof_failed(self.study.hash):
            raise PrivacyError("PRIVACY_PROOF", "the tests of an earlier round failed", self.site.name)
        terms = ledger.history.terms(self.study.hash)
        agreed = (self.sigma, self.study.sampling_rate(self.site), self.study.privacy.clip_norm)
        if terms is None or (terms.noise_multiplier, terms.sampling_rate, terms.clip_norm) != agreed:
            raise StudyError("STUDY_HASH", "noise or sampling are not those on record", NOISE, hint=SIGN_AGAIN)

    def _train_networks(self, sampler: PatientSampler, random: RandomSource, *, private: bool = True) -> _Trained:
        """One round of local training from the shared model, with Adam states of the round before."""
        path = self.home / ADAM_STATES
        earlier, notes = checkpoint.read(path) if path.exists() else ({}, {})
        if earlier and notes.get("study") != self.study.hash:
            raise ModelError("MODEL_MISMATCH", "the states belong to another study", path.name)
        if kept := {n.removeprefix(KEPT): a for n, a in part(earlier, KEPT).items()}:
            checkpoint.load_networks({**self.model.weights, **kept}, *self.networks)
        trainer = LocalTrainer(
            self.study,
            *self.networks,
            sampler,
            noise_multiplier=self.sigma if private else None,
            random=random,
            device=self._device(),
            steps_done=self.applied_round * self.study.training.local_steps,
        )
        if earlier:
            states = {n.removeprefix(ADAM): a for n, a in part(earlier, ADAM).items()}
            checkpoint.load_optimizers(states, **trainer.adams)
            if trainer.turns.adaptive:
                trainer.turns.load(earlier[TURNS].tolist())
        losses = trainer.train(self.study.training.local_steps)
        trainer.close()
        weights = checkpoint.network_arrays(*self.networks)
        states = {ADAM + n: a for n, a in checkpoint.optimizer_arrays(**trainer.adams).items()}
        states[TURNS] = np.array(trainer.turns.state())
        states |= {KEPT + n: a for n, a in weights.items() if n not in self.model.weights}
        update_P = checkpoint.flatten(shared_part(self.study, weights)) - checkpoint.flatten(self.model.weights)
        return _Trained(losses, update_P, states, trainer.checks, trainer.method, trainer.private_steps)

    def _remember_attempt(self, opened: RoundOpen) -> _Attempt:
        """An attempt is sealed for one cohort only, and a later one only for a smaller cohort.

        Under a later key it may be the same cohort: its sum says no more than the rejected one did.

        Raises:
            MessageError: MSG_REPLAY. RunError: RUN_STATE.
        """
        attempt, cohort, epoch = self._last_attempt(opened.round)
        same = set(opened.cohort) == cohort
        if opened.attempt == attempt and same and opened.epoch == epoch:
            return self._noted()
        smaller = not cohort or set(opened.cohort) < cohort or (same and opened.epoch > epoch)
        if not (opened.attempt > attempt and smaller):
            raise MessageError("MSG_REPLAY", "this round was already sealed for another cohort", "RoundOpen")
        latest = _Attempt(opened.round, opened.attempt, tuple(sorted(opened.cohort)), opened.epoch)
        self._note(latest)
        crash.point("client.attempt-noted")
        return latest

    def _note(self, attempt: _Attempt) -> None:
        checkpoint.write_bytes(self.home / ATTEMPT, json.dumps(asdict(attempt)).encode())

    def _noted(self) -> _Attempt:
        return checkpoint.read_note(self.home / ATTEMPT, _Attempt, _Attempt())

    def _last_attempt(self, round: int) -> tuple[int, set[str], int]:
        """The latest attempt of this round that was sealed here, its cohort and key epoch; (0, nobody, 0) if none."""
        latest = self._noted()
        return (latest.attempt, set(latest.cohort), latest.epoch) if latest.round == round else (0, set(), 0)

    def _seal(self, levels_P: np.ndarray, saturated: int, opened: RoundOpen) -> bytes:
        """Levels -> packed slots -> presence and MAC -> pairwise masks -> ciphertexts -> frame."""
        began = time.perf_counter()
        binding = self._binding(opened)
        slots = proof.seal(
            self.plan.pack(levels_P, self.site.weight),
            n_sites=len(self.study.sites),
            site_index=self.index,
            weight=self.site.weight,
            mac_key=self._mac_key(opened),
        )
        cohort = tuple(sorted(self.study.index(name) for name in opened.cohort))
        masked = masks.mask(
            slots,
            site_index=self.index,
            cohort=cohort,
            shared_secrets={
                i: self.keys.shared_secret(self.study.sites[i].exchange_key) for i in cohort if i != self.index
            },
            context=rfc8785.dumps(binding),
        )
        sealed = time.perf_counter()
        payload = cipher.frame(cipher.HospitalCipher(self.keys.he_secret).encrypt(masked), kind="update", **binding)
        self.log.write(
            "encrypted",
            round=opened.round,
            attempt=opened.attempt,
            seconds={"seal": sealed - began, "encrypt": time.perf_counter() - sealed},
            saturated=saturated,
            values=int(levels_P.size),
            bytes_up=len(payload),
        )
        return payload

    # ---- phases 3 and 4: the sum comes back; decrypt and update

    def apply_sum(self, certificate: Certificate, payload: bytes, shown: Signed | None = None) -> Envelope:
        """Check the certificate and the sum, add the mean update to the model, report the new model's hash.

        Args:
            shown: the certificate as the coordinator signed it, kept for audit.

        Nothing is written before every check has passed; a sum that was already applied is answered again.

        Raises:
            MessageError: the certificate is not right (MSG_*).
            CryptoError: HE_*, ROUND_REJECTED: the sum is not what the cohort sent; the model is left as it was.
        """
        self._require_consent()
        if certificate.round != self.applied_round:
            self._apply_new(certificate, payload, shown)
        if self._noted().round <= self.applied_round:  # else an old sum that comes again would cost the next update
            self._update_file.unlink(missing_ok=True)
            (self.home / OUTBOX).unlink(missing_ok=True)
        crash.point("client.update-removed")
        if self.applied_round == self.study.training.rounds:
            self._close_study()
        header = Applied(
            study=self.study.hash, hospital=self.site.name, round=self.applied_round, model_hash=self.model_hash
        )
        return self._signed(header)

    def _apply_new(self, certificate: Certificate, payload: bytes, shown: Signed | None) -> None:
        began = time.perf_counter()
        self._epochs().check_running()
        updates = self._check_certificate(certificate)
        anchors.check_peers(self._ledger_history().peers, updates, self.study)
        weights = {self.study.index(name): update.weight for name, update in updates.items()}
        n_slots = self.plan.n_slots + proof.extra_slots(len(self.study.sites))
        n_blobs = cipher.blobs_for(n_slots)
        blobs = cipher.unframe(payload, kind="sum", n_blobs=n_blobs, **self._binding(certificate))
        total = cipher.HospitalCipher(self.keys.he_secret).decrypt(blobs, n_slots)
        decrypted = time.perf_counter()
        cohort_weight = sum(weights.values())
        try:
            slots = proof.open_sum(
                total, n_sites=len(self.study.sites), weights=weights, mac_key=self._mac_key(certificate)
            )
            mean_P = self.plan.mean(self.plan.unpack(slots, cohort_weight), cohort_weight)
        except CryptoError:
            self._epochs().note_rejected()  # counted before anybody hears of it
            raise
        crash.point("client.sum-checked")
        checked = time.perf_counter()
        self.model = self.model.advanced(mean_P, certificate.round)
        self.applied_round = certificate.round
        history = self._record_anchor(certificate, shown, updates)
        crash.point("client.anchored")
        self.model_ledger = (history.seq, history.head)
        checkpoint.write(
            self._model_file,
            self.model.arrays(),
            round=self.applied_round,
            study=self.study.hash,
            ledger_seq=history.seq,
            ledger_head=history.head,
        )
        crash.point("client.model-stored")
        self.model.load_into(self.networks)
        applied = time.perf_counter()
        self.draw_samples()
        self.log.write(
            "updated",
            round=self.applied_round,
            seconds={"decrypt": decrypted - began, "check": checked - decrypted, "apply": applied - checked},
            model_hash=self.model_hash,
        )

    def _record_anchor(self, certificate: Certificate, shown: Signed | None, updates: dict[str, Update]) -> History:
        """Keep the certificate as the coordinator signed it, and all hospitals' ledger heads in our own ledger."""
        if shown is not None:
            path = self.home / CERTIFICATES / f"round-{certificate.round:04d}.json"
            checkpoint.write_bytes(path, shown.model_dump_json().encode())
        heads = {self.study.site(name).signing_key: (u.ledger_seq, u.ledger_head) for name, u in updates.items()}
        digest = hashlib.sha256(certificate.canonical()).hexdigest()
        if not self.study.is_private:
            return self._ledger_history()
        with self._open_ledger() as ledger:
            self._note_epoch(ledger)
            ledger.anchor(self.study.hash, round=certificate.round, certificate=digest, heads=heads)
            self.book.saw(ledger.history)
            return ledger.history

    def _note_epoch(self, ledger: Ledger) -> None:
        """On record: with which key sums are opened from now on."""
        if epoch := self.keys.epoch:
            ledger.rotate(self.study.hash, epoch=epoch.number, key_id=epoch.key_id, members=epoch.members)

    def _close_study(self) -> None:
        """The study is over for this hospital: nothing can be charged for it any more."""
        if not self.study.is_private:
            return
        with self._open_ledger() as ledger:
            if not ledger.history.is_closed(self.study.hash):
                ledger.close_study(self.study.hash)
                self.book.saw(ledger.history)

    def _check_certificate(self, certificate: Certificate) -> dict[str, Update]:
        """The signed updates that are in the sum, by hospital; our own byte for byte as it was sent."""
        epoch = self.keys.epoch
        if epoch is None or (certificate.epoch, certificate.key_id) != (epoch.number, epoch.key_id):
            raise MessageError("MSG_KEY", "the certificate names another key", "Certificate")
        if certificate.round != self.applied_round + 1:
            raise MessageError("MSG_ROUND", "the sum is not of the next round", "Certificate")
        if certificate.attempt < self._last_attempt(certificate.round)[0]:
            raise MessageError("MSG_ROUND", "the sum is of an attempt that was given up", "Certificate")
        if len(certificate.cohort) < self.policy.min_cohort or not set(certificate.cohort) <= set(epoch.members):
            raise MessageError("MSG_SENDER", "the sum holds too few hospitals, or strangers", "Certificate")
        updates = open_certificate(certificate, self.study)
        if next(iter(updates.values())).model_hash != self.model_hash:
            raise ModelError("MODEL_DIVERGED", "the cohort trained another model than ours", "Certificate")
        if self.site.name in updates:
            own = updates[self.site.name]  # our own words of how long our ledger was
            self._ledger_history().check_anchor(own.ledger_seq, own.ledger_head)
            sent = self._outbox(certificate)
            if sent is None or sent.shown() not in certificate.updates:
                raise MessageError(
                    "MSG_SENDER", "the sum holds an update that this hospital did not send", "Certificate"
                )
        return updates
