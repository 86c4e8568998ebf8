"""The messages of the four phases, and nothing else that ever crosses the wire.

Each message is a header (canonical JSON), an Ed25519 signature over it, and at most one opaque payload. The models
below are the allow-list: a field that is not named here cannot leave a hospital, and one that arrives is refused.

    phase                      from -> to             message       payload
    who is there               server -> hospital     Roll
                               hospital -> server     Present, or Leave
    key epoch                  server -> leader       EpochOpen
    (a hospital makes it,      leader -> server       KeyOffer      one wrapped key a member
     the server relays it)     server -> member       KeyGrant      the member's wrapped key
                               member -> server       KeyReady
                               server -> member       EpochStart
                               member -> server       Present
    1 local gradients          server -> hospital     RoundOpen
                               hospital -> server     Update        encrypted update
    2 secure aggregation       (the server adds)
    3 broadcast                server -> hospital     Certificate   encrypted sum
    4 decrypt and update       hospital -> server     Applied
    any                        hospital -> server     Refusal

Both sides sign: a hospital with its own key, the server with the coordinator's; both keys stand in the study.
Size and SHA-256 of a payload are in its signed header, so both are checked before any parser sees a byte.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated, Literal, Self, TypeVar

import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedmedgan.shared.errors import MessageError
from fedmedgan.shared.secure_sum import keys
from fedmedgan.shared.study import SiteName, Study

PART_BYTES = 4 << 20
"""A payload travels as parts of 4 MiB: one large blob blocks Flower's database and dies on a slow link."""
_DTYPE, _STYPE = "bytes", "fedmedgan.v1"
MAX_HEADER_BYTES = 1 << 20
MAX_LOSS = 1e6

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
KeyId = Annotated[str, Field(pattern=r"^([0-9a-f]{8,64})?$")]
Signature = Annotated[str, Field(pattern=r"^([0-9a-f]{128})?$")]
Count = Annotated[int, Field(ge=0, le=10**12)]
EpochNumber = Annotated[int, Field(ge=1, le=10_000)]
ROUND_FIELDS = ("round", "attempt", "cohort", "epoch", "key_id")
"""What every message of one attempt must agree in."""


class Header(BaseModel):
    """What every message says: its version and the study that it belongs to."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    v: Literal[1] = 1
    study: Hash

    def canonical(self) -> bytes:
        return rfc8785.dumps(self.model_dump(mode="json"))


class Signed(BaseModel):
    """A header as it was signed, to be shown to others."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    header: str
    signature: Signature


class Approval(BaseModel):
    """A hospital's signature under the study's hash (shared/agreement.py)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    hospital: SiteName
    signature: Signature


class Roll(Header):
    """Server: who is there? With it, what everybody may check first."""

    approvals: tuple[Approval, ...]
    """Every hospital's signature under the study."""
    anchors: tuple[Signed, ...]
    """The newest Update of each hospital: its own word of how long its ledger was."""


class Present(Header):
    """Hospital: I am, with this key, and I hold the model of this round."""

    hospital: SiteName
    epoch: Count
    """Number of the key epoch that it holds; 0 before the first."""
    key_id: KeyId
    parameters: Annotated[int, Field(ge=1, le=10**9)]
    """Number of values in one update."""
    applied_round: Count
    model_hash: Hash


class Leave(Header):
    """Hospital: I take no further part, and shall have no further key."""

    hospital: SiteName


# ---- key epochs


class EpochOpen(Header):
    """Server to a leader hospital: make the key of this epoch, and wrap it for these members."""

    epoch: EpochNumber
    leader: SiteName
    members: tuple[SiteName, ...]
    leaves: tuple[Signed, ...]
    """Why a hospital of the study is not a member: its own signed Leave."""


class WrappedHash(BaseModel):
    """Which wrapped key is for whom."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    hospital: SiteName
    sha256: Hash


class KeyOffer(Header):
    """Leader: here is the key, wrapped for each member (shared/secure_sum/epochs.py)."""

    hospital: SiteName
    epoch: EpochNumber
    key_id: KeyId
    members: tuple[SiteName, ...]
    wrapped: tuple[WrappedHash, ...]
    payload_bytes: Count
    payload_sha256: Hash


class KeyGrant(Header):
    """Server to a member: your wrapped key, in the leader's signed words."""

    recipient: SiteName
    offer: Signed
    leaves: tuple[Signed, ...]
    payload_bytes: Count
    payload_sha256: Hash


class KeyReady(Header):
    """Member: I hold the same key."""

    hospital: SiteName
    epoch: EpochNumber
    key_id: KeyId
    confirmation: Hash
    """HMAC under the epoch's MAC root: only who holds the key can make it or check it."""


class EpochStart(Header):
    """Server to a member: these hold the key; use it from now on."""

    epoch: EpochNumber
    key_id: KeyId
    ready: tuple[Signed, ...]


# ---- rounds


class RoundOpen(Header):
    """Server: train this round, or for attempt > 1 seal the stored update again for a smaller cohort."""

    round: Annotated[int, Field(ge=1, le=10_000)]
    attempt: Annotated[int, Field(ge=1, le=100)]
    cohort: tuple[SiteName, ...]
    epoch: EpochNumber
    key_id: KeyId


class Update(RoundOpen):
    """Hospital: my encrypted update. The loss is one over generated images alone."""

    hospital: SiteName
    weight: Annotated[int, Field(ge=1, le=1000)]
    model_hash: Hash
    """Model that the update starts from."""
    payload_bytes: Count
    payload_sha256: Hash
    ledger_seq: Annotated[int, Field(ge=1, le=10**9)]
    ledger_head: Hash
    generator_loss: Annotated[float, Field(ge=-MAX_LOSS, le=MAX_LOSS)]


class Certificate(RoundOpen):
    """Server: who is in the sum, in their own signed words, and what the sum is."""

    updates: tuple[Signed, ...]
    payload_bytes: Count
    payload_sha256: Hash


class Applied(Header):
    """Hospital: I hold this model now."""

    hospital: SiteName
    round: Annotated[int, Field(ge=1, le=10_000)]
    model_hash: Hash


class Refusal(Header):
    """Hospital: no, for a reason that names a code and nothing else."""

    hospital: SiteName
    code: Annotated[str, Field(pattern=r"^[A-Z_]{3,40}$")]


H = TypeVar("H", bound=Header)


class Envelope(BaseModel):
    """A header with its signature and payload, as received; `open` checks it."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    kind: str
    header: bytes
    signature: str
    payload: bytes

    @classmethod
    def seal(cls, header: Header, private: Ed25519PrivateKey, payload: bytes = b"") -> Self:
        """Canonical header, signed by its sender."""
        raw = header.canonical()
        kind = type(header).__name__
        return cls(kind=kind, header=raw, signature=keys.sign(private, raw, kind).hex(), payload=payload)

    def shown(self) -> Signed:
        """The signed header, to be shown to others."""
        return Signed(header=self.header.decode(), signature=self.signature)

    def to_bytes(self) -> bytes:
        """As one file."""
        return join_parts([self.kind.encode(), self.header, self.signature.encode(), self.payload])

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read what `to_bytes` made. Raises MessageError MSG_FORMAT; `open` checks the rest."""
        parts = split_parts(data)
        try:
            kind, header, signature, payload = parts
            return cls(kind=kind.decode(), header=header, signature=signature.decode("ascii"), payload=payload)
        except ValueError:
            raise MessageError("MSG_FORMAT", "not a stored message", "envelope") from None

    def to_record(self) -> RecordDict:
        """As Flower carries it."""
        config = ConfigRecord({"kind": self.kind, "header": self.header, "signature": self.signature})
        record = RecordDict({"envelope": config})
        if self.payload:
            parts = [self.payload[i : i + PART_BYTES] for i in range(0, len(self.payload), PART_BYTES)]
            record["payload"] = ArrayRecord(
                {f"{i:06d}": Array(_DTYPE, (len(p),), _STYPE, p) for i, p in enumerate(parts)}
            )
        return record

    @classmethod
    def from_record(cls, record: RecordDict, max_payload: int) -> Self:
        """As it arrived, in just the form that `to_record` gives it. Sizes are checked before anything is joined.

        Raises:
            MessageError: MSG_FORMAT or MSG_TOO_LARGE.
        """
        config = record.config_records.get("envelope")
        if config is None or set(config) != {"kind", "header", "signature"}:
            raise MessageError("MSG_FORMAT", "not a message of this program", "envelope")
        kind, header, signature = config["kind"], config["header"], config["signature"]
        if not (isinstance(kind, str) and isinstance(header, bytes) and isinstance(signature, str)):
            raise MessageError("MSG_FORMAT", "a part of the envelope has the wrong type", "envelope")
        arrays = record.array_records.get("payload", {})
        parts = [arrays[name].data for name in sorted(arrays)]
        if len(header) > MAX_HEADER_BYTES or sum(map(len, parts)) > max_payload:
            raise MessageError("MSG_TOO_LARGE", "header or payload is larger than the study allows", "envelope")
        forms = [(name, a.dtype, tuple(a.shape), a.stype) for name, a in sorted(arrays.items())]
        sizes = [len(part) for part in parts]
        if (
            set(record) != ({"envelope", "payload"} if parts else {"envelope"})
            or forms != [(f"{i:06d}", _DTYPE, (size,), _STYPE) for i, size in enumerate(sizes)]
            or any(size != PART_BYTES for size in sizes[:-1])
            or not all(0 < size <= PART_BYTES for size in sizes[-1:])
        ):
            raise MessageError("MSG_FORMAT", "the record holds something else, or parts of another form", "envelope")
        return cls(kind=kind, header=header, signature=signature, payload=b"".join(parts))

    def open(self, model: type[H], study: Study) -> H:
        """The header, after all checks that need no state: form, study, signature, payload.

        A header that names a hospital must be signed by it; any other by the coordinator.

        Raises:
            MessageError: MSG_FORMAT, MSG_STUDY, MSG_SENDER, MSG_SIGNATURE or MSG_TOO_LARGE.
        """
        if self.kind != model.__name__:
            raise MessageError("MSG_FORMAT", f"a message {model.__name__} was expected", "envelope")
        header = open_signed(model, self.header, self.signature, study)
        size, digest = getattr(header, "payload_bytes", 0), getattr(header, "payload_sha256", None)
        if len(self.payload) != size:
            raise MessageError("MSG_FORMAT", "the payload's length is not the one announced", self.kind)
        if digest is not None and hashlib.sha256(self.payload).hexdigest() != digest:
            raise MessageError("MSG_FORMAT", "the payload's hash is not the one announced", self.kind)
        return header


def parse(raw: bytes, model: type[H]) -> H:
    """A header from canonical JSON bytes.

    Raises:
        MessageError: MSG_FORMAT, a field is missing, unknown or out of range, or the bytes are not canonical.
    """
    try:
        header = model.model_validate_json(raw)
        canonical = header.canonical() == raw
    except (ValidationError, ValueError, RecursionError):
        raise MessageError("MSG_FORMAT", f"not a valid {model.__name__}", model.__name__) from None
    if not canonical:
        raise MessageError("MSG_FORMAT", f"{model.__name__} is not in canonical form", model.__name__)
    return header


def open_signed(model: type[H], raw: bytes, signature: str, study: Study) -> H:
    """A header of this study, signed by the hospital that it names, or by the coordinator if it names none.

    Raises:
        MessageError: MSG_FORMAT, MSG_STUDY, MSG_SENDER, MSG_SIGNATURE.
    """
    header = parse(raw, model)
    if header.study != study.hash:
        raise MessageError("MSG_STUDY", f"study {header.study[:12]} instead of {study.hash[:12]}", model.__name__)
    public = study.coordinator_key
    if "hospital" in model.model_fields:
        name = getattr(header, "hospital", "")
        if name not in {site.name for site in study.sites}:
            raise MessageError("MSG_SENDER", "the sender is not in the roster", model.__name__)
        public = study.site(name).signing_key
    keys.verify_hex(public, signature, raw, model.__name__)
    return header


def open_shown(model: type[H], signed: Signed, study: Study) -> H:
    """A signed header that somebody else shows. Raises like `open_signed`."""
    return open_signed(model, signed.header.encode(), signed.signature, study)


def open_certificate(certificate: Certificate, study: Study) -> dict[str, Update]:
    """The signed updates that a certificate lists, by hospital.

    Raises:
        MessageError: MSG_SIGNATURE, MSG_STUDY, MSG_SENDER or MSG_ROUND, wherever one of them is not what it should be:
            each member of the cohort exactly once, all of one round, attempt, cohort, key and starting model.
    """
    updates: dict[str, Update] = {}
    for signed in certificate.updates:
        update = open_shown(Update, signed, study)
        if update.hospital in updates or update.weight != study.site(update.hospital).weight:
            raise MessageError("MSG_SENDER", "an update counts twice or has another weight", "Certificate")
        if any(getattr(update, f) != getattr(certificate, f) for f in ROUND_FIELDS):
            raise MessageError("MSG_ROUND", "the certificate mixes rounds, attempts or cohorts", "Certificate")
        updates[update.hospital] = update
    if tuple(sorted(updates)) != tuple(sorted(certificate.cohort)):
        raise MessageError("MSG_ROUND", "the certificate does not list its cohort", "Certificate")
    if len({u.model_hash for u in updates.values()}) != 1:
        raise MessageError("MSG_ROUND", "updates of the certificate start from different models", "Certificate")
    return updates


def join_parts(parts: Sequence[bytes]) -> bytes:
    """Byte strings as one, each behind its length (8 bytes, little endian)."""
    return b"".join(len(part).to_bytes(8, "little") + part for part in parts)


def split_parts(data: bytes) -> list[bytes]:
    """The inverse of `join_parts`.

    Raises:
        MessageError: MSG_FORMAT, the lengths do not add up.
    """
    parts, start = [], 0
    while start < len(data):
        end = start + 8 + int.from_bytes(data[start : start + 8], "little")
        if start + 8 > len(data) or end > len(data):
            raise MessageError("MSG_FORMAT", "the lengths of the parts do not add up", "payload")
        parts.append(data[start + 8 : end])
        start = end
    return parts
