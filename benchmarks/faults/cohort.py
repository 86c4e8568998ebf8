"""Hospitals with real keys, masks and ciphertexts, a real server, and the one place here that builds messages.

What a hospital and the server do is what client/cycle.py and server/aggregation.py do, without networks to train: an
update is any vector of levels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmedgan.server.aggregation import Adder, RoundSum
from fedmedgan.shared.messages import Certificate, Envelope, RoundOpen, Update, open_certificate, parse
from fedmedgan.shared.secure_sum import cipher, keys, masks, proof
from fedmedgan.shared.secure_sum.quantize import Slots, plan_for
from fedmedgan.shared.study import from_dict

MODEL_HASH, LEDGER_HEAD = "1a" * 32, "2b" * 32


class Cohort:
    """The hospitals of one study and its coordinator.

    Args:
        weights: one integer weight a hospital.
        n_values: values of one update.
    """

    def __init__(self, weights: Sequence[int], n_values: int, bits: int = 8) -> None:
        self.weights = list(weights)
        self.names = tuple(f"hospital-{i:03d}" for i in range(len(weights)))
        self.keys = [keys.generate_identity() for _ in weights]
        self.coordinator = Ed25519PrivateKey.generate()
        sites = [
            {
                "name": name,
                "patients": 1000,
                "weight": weight,
                "signing_key": key.signing_public,
                "exchange_key": key.exchange_public,
                "wrapping_key": key.wrapping_public,
            }
            for name, weight, key in zip(self.names, weights, self.keys, strict=True)
        ]
        self.study = from_dict(
            {
                "name": "faults",
                "sites": sites,
                "coordinator_key": self.coordinator.public_key().public_bytes_raw().hex(),
                "secure_sum": {"bits": bits},
            }
        )
        self.epoch = keys.new_epoch(1, self.names)
        self.cipher = cipher.HospitalCipher(self.epoch.he_secret)
        self.plan = plan_for(self.study, n_values)
        self.n_slots = self.plan.n_slots + proof.extra_slots(len(weights))
        self.n_blobs = proof.update_blobs(self.study, n_values)
        self._secrets: dict[tuple[int, int], bytes] = {}

    def open_round(self, round: int = 1, attempt: int = 1, cohort: Sequence[int] | None = None) -> RoundOpen:
        places = range(len(self.names)) if cohort is None else cohort
        return RoundOpen(
            study=self.study.hash,
            round=round,
            attempt=attempt,
            cohort=tuple(self.names[i] for i in places),
            epoch=self.epoch.number,
            key_id=self.epoch.key_id,
        )

    def levels(self, rng: np.random.Generator) -> Slots:
        """Levels of any update, int64 (P,)."""
        return rng.integers(0, self.plan.levels, self.plan.n_values)

    # ---- a hospital, phase 1

    def seal(self, site: int, levels_P: Slots, opened: RoundOpen, *, weight: int = 0, masked: bool = True) -> Slots:
        """Packed levels with proof and masks, as they are encrypted."""
        weight = weight or self.weights[site]
        slots = proof.seal(
            self.plan.pack(levels_P, weight),
            n_sites=len(self.names),
            site_index=site,
            weight=weight,
            mac_key=self._mac_key(opened),
        )
        if not masked:
            return slots
        cohort = self.places(opened)
        return masks.mask(
            slots,
            site_index=site,
            cohort=cohort,
            shared_secrets={i: self._secret(site, i) for i in cohort if i != site},
            context=rfc8785.dumps(self.binding(opened)),
        )

    def update(self, site: int, levels_P: Slots, opened: RoundOpen) -> Envelope:
        """What a hospital sends."""
        return self.signed_update(site, self.cipher.encrypt(self.seal(site, levels_P, opened)), opened)

    def signed_update(self, site: int, blobs: Sequence[bytes], opened: RoundOpen) -> Envelope:
        """Any ciphertexts, framed and signed by a hospital."""
        return self.signed_payload(site, self.update_payload(blobs, opened), opened)

    def update_payload(self, blobs: Sequence[bytes], opened: RoundOpen) -> bytes:
        return cipher.frame(blobs, kind="update", **self.binding(opened))

    def signed_payload(self, site: int, payload: bytes, opened: RoundOpen) -> Envelope:
        """Any bytes in place of ciphertexts, signed by a hospital."""
        header = Update(
            **opened.model_dump(),
            hospital=self.names[site],
            weight=self.weights[site],
            model_hash=MODEL_HASH,
            payload_bytes=len(payload),
            payload_sha256=hashlib.sha256(payload).hexdigest(),
            ledger_seq=7,
            ledger_head=LEDGER_HEAD,
            generator_loss=0.5,
        )
        return Envelope.seal(header, self.keys[site].signing, payload)

    # ---- the server, phase 2

    def server(self, opened: RoundOpen, adder: Adder | None = None) -> RoundSum:
        return RoundSum(self.study, opened, adder or cipher.AddOnly(self.n_blobs), MODEL_HASH)

    def certificate(self, opened: RoundOpen, updates: Sequence[Envelope], payload: bytes) -> Envelope:
        """What the server sends: these updates are in this sum. It may be a lie."""
        header = Certificate(
            **opened.model_dump(),
            updates=tuple(update.shown() for update in updates),
            payload_bytes=len(payload),
            payload_sha256=hashlib.sha256(payload).hexdigest(),
        )
        return Envelope.seal(header, self.coordinator, payload)

    def signed_certificate(self, header: bytes, payload: bytes) -> Envelope:
        """What an honest server made, with the coordinator's signature."""
        return Envelope.seal(parse(header, Certificate), self.coordinator, payload)

    def sum_payload(self, blobs: Sequence[bytes], opened: RoundOpen) -> bytes:
        return cipher.frame(blobs, kind="sum", **self.binding(opened))

    def blobs(self, payload: bytes, kind: cipher.Kind, opened: RoundOpen) -> list[bytes]:
        """The ciphertexts of a payload."""
        return cipher.unframe(payload, kind=kind, n_blobs=self.n_blobs, **self.binding(opened))

    # ---- a hospital, phase 3

    def open_sum(self, envelope: Envelope) -> Slots:
        """Checks on a sum that need no state of a hospital. Returns the weighted sums of levels, int64 (P,).

        Raises:
            MessageError, CryptoError.
        """
        certificate = envelope.open(Certificate, self.study)
        updates = open_certificate(certificate, self.study)
        weights = {self.study.index(name): update.weight for name, update in updates.items()}
        blobs = cipher.unframe(envelope.payload, kind="sum", n_blobs=self.n_blobs, **self.binding(certificate))
        total = self.cipher.decrypt(blobs, self.n_slots)
        slots = proof.open_sum(total, n_sites=len(self.names), weights=weights, mac_key=self._mac_key(certificate))
        return self.plan.unpack(slots, sum(weights.values()))

    # ---- what they share

    def binding(self, opened: RoundOpen) -> dict[str, Any]:
        return {
            "study_hash": self.study.hash,
            "key_id": self.epoch.key_id,
            "round": opened.round,
            "attempt": opened.attempt,
        }

    def places(self, opened: RoundOpen) -> tuple[int, ...]:
        """The cohort as places in the roster."""
        return tuple(sorted(self.study.index(name) for name in opened.cohort))

    def max_payload(self) -> int:
        """Largest update that the transport lets through."""
        return cipher.max_frame_bytes(self.n_blobs, "update")

    def _mac_key(self, opened: RoundOpen) -> bytes:
        return proof.derive_mac_key(self.epoch.mac_root, **self.binding(opened))

    def _secret(self, site: int, peer: int) -> bytes:
        pair = min(site, peer), max(site, peer)
        if pair not in self._secrets:
            self._secrets[pair] = self.keys[site].shared_secret(self.study.sites[peer].exchange_key)
        return self._secrets[pair]
