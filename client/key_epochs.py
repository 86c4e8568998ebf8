"""Key epochs as a hospital sees them: making a key, taking one, using it, and stopping after rejected sums.

A leader hospital makes the key and wraps it for each member; the server only carries wrapped keys. A member starts to
use a key when the members have shown each other, by HMACs that the server cannot make, that they hold the same one.

case                                                     what happens
asked to be leader, and the members are not who we think KEY_EPOCH
a wrapped key for another hospital, study, epoch, cut    KEY_UNWRAP
a key while the present one is neither old nor rejected  KEY_EPOCH: rotation is by schedule, leave or a person
a key after three rejected sums, no person allowed it    KEY_STOPPED
the first epoch, and somebody has not confirmed          KEY_CONFIRM
a later epoch, confirmed by fewer than `min_cohort`      KEY_CONFIRM
a confirmation that does not fit our key                 KEY_CONFIRM
the same grant or start again                            the same answer
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from fedmedgan.client import checkpoint
from fedmedgan.client.joining import REJECTED, ROTATION_ALLOWED
from fedmedgan.client.policy import Policy
from fedmedgan.shared import crash
from fedmedgan.shared.errors import CryptoError
from fedmedgan.shared.messages import (
    EpochOpen,
    EpochStart,
    KeyGrant,
    KeyOffer,
    KeyReady,
    Leave,
    Signed,
    WrappedHash,
    join_parts,
    open_shown,
)
from fedmedgan.shared.secure_sum import epochs, keys
from fedmedgan.shared.secure_sum.keys import Epoch, HospitalKeys
from fedmedgan.shared.study import Study

MAX_REJECTED = 3
"""Sums that may fail their check under one key: each is one bit that a forger learns about the key."""


@dataclass(frozen=True)
class _Rejected:
    """How many sums failed their check under a key; `rejected.json`."""

    epoch: int = 0
    sums: int = 0


class KeyEpochs:
    """One hospital's side of the ceremony.

    Args:
        applied_round: the round whose sum it applied last.
    """

    def __init__(self, home: Path, study: Study, policy: Policy, own: HospitalKeys, applied_round: int) -> None:
        self.home, self.study, self.policy, self.own = home, study, policy, own
        self.applied_round = applied_round

    # ---- the leader

    def offer(self, opened: EpochOpen) -> tuple[KeyOffer, bytes]:
        """A new key, wrapped for each member; this hospital itself forgets it until it is granted like to the others.

        Raises:
            CryptoError: KEY_EPOCH, KEY_STOPPED.
        """
        self._check_members(opened.members, opened.leaves)
        if opened.leader != self.policy.site:
            raise CryptoError("KEY_EPOCH", "another hospital was asked to lead", "EpochOpen")
        self._check_may_change(opened.epoch, opened.members)
        epoch = keys.new_epoch(opened.epoch, opened.members)
        wrapped = [
            epochs.wrap(
                epoch,
                self.study.site(name).wrapping_key,
                study_hash=self.study.hash,
                sender=self.policy.site,
                recipient=name,
            )
            for name in opened.members
        ]
        payload = join_parts(wrapped)
        header = KeyOffer(
            study=self.study.hash,
            hospital=self.policy.site,
            epoch=epoch.number,
            key_id=epoch.key_id,
            members=opened.members,
            wrapped=tuple(
                WrappedHash(hospital=name, sha256=hashlib.sha256(blob).hexdigest())
                for name, blob in zip(opened.members, wrapped, strict=True)
            ),
            payload_bytes=len(payload),
            payload_sha256=hashlib.sha256(payload).hexdigest(),
        )
        return header, payload

    # ---- every member

    def take(self, grant: KeyGrant, wrapped: bytes) -> KeyReady:
        """Unwrap a key and keep it as the next one.

        Raises:
            CryptoError: KEY_EPOCH, KEY_STOPPED, KEY_UNWRAP. MessageError: the offer is not what its leader signed.
        """
        offer = open_shown(KeyOffer, grant.offer, self.study)
        self._check_members(offer.members, grant.leaves)
        digest = hashlib.sha256(wrapped).hexdigest()
        if grant.recipient != self.policy.site or offer.hospital not in offer.members:
            raise CryptoError("KEY_EPOCH", "the key is for another hospital, or made by a stranger", "KeyGrant")
        if WrappedHash(hospital=self.policy.site, sha256=digest) not in offer.wrapped:
            raise CryptoError("KEY_UNWRAP", "the leader did not wrap this key for us", "KeyGrant")
        if not self._holds(offer.epoch, offer.key_id):
            self._check_may_change(offer.epoch, offer.members)
            epoch = epochs.unwrap(
                self.own,
                wrapped,
                study_hash=self.study.hash,
                number=offer.epoch,
                key_id=offer.key_id,
                members=offer.members,
                sender=offer.hospital,
                recipient=self.policy.site,
            )
            keys.store_next(self.home / "keys", epoch)
            crash.point("client.key-stored")
        else:
            epoch = self._held(offer.epoch)
        return KeyReady(
            study=self.study.hash,
            hospital=self.policy.site,
            epoch=epoch.number,
            key_id=epoch.key_id,
            confirmation=epochs.confirmation(epoch, study_hash=self.study.hash, hospital=self.policy.site),
        )

    def start(self, started: EpochStart) -> Epoch:
        """Use the next key from now on; the one before is gone.

        Raises:
            CryptoError: KEY_EPOCH, KEY_CONFIRM. MessageError: a confirmation was not signed by its hospital.
        """
        if not self._holds(started.epoch, started.key_id):
            raise CryptoError("KEY_EPOCH", "this hospital was not given that key", "EpochStart")
        epoch, present = self._held(started.epoch), self.own.epoch
        if present is not None and present.number == epoch.number:
            return present
        confirmed = {self._confirmed(epoch, ready) for ready in started.ready}
        enough = set(epoch.members) <= confirmed if present is None else len(confirmed) >= self.policy.min_cohort
        if not enough or self.policy.site not in confirmed:
            raise CryptoError("KEY_CONFIRM", "too few hospitals have confirmed the key", "EpochStart")
        started_epoch = keys.activate_next(self.home / "keys", self.applied_round + 1)
        crash.point("client.key-activated")
        (self.home / ROTATION_ALLOWED).unlink(missing_ok=True)
        return started_epoch

    def _confirmed(self, epoch: Epoch, signed: Signed) -> str:
        ready = open_shown(KeyReady, signed, self.study)
        if (ready.epoch, ready.key_id) != (epoch.number, epoch.key_id) or ready.hospital not in epoch.members:
            raise CryptoError("KEY_CONFIRM", "a confirmation is of another key", "EpochStart")
        epochs.check_confirmation(
            epoch, study_hash=self.study.hash, hospital=ready.hospital, confirmation=ready.confirmation
        )
        return ready.hospital

    # ---- rejected sums

    def note_rejected(self) -> None:
        """Count a sum that failed its check under the present key, before anybody hears of it."""
        number = self.own.epoch.number if self.own.epoch else 0
        count = _Rejected(number, self._rejected() + 1)
        checkpoint.write_bytes(self.home / REJECTED, json.dumps(asdict(count)).encode())

    def check_running(self) -> None:
        """Raises CryptoError KEY_STOPPED after the third rejected sum under the present key."""
        if self._rejected() >= MAX_REJECTED:
            what = f"{MAX_REJECTED} sums were rejected under this key"
            raise CryptoError("KEY_STOPPED", what, self.policy.site)

    def _rejected(self) -> int:
        count = checkpoint.read_note(self.home / REJECTED, _Rejected, _Rejected())
        return count.sums if self.own.epoch and count.epoch == self.own.epoch.number else 0

    # ---- checks

    def _holds(self, number: int, key_id: str) -> bool:
        return any(e and (e.number, e.key_id) == (number, key_id) for e in (self.own.epoch, self.own.next_epoch))

    def _held(self, number: int) -> Epoch:
        return next(e for e in (self.own.epoch, self.own.next_epoch) if e and e.number == number)

    def _check_members(self, members: tuple[str, ...], leaves: tuple[Signed, ...]) -> None:
        """All hospitals of the study but those who have signed that they leave."""
        left = {open_shown(Leave, signed, self.study).hospital for signed in leaves}
        if members != tuple(sorted(site.name for site in self.study.sites if site.name not in left)):
            raise CryptoError("KEY_EPOCH", "the members are not the hospitals that are left", "members")
        if self.policy.site not in members or len(members) < self.policy.min_cohort:
            raise CryptoError("KEY_EPOCH", "this hospital is not a member, or there are too few", "members")

    def _check_may_change(self, number: int, members: tuple[str, ...]) -> None:
        present = self.own.epoch
        if present is None:
            return
        if number <= present.number:
            raise CryptoError("KEY_EPOCH", f"epoch {number} was asked for, {present.number} is in use", "epoch")
        if checkpoint.read_note(self.home / ROTATION_ALLOWED, dict[str, int], {}).get("epoch") == present.number:
            return
        self.check_running()
        every = self.study.secure_sum.rotate_every
        due = every > 0 and self.applied_round + 1 >= present.since_round + every
        if not due and members == present.members:
            raise CryptoError("KEY_EPOCH", "no new key is due", "epoch")
