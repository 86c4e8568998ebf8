"""Phase 2: a running sum of ciphertexts that the server cannot read, in constant memory.

Every update is verified before its bytes reach a parser: size, SHA-256, signature, study, round, attempt, cohort and
key (shared/messages.py), then the frame (shared/secure_sum/cipher.py). Only then is it added, and forgotten.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

from fedmedgan.shared.errors import MessageError
from fedmedgan.shared.messages import ROUND_FIELDS, Certificate, Envelope, RoundOpen, Signed, Update
from fedmedgan.shared.secure_sum import cipher
from fedmedgan.shared.study import Study


class Adder(Protocol):
    """`cipher.AddOnly`, or the same in a process of its own (`worker.WorkerSum`)."""

    n_blobs: int

    def add(self, blobs: Sequence[bytes]) -> None: ...

    def result(self) -> list[bytes]: ...


class RoundSum:
    """The sum of one attempt of one round.

    Args:
        adder: does the adding; how many ciphertexts an update has is its `n_blobs`.
        model_hash: of the model that every update must start from.
    """

    def __init__(self, study: Study, opened: RoundOpen, adder: Adder, model_hash: str) -> None:
        self.study, self.opened, self.adder = study, opened, adder
        self.signed: dict[str, Signed] = {}
        self.model_hash = model_hash

    def verify(self, envelope: Envelope) -> Update:
        """Everything that can be checked without parsing a ciphertext.

        Raises:
            MessageError: MSG_*, not signed by a member of the cohort, not of this round, or counted before.
        """
        update = envelope.open(Update, self.study)
        for field in ROUND_FIELDS:
            if getattr(update, field) != getattr(self.opened, field):
                raise MessageError("MSG_ROUND", f"the update is of another {field.replace('_', ' ')}", "Update")
        if update.hospital not in self.opened.cohort:
            raise MessageError("MSG_SENDER", "the sender is not in this round's cohort", "Update")
        if update.hospital in self.signed:
            raise MessageError("MSG_REPLAY", f"{update.hospital} was already counted", "Update")
        if update.weight != self.study.site(update.hospital).weight:
            raise MessageError("MSG_SENDER", "the weight is not the study's", "Update")
        if update.model_hash != self.model_hash:
            raise MessageError("MODEL_DIVERGED", f"{update.hospital} trained another model", "Update")
        return update

    def add(self, envelope: Envelope) -> Update:
        """Verify one update and add it.

        Raises:
            MessageError: as `verify`.
            CryptoError: HE_*, the ciphertext is cut, altered, or bound to something else.
        """
        update = self.verify(envelope)
        self.adder.add(cipher.unframe(envelope.payload, kind="update", n_blobs=self.adder.n_blobs, **self._binding()))
        self.signed[update.hospital] = envelope.shown()
        return update

    def certify(self) -> tuple[Certificate, bytes]:
        """The certificate and the encrypted sum, once everybody of the cohort is in."""
        payload = cipher.frame(self.adder.result(), kind="sum", **self._binding())
        certificate = Certificate(
            **self.opened.model_dump(),
            updates=tuple(self.signed[name] for name in sorted(self.signed)),
            payload_bytes=len(payload),
            payload_sha256=hashlib.sha256(payload).hexdigest(),
        )
        return certificate, payload

    def _binding(self) -> dict[str, Any]:
        o = self.opened
        return {"study_hash": o.study, "round": o.round, "attempt": o.attempt, "key_id": o.key_id}
