"""One record of the privacy ledger: its fields, its canonical line, its signature. Format 2.

    {"body":{...},"signature":"<128 hex digits>"}

A body holds strings, whole numbers, lists, objects and null, and never a floating-point number: 1.153 is written as
"1.153". Sorted keys without spaces are then RFC 8785 (JSON Canonicalization Scheme) in any language, and an auditor
needs no rules for printing numbers. A line that is not byte for byte the canonical form of what it says is refused (no
spare white space, doubled keys, NaN, or capital hex digits to hide a change in).

The signature is Ed25519 (RFC 8032) by the hospital over "fedmedgan ledger 2" and the canonical body.

kind            what it says
begin           first record of every ledger: its id, the key that signs it, the hospital's budget book
open            the terms of a study: budget, noise, sampling, steps, which patients
reserve         steps that a round is about to do
charge          steps that it did, and what the tests of noise, clipping and sampling said
void            a reservation under which no patient's data was touched
release         an update that left the hospital
anchor          a round's certificate, and how long every hospital's ledger was in it
rotate          from now on sums are opened with another key
override        the data owner allows this ledger beside others of the same patients
close           the study is over
tail_repaired   a line that was never acknowledged was cut off
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedmedgan.shared.errors import PrivacyError
from fedmedgan.shared.privacy.events import ADJACENCY, SAMPLING, UNIT, TrainingSteps, check_delta, real

FORMAT = 2
DOMAIN = b"fedmedgan ledger 2\n"
CHECKS = ("noise", "clipping", "rows", "sampling")
"""What is tested in every round (client/training/witness.py)."""
VERDICTS = ("passed", "failed", "too-few", "not-run")
LINE_START = b'{"body":{"'
_JSON = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False)


@dataclass(frozen=True)
class Record:
    """One verified record.

    `body` holds what was written. `line_sha256` is the hash of the raw line, which the next record names.
    """

    body: dict[str, Any]
    line_sha256: str

    @property
    def seq(self) -> int:
        """Running number, from 1."""
        return self.body["seq"]

    @property
    def kind(self) -> str:
        """One of the kinds above."""
        return self.body["kind"]


@dataclass(frozen=True)
class Terms:
    """What a study may do to this hospital's patients, as its `open` record says it."""

    delta: float
    ceiling: float
    """Epsilon that the study may spend here."""
    total_ceiling: float
    """Epsilon that all studies of the same patients may spend together."""
    noise_multiplier: float
    sampling_rate: float
    clip_norm: float
    steps: int
    """Of the whole study."""
    dataset: str
    """Keyed hash over the patients: 64 hex digits."""
    patients: int
    """As declared in the study, which is public; never the real number."""

    def __post_init__(self) -> None:
        for name in _REAL_TERMS:
            object.__setattr__(self, name, real(getattr(self, name), name))
        check_delta(self.delta)

    def fields(self) -> dict[str, Any]:
        """As they stand in the record."""
        values = {name: repr(v) if isinstance(v, float) else v for name, v in asdict(self).items()}
        return values | {"unit": UNIT, "adjacency": ADJACENCY, "sampling": SAMPLING}

    @classmethod
    def of(cls, body: dict[str, Any]) -> Terms:
        """Read an `open` record's body."""
        real_terms = {name: float(body[name]) for name in _REAL_TERMS}
        return cls(**real_terms, steps=body["steps"], dataset=body["dataset"], patients=body["patients"])


_REAL_TERMS = ("delta", "ceiling", "total_ceiling", "noise_multiplier", "sampling_rate", "clip_norm")


def event_fields(event: TrainingSteps) -> dict[str, Any]:
    """A run of steps as a `reserve` record holds it."""
    return {
        "noise_multiplier": repr(event.noise_multiplier),
        "sampling_rate": repr(event.sampling_rate),
        "steps": event.steps,
    }


def events_of(reserve: dict[str, Any]) -> list[TrainingSteps]:
    """The runs of steps of a `reserve` record's body."""
    return [_event(values) for values in reserve["events"]]


def canonical(body: dict[str, Any]) -> bytes:
    """RFC 8785, for bodies without floating-point numbers."""
    return _JSON.encode(body).encode()


def encode(body: dict[str, Any], signing: Ed25519PrivateKey) -> bytes:
    """The signed line of a body, with its newline.

    Raises:
        PrivacyError: LEDGER_STATE, a field is missing or not valid.
    """
    problem = _problem(body)
    if problem:
        raise PrivacyError("LEDGER_STATE", f"{body.get('kind')}: {problem}", f"record {body.get('seq')}")
    return _line(canonical(body), signing.sign(DOMAIN + canonical(body)).hex())


def decode(line: bytes, where: str) -> dict[str, Any]:
    """The body of a line. Its signature is not checked here, only its form.

    Raises:
        PrivacyError: LEDGER_CORRUPT unless the line is byte for byte what `encode` writes.
    """
    try:
        values = json.loads(line)
        body, signature = values["body"], values["signature"]
        problem = _problem(body) or ("" if _signature(signature) else "no signature")
        if not problem and _line(canonical(body), signature) != line:
            problem = "not canonical"
    except (ValueError, KeyError, TypeError, RecursionError):
        problem = "not a record"
    if problem:
        raise PrivacyError("LEDGER_CORRUPT", problem, where)
    return body


def is_signed(line: bytes, signing_key: str) -> bool:
    """Whether a line that `decode` let through was signed by the key (64 hex digits)."""
    body_end = line.rindex(b',"signature":"')
    try:
        _public(signing_key).verify(bytes.fromhex(line[-131:-3].decode()), DOMAIN + line[len(b'{"body":') : body_end])
    except (InvalidSignature, ValueError):
        return False
    return True


@lru_cache(maxsize=64)
def _public(signing_key: str) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(bytes.fromhex(signing_key))


def line_hash(line: bytes) -> str:
    """SHA-256 of a raw line with its newline: 64 hex digits."""
    return hashlib.sha256(line).hexdigest()


def _line(body: bytes, signature: str) -> bytes:
    return b'{"body":' + body + b',"signature":"' + signature.encode() + b'"}\n'


# ---- the fields of each kind


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= 10**9


def _pattern(pattern: str) -> Callable[[Any], bool]:
    fullmatch = re.compile(pattern).fullmatch
    return lambda value: isinstance(value, str) and fullmatch(value) is not None


def _one_of(*allowed: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in allowed


def _null(value: Any) -> bool:
    return value is None


def _text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 200 and value.isprintable()


def _decimal(value: Any) -> bool:
    """A positive number as a string, in the one way in which Python prints it."""
    try:
        number = float(value) if isinstance(value, str) else math.nan
    except ValueError:
        return False
    return 0 < number < 1e6 and repr(number) == value


def _event(values: Any) -> TrainingSteps:
    if not isinstance(values, dict) or set(values) != {"noise_multiplier", "sampling_rate", "steps"}:
        raise PrivacyError("PRIVACY_RANGE", "an event has exactly noise_multiplier, sampling_rate and steps", "event")
    if not (_decimal(values["noise_multiplier"]) and _decimal(values["sampling_rate"])):
        raise PrivacyError("PRIVACY_RANGE", "noise and sampling rate are numbers, written as strings", "event")
    return TrainingSteps(float(values["noise_multiplier"]), float(values["sampling_rate"]), values["steps"])


def _events(value: Any) -> bool:
    try:
        return isinstance(value, list) and len(value) > 0 and all(_event(v).steps > 0 for v in value)
    except PrivacyError:
        return False


def _list_of(valid: Callable[[Any], bool], least: int = 1) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) >= least and all(map(valid, value))


def _map_of(key: Callable[[Any], bool], valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(key, value)) and all(map(valid, value.values()))


_HASH = _pattern("[0-9a-f]{64}")
_NAME = _pattern("[a-z0-9][a-z0-9-]{0,30}")
_signature = _pattern("[0-9a-f]{128}")
_WORD = _pattern("[A-Za-z0-9._-]{1,60}")


def _head(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and _whole(1)(value[0]) and _HASH(value[1])


_COMMON: dict[str, Callable[[Any], bool]] = {
    "v": lambda value: type(value) is int and value == FORMAT,
    "seq": _whole(1),
    "prev": _HASH,
    "time": _pattern("[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z"),
    "hospital": _NAME,
    "study": _HASH,
    "kind": lambda value: True,
}
_KINDS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "begin": {"study": _null, "ledger": _HASH, "signing_key": _HASH, "book": _HASH},
    "open": {
        "unit": _one_of(UNIT),
        "adjacency": _one_of(ADJACENCY),
        "sampling": _one_of(SAMPLING),
        **dict.fromkeys(_REAL_TERMS, _decimal),
        "steps": _whole(1),
        "dataset": _HASH,
        "patients": _whole(1),
        "versions": _map_of(_WORD, _text),
    },
    "reserve": {"round": _whole(0), "events": _events},
    "charge": {
        "reserve": _whole(1),
        "steps": _list_of(_whole(0)),
        "noise_source": _text,
        "checks": lambda value: _map_of(_one_of(*CHECKS), _one_of(*VERDICTS))(value) and len(value) == len(CHECKS),
        "code": _HASH,
    },
    "void": {"reserve": _whole(1), "reason": _text},
    "release": {
        "round": _whole(0),
        "attempt": _whole(1),
        "what": _one_of("update"),
        "sha256": _HASH,
        "bytes": _whole(1),
    },
    "anchor": {"round": _whole(0), "certificate": _HASH, "heads": _map_of(_HASH, _head)},
    "rotate": {"epoch": _whole(1), "key_id": _pattern("[0-9a-f]{32}"), "members": _list_of(_NAME)},
    "override": {
        "study": _null,
        "ledgers": _list_of(_HASH),
        "reason": _text,
        "owner_key": _HASH,
        "owner_signature": _signature,
    },
    "close": {},
    "tail_repaired": {"study": _null, "removed_bytes": _whole(1), "removed_sha256": _HASH},
}
_FIELDS = {kind: {**_COMMON, **fields} for kind, fields in _KINDS.items()}


def _problem(body: Any) -> str:
    """What is wrong with the fields of a body, empty when nothing is."""
    if not isinstance(body, dict) or body.get("kind") not in _KINDS:
        return "not a known kind of record"
    fields = _FIELDS[body["kind"]]
    if body.keys() != fields.keys():
        return "missing or unknown fields"
    for name, valid in fields.items():
        if not valid(body[name]):
            return f"{name} is not valid"
    return ""


def not_run() -> dict[str, str]:
    """The verdicts of a round whose tests did not run."""
    return dict.fromkeys(CHECKS, "not-run")


def worst_checks(found: Iterable[dict[str, str]]) -> dict[str, str]:
    """One verdict for each test, of several networks that were trained: the worst; "not-run" where there is none."""
    order = ("failed", "not-run", "too-few", "passed")
    all_found = list(found)
    return {name: min((f[name] for f in all_found), key=order.index, default="not-run") for name in CHECKS}


def failed_checks(checks: dict[str, str]) -> Sequence[str]:
    """The names of the tests that failed."""
    return [name for name in CHECKS if checks[name] == "failed"]
