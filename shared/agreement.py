"""Who agrees to a study: public identities before it, signatures under it.

    1  each hospital      makes its keys, sends its Identity, reads its fingerprint out on the telephone
    2  the coordinator    puts the public keys into the study: now it has its hash
    3  each hospital      compares fingerprints, lets its policy decide, signs the hash
    4  everybody          starts only with the signatures of ALL hospitals

Nothing in these files is secret, and the server is not trusted with any of it: a key or a digit that is changed on the
way changes the hash that hospitals sign.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import BaseModel, ConfigDict, ValidationError

from fedmedgan.shared.errors import FedMedGanError, MessageError, StudyError
from fedmedgan.shared.secure_sum import keys
from fedmedgan.shared.study import MAX_FILE_BYTES, HexKey, SiteName, Study, WrappingKey, from_agreed, from_dict

PURPOSE = "study"


class Identity(BaseModel):
    """Public keys of one party, signed with the signing key among them: whoever sends it holds the private half."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    role: Literal["hospital", "coordinator"]
    name: SiteName
    signing_key: HexKey
    exchange_key: HexKey = ""
    wrapping_key: WrappingKey = ""
    signature: str = ""

    @property
    def fingerprint(self) -> str:
        """What the party reads out on the telephone: 40 hex digits in groups of four."""
        return keys.fingerprint(self.name, self.signing_key, self.exchange_key, self.wrapping_key)

    def signed(self, private: Ed25519PrivateKey) -> Identity:
        """With the signature of its own key."""
        return self.model_copy(update={"signature": keys.sign(private, self._to_sign(), "identity").hex()})

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.model_dump(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Identity:
        """Read what `save` wrote.

        Raises:
            StudyError: CONFIG_NOT_FOUND, CONFIG_TOO_LARGE, STUDY_KEYS: not an identity, or not signed by its own key.
        """
        try:
            identity = cls.model_validate_json(_read(path))
            keys.verify_hex(identity.signing_key, identity.signature, identity._to_sign(), "identity")
        except (ValidationError, ValueError, MessageError):
            hint = "ask the party to send the file again that `site init` or `server init` wrote"
            what = "this is not an identity, or not signed by its own key"
            raise StudyError("STUDY_KEYS", what, path.name, hint=hint) from None
        return identity

    def _to_sign(self) -> bytes:
        return rfc8785.dumps(self.model_dump(exclude={"signature"}))


def assemble(study: Study, identities: Iterable[Identity]) -> Study:
    """The study with everybody's public keys in it: this one is signed.

    Raises:
        StudyError: STUDY_KEYS, a party is missing, comes twice, is not in the study or lacks a key; STUDY_ROSTER.
    """
    known: dict[tuple[str, str], Identity] = {}
    for identity in identities:
        key = (identity.role, identity.name if identity.role == "hospital" else "")
        if key in known:
            raise StudyError("STUDY_KEYS", f"two identities of {identity.name}", "identities")
        if identity.role == "hospital" and not (identity.exchange_key and identity.wrapping_key):
            raise StudyError("STUDY_KEYS", f"{identity.name} lacks a public key", "identities")
        known[key] = identity
    wanted = {("hospital", site.name) for site in study.sites} | {("coordinator", "")}
    if set(known) != wanted:
        missing = ", ".join(sorted(name or role for role, name in wanted - set(known))) or "nobody"
        strangers = ", ".join(sorted(name or role for role, name in set(known) - wanted)) or "nobody"
        raise StudyError("STUDY_KEYS", f"missing: {missing}; not in the study: {strangers}", "identities")
    values = study.model_dump()
    for site in values["sites"]:
        identity = known["hospital", site["name"]]
        site |= {name: getattr(identity, name) for name in ("signing_key", "exchange_key", "wrapping_key")}
    return from_dict(values | {"coordinator_key": known["coordinator", ""].signing_key}, "study")


@dataclass(frozen=True)
class Agreement:
    """A study and the signatures under it. `study.json` in every party's folder."""

    study: Study
    signatures: Mapping[str, str] = field(default_factory=dict)
    """Hospital -> Ed25519 signature of the study's hash, 128 hex digits; each was verified."""

    @classmethod
    def load(cls, path: Path) -> Agreement:
        """Read what `save` wrote; every signature that is there is verified.

        Raises:
            StudyError: like `study.load`; STUDY_HASH; STUDY_SIGNATURE, a signature is not valid.
        """
        try:
            values = json.loads(_read(path))
            study = from_agreed(values, path.name)
            signatures = dict(values.get("signatures", {}))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise StudyError("CONFIG_SYNTAX", "this is not an agreed study", path.name) from None
        agreement = cls(study)
        for name, signature in signatures.items():
            agreement = agreement.with_signature(name, signature)
        return agreement

    def to_json(self) -> bytes:
        values = {
            "study": self.study.model_dump(mode="json"),
            "hash": self.study.hash,
            "signatures": dict(sorted(self.signatures.items())),
        }
        return json.dumps(values, indent=1).encode() + b"\n"

    def with_signature(self, site: str, signature: str) -> Agreement:
        """With one more signature.

        Raises:
            StudyError: STUDY_SIGNATURE, the hospital is not in the study or did not sign just this one.
        """
        try:
            public = self.study.site(site).signing_key
            keys.verify_hex(public, signature, self.study.hash.encode(), PURPOSE)
        except (FedMedGanError, ValueError, TypeError):
            what = "a signature is not of a hospital of this study, under just this study"
            raise StudyError("STUDY_SIGNATURE", what, str(site)[:40]) from None
        return Agreement(self.study, {**self.signatures, site: signature})

    def missing(self) -> tuple[str, ...]:
        """Hospitals that have not signed."""
        return tuple(site.name for site in self.study.sites if site.name not in self.signatures)

    def require_all(self) -> None:
        """No start without all signatures.

        Raises:
            StudyError: STUDY_SIGNATURE, STUDY_KEYS.
        """
        if not self.study.coordinator_key:
            raise StudyError("STUDY_KEYS", "the coordinator's key is not in the study", "coordinator_key")
        if self.missing():
            raise StudyError("STUDY_SIGNATURE", f"not signed by {', '.join(self.missing())}", "study.json")


def sign(study: Study, private: Ed25519PrivateKey) -> str:
    """A hospital's signature under a study, 128 hex digits."""
    return keys.sign(private, study.hash.encode(), PURPOSE).hex()


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise StudyError("CONFIG_TOO_LARGE", "the file is larger than 1 MiB", path.name)
        return path.read_bytes()
    except OSError as error:
        raise StudyError("CONFIG_NOT_FOUND", f"cannot be read ({error.strerror})", path.name) from None
