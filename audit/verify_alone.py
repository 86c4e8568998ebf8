#!/usr/bin/env python3
"""Check an audit bundle of one hospital without any code of fedmedgan.

    pip install cryptography
    python verify.py [FOLDER]

FOLDER is the unpacked bundle; by default the folder that this file lies in. Python 3.9 or later. Exit code: 0 if
nothing failed, 1 if something did. Take this file from a source that you trust, not from the hospital that you check: a
forged bundle can hold a forged verify.py.

What is checked
  files       every file is the one that SHA256SUMS lists, and no other file is there
  seal        the hospital signed SHA256SUMS
  study       the study has the hash that names it, all its hospitals signed it, and it lists the ledger's key
  chain       every record of the ledger has the one allowed form and holds the hash of the record before it, and the
              records follow each other: nothing is charged that was not reserved, a round counts in full until then
  signatures  the hospital signed every record
  anchors     the ledger holds every record that others have seen at its end (anchors.json)
  rounds      every update that a certificate lists was charged and released, and is the one that was sent
  noise       every step was reserved with just the noise and the sampling that the study fixed beforehand
  proof       no round's own tests of noise, clipping and sampling failed
  budget      epsilon of every study, and of all studies, within the ceiling that held when it was spent

Epsilon is an upper bound for adding or removing one patient with all images, Poisson sampling: Renyi differential
privacy (Mironov, Talwar, Zhang 2019) where that suffices, else a privacy loss distribution (Koskela, Jalko, Honkela
2020; Doroshenko, Ghazi, Kamath, Kumar, Manurangsi 2022).
"""

from __future__ import annotations

import cmath
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

BUNDLE_DOMAIN = b"fedmedgan audit bundle 1\n"
RECORD_DOMAIN = b"fedmedgan ledger 2\n"
SYSTEM_NOISE = "os-aes256ctr"
"""The one source of noise that nobody can repeat: the operating system, through AES-256."""
MAX_KINDS = 64
"""Kinds of steps (noise, rate) in one sum; each costs about a second, and no hospital has nearly as many."""
HOPELESS = 300.0
"""Above this the quick bound on epsilon is the answer: the precise one would need too large a grid."""

Body = dict[str, Any]
Check = Callable[[Any], bool]
Pair = tuple[float, float]
"""Noise multiplier and sampling rate."""
Spent = dict[Pair, int]
Losses = tuple[dict[int, float], float]


class Failed(Exception):
    """A check found something wrong: its one line says what."""


def require(condition: Any, what: str) -> None:
    if not condition:
        raise Failed(what)


# ---- canonical JSON and signatures


def canonical(value: Any) -> str:
    """RFC 8785, for keys in ASCII."""
    if isinstance(value, dict):
        return "{" + ",".join(canonical(key) + ":" + canonical(value[key]) for key in sorted(value)) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(canonical(item) for item in value) + "]"
    if isinstance(value, float):
        return number(value)
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def number(value: float) -> str:
    """A floating-point number as ECMAScript prints it (RFC 8785, section 3.2.2.3)."""
    if value == 0:
        return "0"
    sign, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
    text, point = "".join(map(str, digits)), len(digits) + int(exponent)
    if len(text) <= point <= 21:
        text += "0" * (point - len(text))
    elif 0 < point <= 21:
        text = text[:point] + "." + text[point:]
    elif -6 < point <= 0:
        text = "0." + "0" * -point + text
    else:
        text = text[0] + ("." + text[1:] if len(text) > 1 else "") + f"e{point - 1:+d}"
    return "-" + text if sign else text


def is_signed(public: Any, signature: Any, message: bytes) -> bool:
    """Ed25519 (RFC 8032); key of 64 and signature of 128 lower-case hex digits."""
    if not (is_hex(public, 64) and is_hex(signature, 128)):
        return False
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(bytes.fromhex(signature), message)
    except (InvalidSignature, ValueError):
        return False
    return True


def for_purpose(message: bytes, purpose: str) -> bytes:
    """What is signed of a message or of a study."""
    return b"fedmedgan/sign/v1\0" + hashlib.sha256(purpose.encode()).digest() + message


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ---- the form of a record


def is_hex(value: Any, digits: int) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{%d}" % digits, value) is not None  # noqa: UP031


def is_whole(value: Any, least: int = 0, most: int = 10**9) -> bool:
    return type(value) is int and least <= value <= most


def is_text(value: Any) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= 200 and value.isprintable()


def is_name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[a-z0-9][a-z0-9-]{0,30}", value) is not None


def is_word(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[A-Za-z0-9._-]{1,60}", value) is not None


def is_decimal(value: Any, least: float = 0.0, most: float = 1e6) -> bool:
    """A positive number below a million as a string, with just the digits that Python prints."""
    try:
        real = float(value) if isinstance(value, str) else math.nan
    except ValueError:
        return False
    return 0 < real < 1e6 and least <= real <= most and repr(real) == value


def is_event(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == {"noise_multiplier", "sampling_rate", "steps"}
        and is_decimal(value["noise_multiplier"], 0.3, 1000)
        and is_decimal(value["sampling_rate"], 0, 1)
        and is_whole(value["steps"], 1, 10**7)
    )


def is_list(value: Any, check: Check) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(check(item) for item in value)


def is_map(value: Any, key: Check, check: Check) -> bool:
    return isinstance(value, dict) and all(key(k) and check(v) for k, v in value.items())


def is_head(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and is_whole(value[0], 1) and is_hex(value[1], 64)


def is_hash(value: Any) -> bool:
    return is_hex(value, 64)


CHECKS = {"noise", "clipping", "rows", "sampling"}
VERDICTS = ("passed", "failed", "too-few", "not-run")
COMMON = {
    "v": lambda v: is_whole(v, 2, 2),
    "seq": lambda v: is_whole(v, 1),
    "prev": is_hash,
    "time": lambda v: (
        isinstance(v, str) and re.fullmatch("[0-9]{4}(-[0-9]{2}){2}T[0-9]{2}(:[0-9]{2}){2}Z", v) is not None
    ),
    "hospital": is_name,
    "study": is_hash,
    "kind": lambda v: True,
}
OF_NO_STUDY = {"study": lambda v: v is None}
KINDS = {
    "begin": {**OF_NO_STUDY, "ledger": is_hash, "signing_key": is_hash, "book": is_hash},
    "open": {
        "unit": lambda v: v == "patient",
        "adjacency": lambda v: v == "add-or-remove-one",
        "sampling": lambda v: v == "poisson",
        "delta": is_decimal,
        "ceiling": is_decimal,
        "total_ceiling": is_decimal,
        "noise_multiplier": is_decimal,
        "sampling_rate": is_decimal,
        "clip_norm": is_decimal,
        "steps": lambda v: is_whole(v, 1),
        "dataset": is_hash,
        "patients": lambda v: is_whole(v, 1),
        "versions": lambda v: is_map(v, is_word, is_text),
    },
    "reserve": {"round": is_whole, "events": lambda v: is_list(v, is_event)},
    "charge": {
        "reserve": lambda v: is_whole(v, 1),
        "steps": lambda v: is_list(v, is_whole),
        "noise_source": is_text,
        "checks": lambda v: is_map(v, CHECKS.__contains__, VERDICTS.__contains__) and set(v) == CHECKS,
        "code": is_hash,
    },
    "void": {"reserve": lambda v: is_whole(v, 1), "reason": is_text},
    "release": {
        "round": is_whole,
        "attempt": lambda v: is_whole(v, 1),
        "what": lambda v: v == "update",
        "sha256": is_hash,
        "bytes": lambda v: is_whole(v, 1),
    },
    "anchor": {"round": is_whole, "certificate": is_hash, "heads": lambda v: is_map(v, is_hash, is_head)},
    "rotate": {
        "epoch": lambda v: is_whole(v, 1),
        "key_id": lambda v: is_hex(v, 32),
        "members": lambda v: is_list(v, is_name),
    },
    "override": {
        **OF_NO_STUDY,
        "ledgers": lambda v: is_list(v, is_hash),
        "reason": is_text,
        "owner_key": is_hash,
        "owner_signature": lambda v: is_hex(v, 128),
    },
    "close": {},
    "tail_repaired": {**OF_NO_STUDY, "removed_bytes": lambda v: is_whole(v, 1), "removed_sha256": is_hash},
}


def record(line: bytes) -> tuple[Body, str] | None:
    """(body, signature) of a line with its newline; None unless it is byte for byte the canonical form of a record."""
    try:
        value = json.loads(line)
        body, signature = value["body"], value["signature"]
        fields = {**COMMON, **KINDS[body["kind"]]}
        good = set(body) == set(fields) and is_hex(signature, 128) and all(fields[name](body[name]) for name in fields)
        good = good and (canonical({"body": body, "signature": signature}) + "\n").encode() == line
    except (ValueError, KeyError, TypeError, RecursionError):
        good = False
    return (body, signature) if good else None


# ---- the ledger


class Ledger:
    """Records in their order, and what they add up to."""

    def __init__(self, raw: bytes) -> None:
        self.bodies: list[Body] = []
        self.signatures: list[str] = []
        self.hashes: list[str] = []
        self.terms: dict[str, Body] = {}  # study -> its latest `open`
        self.closed: set[str] = set()
        self.epochs: dict[str, int] = {}
        # Number -> [`reserve`, the `open` it was made under, steps done or None]; those taken back are gone.
        self.reserved: dict[int, list[Any]] = {}
        self.unsettled: set[int] = set()
        self.charged: dict[tuple[str, int], int] = {}
        self.released: set[tuple[str, int]] = set()
        *lines, tail = raw.split(b"\n")
        for line in lines:
            self.take(line + b"\n")
        # A write that was never acknowledged leaves the beginning of a line, or zero bytes after a power loss.
        start, written = b'{"body":{"', tail.rstrip(b"\0")[:10]
        torn = len(tail) <= 1 << 20 and start.startswith(written) and record(tail[:-1] + b"\n") is None
        require(not tail or torn, "the last line is damaged")
        require(self.bodies, "the ledger is empty")

    def take(self, line: bytes) -> None:
        found, seq = record(line), len(self.bodies) + 1
        if found is None:
            raise Failed(f"record {seq} is not a record in canonical form")
        body, signature = found
        require(body["seq"] == seq, f"record {seq} has another number: records were dropped, put in or swapped")
        previous = self.hashes[-1] if self.hashes else "0" * 64
        require(body["prev"] == previous, f"the chain is broken at record {seq}")
        require(seq == 1 or body["hospital"] == self.hospital, f"record {seq} is of another hospital")
        require((body["kind"] == "begin") == (seq == 1), f"record {seq}: `begin` is the first record, and no other")
        problem = self.problem(body)
        require(not problem, f"record {seq}: {problem}")
        self.bodies.append(body)
        self.signatures.append(signature)
        self.hashes.append(sha256(line))

    def problem(self, body: Body) -> str:
        """Why a record does not follow from those before it; empty if it does. Takes it in."""
        kind, study = body["kind"], body["study"]
        if study is None:
            return ""
        if study in self.closed:
            return "the study is closed"
        opened = self.terms.get(study)
        if kind == "open":
            if opened and opened["delta"] != body["delta"]:
                return "the study was opened with another delta"
            self.terms[study] = body
        elif opened is None:
            return "the study was never opened"
        if kind == "close":
            self.closed.add(study)
        if kind == "reserve":
            self.reserved[body["seq"]] = [body, opened, None]
            self.unsettled.add(body["seq"])
        if kind in ("charge", "void"):
            return self.settle(body)
        if kind == "release":
            if not self.paid(study, body["round"]):
                return "an update of a round for which nothing is spent"
            self.released.add((study, body["round"]))
        if kind == "rotate":
            if body["epoch"] <= self.epochs.get(study, 0):
                return "not a later key epoch"
            self.epochs[study] = body["epoch"]
        return ""

    def paid(self, study: str, number: int) -> int:
        """The most steps that one reservation of a round paid for: those charged, or all where it is unsettled."""
        waiting = [self.reserved[seq][0] for seq in self.unsettled]
        steps = [sum(e["steps"] for e in b["events"]) for b in waiting if (b["study"], b["round"]) == (study, number)]
        return max([self.charged.get((study, number), 0), *steps])

    def settle(self, body: Body) -> str:
        seq = body["reserve"]
        if seq not in self.unsettled or self.reserved[seq][0]["study"] != body["study"]:
            return "what it settles is not an open reservation of this study"
        reserve = self.reserved[seq][0]
        limits = [event["steps"] for event in reserve["events"]]
        place = (reserve["study"], reserve["round"])
        if body["kind"] == "void" and place in self.released:
            return "what it takes back was released"
        if body["kind"] == "void":
            del self.reserved[seq]
        elif len(body["steps"]) != len(limits) or any(body["steps"][i] > limits[i] for i in range(len(limits))):
            return "more steps charged than reserved"
        else:
            self.reserved[seq][2] = body["steps"]
            self.charged[place] = max(self.charged.get(place, 0), sum(body["steps"]))
        self.unsettled.discard(seq)
        return ""

    @property
    def hospital(self) -> str:
        return self.bodies[0]["hospital"]

    @property
    def key(self) -> str:
        return self.bodies[0]["signing_key"]

    def of(self, kind: str, study: str | None = None) -> list[Body]:
        return [body for body in self.bodies if body["kind"] == kind and study in (None, body["study"])]

    def spent(self, last: int, study: str | None = None) -> tuple[tuple[Pair, int], ...]:
        """((sigma, q), steps) of all reservations up to a record's number, settled as they were in the end."""
        total: Spent = {}
        for seq, (body, _, done) in self.reserved.items():
            if seq <= last and study in (None, body["study"]):
                for i, event in enumerate(body["events"]):
                    pair = (float(event["noise_multiplier"]), float(event["sampling_rate"]))
                    total[pair] = total.get(pair, 0) + (event["steps"] if done is None else done[i])
        return tuple(sorted((pair, steps) for pair, steps in total.items() if steps))


# ---- epsilon


@lru_cache(maxsize=4096)
def epsilon_of(spent: tuple[tuple[Pair, int], ...], delta: float, ceiling: float) -> float:
    """An upper bound, worked out tightly only where the quick one exceeds the ceiling; `spent` as sorted pairs."""
    steps = dict(spent)
    require(1e-10 <= delta < 0.1, f"delta {delta} is not between 1e-10 and 0.1")
    require(max(steps.values(), default=0) <= 10**7, "more than ten million steps of one kind")
    require(len(steps) <= MAX_KINDS, f"more than {MAX_KINDS} kinds of steps: use `fedmedgan audit recompute`")
    quick = epsilon_rdp(steps, delta)
    return min(quick, epsilon_pld(steps, delta)) if ceiling < quick < HOPELESS else quick


ORDERS = (*range(2, 65), *range(72, 129, 8), *range(144, 257, 16), 320, 384, 448, 512, 768, 1024)


def epsilon_rdp(spent: Spent, delta: float) -> float:
    """Upper bound by Renyi divergences of whole orders (Mironov, Talwar, Zhang 2019, section 3.3)."""
    best = math.inf
    for order in ORDERS:
        rdp = sum(steps * renyi(sigma, q, order) for (sigma, q), steps in spent.items())
        # Canonne, Kamath, Steinke 2020, Proposition 12.
        best = min(best, rdp + math.log1p(-1 / order) - math.log(delta * order) / (order - 1))
    return max(0.0, best) if spent else 0.0


def renyi(sigma: float, q: float, order: int) -> float:
    if q == 1:
        return order / (2 * sigma**2)
    terms = [
        math.lgamma(order + 1) - math.lgamma(k + 1) - math.lgamma(order - k + 1)
        + (order - k) * math.log1p(-q) + k * math.log(q) + k * (k - 1) / (2 * sigma**2)
        for k in range(order + 1)
    ]  # fmt: skip
    largest = max(terms)
    return (largest + math.log(sum(math.exp(term - largest) for term in terms))) / (order - 1)


def epsilon_pld(spent: Spent, delta: float) -> float:
    """Upper bound by the distribution of the privacy loss, tight to about 1%; the larger of adding and removing."""
    narrowest = min(q / sigma for sigma, q in spent)
    step = min(1e-3, max(1e-4 if min(spent)[0] < 2 else 1e-5, narrowest / 20))
    return max(composed(spent, delta, step, adding) for adding in (False, True))


def composed(spent: Spent, delta: float, step: float, adding: bool) -> float:
    """Epsilon of all steps together: one step's losses on a grid, convolved by Fourier transforms."""
    single = {pair: losses(*pair, step, adding, delta / 1e4 / sum(spent.values())) for pair in spent}
    lowest, highest = (far(single, spent, step, sign, delta / 1e4) for sign in (-1, 1))
    if highest - lowest >= 1 << 19:  # losses are rounded up on a coarser grid too: looser, never wrong
        return composed(spent, delta, 2 * step, adding)
    size = 1 << (highest - lowest).bit_length()
    roots = [cmath.exp(-2j * math.pi * k / size) for k in range(size // 2)]
    product: list[complex] = [1.0] * size
    for pair, steps in spent.items():
        masses: list[complex] = [0.0] * size
        for index, mass in single[pair][0].items():
            masses[index % size] += mass
        product = [a * b**steps for a, b in zip(product, transform(masses, roots))]  # noqa: B905
    sums = [value.real / size for value in transform([value.conjugate() for value in product], roots)]
    left = delta * (1 - 1e-4) - sum(steps * single[pair][1] for pair, steps in spent.items())
    above = below = 0.0
    for index in range(highest, -1, -1):
        # From this point up to the next one, the delta of an epsilon is above - exp(epsilon) * below.
        if above - math.exp(index * step) * below > left:
            return math.log((above - left) / below)
        mass = max(0.0, sums[index % size])
        above, below = above + mass, below + mass * math.exp(-index * step)
    return 0.0


def losses(sigma: float, q: float, step: float, adding: bool, tail: float) -> Losses:
    """The privacy loss of one step on a grid: {index: mass}, and the mass beyond the grid, at most `tail`.

    Both distributions of a cell keep their mass: it is split between the ends of the cell so that neither changes
    (Doroshenko et al. 2022, "connect the dots"), which never understates epsilon.
    """
    reach = sigma * math.sqrt(-2 * math.log(2 * tail))

    def loss(x: float) -> float:
        return math.log1p(q * math.expm1((2 * x - 1) / (2 * sigma**2)))

    def edge(index: int) -> float:
        y = math.expm1(index * step) / q
        return sigma**2 * math.log1p(y) + 0.5 if y > -1 else -math.inf

    def both(a: float, b: float) -> tuple[float, float]:
        """Masses between two points: with the patient, and without."""
        without = mass(a / sigma, b / sigma)
        return (1 - q) * without + q * mass((a - 1) / sigma, (b - 1) / sigma), without

    low, high = math.floor(loss(-reach) / step), math.ceil(loss(1 + reach) / step)
    edges = [edge(index) for index in range(low, high + 1)]
    lower, upper = both(-math.inf, edges[0]), both(edges[-1], math.inf)
    masses, beyond = ({-high: upper[1]}, lower[1]) if adding else ({low: lower[0]}, upper[0])
    for index in range(low, high):
        p, other = both(edges[index - low], edges[index - low + 1])
        near, next_one = index, index + 1
        if adding:
            p, other, near, next_one = other, p, -index - 1, -index
        ratio = math.exp(-near * step)
        part = (p * ratio - other) / (ratio - math.exp(-next_one * step))
        part = min(max(part, 0.0), p)
        masses[near] = masses.get(near, 0.0) + p - part
        masses[next_one] = masses.get(next_one, 0.0) + part
    return {index: mass for index, mass in masses.items() if mass > 0}, beyond


def mass(a: float, b: float) -> float:
    """Of the standard normal distribution between two points, precise in both tails."""
    if b <= 0:
        a, b = -b, -a
    if a >= 0:
        return (math.erfc(a / math.sqrt(2)) - math.erfc(b / math.sqrt(2))) / 2
    return (math.erf(b / math.sqrt(2)) - math.erf(a / math.sqrt(2))) / 2


def far(single: dict[Pair, Losses], spent: Spent, step: float, sign: int, tail: float) -> int:
    """Grid index beyond which at most `tail` of the composed loss lies, above (sign 1) or below (Chernoff's bound)."""
    bounds = []
    for power in (sign * 2.0**k for k in range(-4, 11)):
        moment = 0.0
        for pair, steps in spent.items():
            exponents = [(power * index * step, mass) for index, mass in single[pair][0].items()]
            largest = max(exponents)[0]
            moment += steps * (largest + math.log(sum(mass * math.exp(e - largest) for e, mass in exponents)))
        bounds.append(math.ceil((moment - math.log(tail)) / power / step))
    return min(bounds) if sign > 0 else max(bounds)


def transform(values: list[complex], roots: list[complex]) -> list[complex]:
    """Discrete Fourier transform; the length is a power of two, and `roots` are its first half of unit roots."""
    if len(values) == 1:
        return values
    even, odd = transform(values[::2], roots[::2]), transform(values[1::2], roots[::2])
    turned = [root * value for root, value in zip(roots, odd)]  # noqa: B905
    pairs = list(zip(even, turned))  # noqa: B905
    return [a + b for a, b in pairs] + [a - b for a, b in pairs]


# ---- the checks: each returns a line, or raises Failed, or NotRun with what to bring


class NotRun(Exception):
    """A check that needs more than is here."""


class Bundle:
    """The files of an unpacked bundle."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.chained: Ledger | None = None  # until `chain` has passed
        self.signed: Body | None = None  # until `study` has passed
        self.study_hash = ""

    @property
    def ledger(self) -> Ledger:
        if self.chained is None:
            raise NotRun("needs a ledger whose chain is whole")
        return self.chained

    @property
    def agreed(self) -> Body:
        """The study as its hospitals signed it."""
        if self.signed is None:
            raise NotRun("needs a study that its hospitals signed (study.json)")
        return self.signed

    def read(self, name: str) -> bytes:
        path = self.folder / name
        try:
            require(not path.is_symlink(), f"{name} is a link")
            return path.read_bytes()
        except OSError:
            raise Failed(f"{name} cannot be read") from None

    def json(self, name: str) -> Any:
        try:
            return json.loads(self.read(name))
        except (ValueError, RecursionError):
            raise Failed(f"{name} is not JSON") from None

    def site(self) -> Body:
        """The hospital's entry in the study."""
        site: Body = next((site for site in self.agreed["sites"] if site["name"] == self.ledger.hospital), {})
        require(site, "the study does not list the ledger's hospital")
        return site

    def certificates(self) -> Iterator[tuple[str, Body]]:
        """(file name, its header) of every round's certificate, each signed by the coordinator."""
        for path in sorted(self.folder.glob("certificates/*.json")):
            name = f"certificates/{path.name}"
            signed = self.json(name)
            header = json.loads(opened(signed, self.agreed["coordinator_key"], "Certificate", name))
            require(header["study"] == self.study_hash, f"{name} is of another study")
            yield name, header

    def own_updates(self) -> list[tuple[str, Body]]:
        """This hospital's own signed words in the certificates: (file name, header)."""
        keys = {site["name"]: site["signing_key"] for site in self.agreed["sites"]}
        own = []
        for name, certificate in self.certificates():
            for signed in certificate["updates"]:
                update = json.loads(signed["header"])
                opened(signed, keys.get(update["hospital"], ""), "Update", name)
                same = all(update[field] == certificate[field] for field in ("study", "round", "attempt"))
                require(same, f"{name} holds an update of another round")
                own += [(name, update)] if update["hospital"] == self.ledger.hospital else []
        return own


def needs(value: Any, what: str) -> None:
    if not value:
        raise NotRun(f"needs {what}")


def opened(signed: Body, public: str, purpose: str, name: str) -> str:
    """The header of a signed message."""
    header: str = signed["header"]
    require(
        is_signed(public, signed["signature"], for_purpose(header.encode(), purpose)), f"{name}: a signature is wrong"
    )
    return header


def check_files(bundle: Bundle) -> str:
    listed = {}
    for line in bundle.read("SHA256SUMS").decode().splitlines():
        digest, name = line[:64], line[66:]
        require(is_hash(digest) and line[64:66] == "  " and name not in listed, "SHA256SUMS has a strange line")
        listed[name] = digest
    files = [path for path in bundle.folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    there = {path.relative_to(bundle.folder).as_posix() for path in files} - {"SHA256SUMS", "SHA256SUMS.sig"}
    odd = sorted(there ^ set(listed))
    require(not odd, f"missing, or not listed: {', '.join(odd[:3])}")
    wrong = [name for name in sorted(listed) if sha256(bundle.read(name)) != listed[name]]
    require(not wrong, f"changed: {', '.join(wrong[:3])}")
    return f"{len(listed)} files are as SHA256SUMS lists them"


def check_seal(bundle: Bundle) -> str:
    signature = bundle.read("SHA256SUMS.sig").decode().rstrip("\n")
    message = BUNDLE_DOMAIN + bundle.read("SHA256SUMS")
    require(is_signed(bundle.ledger.key, signature, message), "SHA256SUMS was not signed with the ledger's key")
    return f"signed with the key {bundle.ledger.key}"


def check_study(bundle: Bundle) -> str:
    agreement = bundle.json("study.json")
    study = agreement["study"]
    named = sha256(canonical(study).encode())
    require(named == agreement["hash"], "the study is not the one that its hash names")
    for site in study["sites"]:
        signature = agreement["signatures"].get(site["name"])
        good = is_signed(site["signing_key"], signature, for_purpose(named.encode(), "study"))
        require(good, f"{site['name']} did not sign the study")
    bundle.signed, bundle.study_hash = study, named
    require(bundle.site()["signing_key"] == bundle.ledger.key, "the study lists another key for this hospital")
    return f"{len(study['sites'])} hospitals signed the study {named}"


def check_chain(bundle: Bundle) -> str:
    bundle.chained = Ledger(bundle.read("ledger.jsonl"))
    return f"{len(bundle.ledger.bodies)} records of {bundle.ledger.hospital} follow each other"


def check_signatures(bundle: Bundle) -> str:
    ledger = bundle.ledger
    for seq, (body, signature) in enumerate(zip(ledger.bodies, ledger.signatures), start=1):  # noqa: B905
        good = is_signed(ledger.key, signature, RECORD_DOMAIN + canonical(body).encode())
        require(good, f"record {seq} was not signed with the ledger's key")
    return f"all {len(ledger.bodies)} records are signed"


def check_anchors(bundle: Bundle) -> str:
    held = bundle.json("anchors.json") if (bundle.folder / "anchors.json").exists() else []
    require(isinstance(held, list), "anchors.json is not a list")
    heads = [(anchor["seq"], anchor["head"], anchor["by"]) for anchor in held]
    heads += [(u["ledger_seq"], u["ledger_head"], name) for name, u in bundle.own_updates()] if bundle.signed else []
    needs(heads, "certificates, or the heads of this ledger that other hospitals hold (anchors.json)")
    hashes = bundle.ledger.hashes
    for seq, head, by in heads:
        require(seq <= len(hashes), f"rolled back: it ends at record {len(hashes)}, {by} has seen record {seq}")
        require(seq == 0 or hashes[seq - 1] == head, f"forked: record {seq} is not the one that {by} has seen")
    return f"the ledger holds all {len(heads)} records that others have seen at its end"


def steps_per_round(study: dict) -> int:
    """Private steps of one hospital in a round: of the discriminator, and of a generator that reads patients too."""
    t, both = study["training"], study["gan"]["private"] == "both"
    return t["local_steps"] + (t["local_steps"] // t["discriminator_steps"] if both else 0)


def check_rounds(bundle: Bundle) -> str:
    updates = bundle.own_updates()
    needs(updates, "certificates that list this hospital")
    needs(bundle.agreed["privacy"]["unit"] != "none", "a study that promises privacy: this one does not")
    released = {(b["round"], b["attempt"], b["sha256"]) for b in bundle.ledger.of("release", bundle.study_hash)}
    needed = steps_per_round(bundle.agreed)
    for name, update in updates:
        paid = bundle.ledger.paid(bundle.study_hash, update["round"])
        require(paid >= needed, f"{name}: round {update['round']} took {needed} steps, {paid} were reserved or charged")
        sent = (update["round"], update["attempt"], update["payload_sha256"])
        require(sent in released, f"{name}: the update of round {update['round']} was never recorded as released")
    return f"all {len(updates)} updates in certificates were charged and released"


def check_noise(bundle: Bundle) -> str:
    for terms in bundle.ledger.of("open"):
        plan = (((float(terms["noise_multiplier"]), float(terms["sampling_rate"])), terms["steps"]),)
        event = {name: terms[name] for name in ("noise_multiplier", "sampling_rate", "steps")}
        require(is_event(event), f"record {terms['seq']}: noise or sampling is out of range")
        epsilon = epsilon_of(plan, float(terms["delta"]), float(terms["ceiling"]))
        good = within(epsilon, float(terms["ceiling"]))
        require(
            good, f"record {terms['seq']}: with this noise the study would cost {epsilon:.4g} of {terms['ceiling']}"
        )
    for seq, (body, terms, _) in bundle.ledger.reserved.items():
        fixed = (terms["noise_multiplier"], terms["sampling_rate"])
        for event in body["events"]:
            same = (event["noise_multiplier"], event["sampling_rate"]) == fixed
            require(same, f"record {seq}: other noise or sampling than the study was opened with")
    for body in bundle.ledger.of("charge"):
        require(
            body["noise_source"] == SYSTEM_NOISE,
            f"record {body['seq']}: noise of {body['noise_source']!r} protects nobody",
        )
    if not bundle.signed:
        return "every step has the noise of its study's terms; needs study.json to compare those with the study"
    study, site = bundle.agreed, bundle.site()
    agreed = {
        "delta": study["privacy"]["delta"],
        "clip_norm": study["privacy"]["clip_norm"],
        "sampling_rate": study["training"]["patients_per_step"] / site["patients"],
        "steps": study["training"]["rounds"] * steps_per_round(study),
        "patients": site["patients"],
    }
    for terms in bundle.ledger.of("open", bundle.study_hash):
        other = [name for name, value in agreed.items() if float(terms[name]) != value]
        require(not other, f"record {terms['seq']}: not as in the study: {', '.join(other)}")
        require(
            float(terms["ceiling"]) <= study["privacy"]["epsilon"],
            f"record {terms['seq']}: a higher ceiling than the study's",
        )
    return "every step has the noise and the sampling that were fixed beforehand"


def check_proof(bundle: Bundle) -> str:
    charges = bundle.ledger.of("charge")
    needs(charges, "a round that was charged")
    for body in charges:
        failed = sorted(name for name, verdict in body["checks"].items() if verdict == "failed")
        require(not failed, f"record {body['seq']}: the round's own test failed: {', '.join(failed)}")
    weak = sum(set(body["checks"].values()) != {"passed"} for body in charges)
    return f"tests of {len(charges)} rounds: none failed, {weak} not all run or with too few values"


def check_budget(bundle: Bundle) -> str:
    ledger, lines = bundle.ledger, []
    groups: dict[int, tuple[int, Body]] = {}  # number of an `open` -> its last reservation, its terms
    for seq, (_, terms, _) in ledger.reserved.items():
        groups[terms["seq"]] = (max(seq, groups.get(terms["seq"], (0, terms))[0]), terms)
    for last, terms in groups.values():
        delta, study = float(terms["delta"]), terms["study"]
        for what, of, ceiling in (("study " + study[:12], study, "ceiling"), ("all studies", None, "total_ceiling")):
            limit = float(terms[ceiling])
            epsilon = epsilon_of(ledger.spent(last, of), delta, limit)
            line = f"{what}: epsilon {epsilon:.4g} of {limit:g} at delta {delta:g}"
            require(within(epsilon, limit), f"{line} (up to record {last})")
            lines.append(line)
    return "; ".join(lines[-2:]) or "nothing was spent"


def within(epsilon: float, ceiling: float) -> bool:
    """A ten-thousandth for rounding: the hospital's accountants and this one work on different grids."""
    return epsilon <= ceiling * 1.0001 + 1e-5


CHECKS_IN_ORDER = (
    ("chain", check_chain),
    ("files", check_files),
    ("seal", check_seal),
    ("study", check_study),
    ("signatures", check_signatures),
    ("anchors", check_anchors),
    ("rounds", check_rounds),
    ("noise", check_noise),
    ("proof", check_proof),
    ("budget", check_budget),
)


def verdict(check: Callable[[Bundle], str], bundle: Bundle) -> tuple[str, str]:
    """("passed", "FAILED" or "not run", a line)."""
    try:
        return "passed", check(bundle)
    except Failed as problem:
        return "FAILED", str(problem)
    except NotRun as problem:
        return "not run", str(problem)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        return "FAILED", f"a file does not have the form that it should have ({type(problem).__name__})"


def main(arguments: list[str]) -> int:
    folder = Path(arguments[0]) if arguments else Path(__file__).resolve().parent
    bundle = Bundle(folder)
    found = [(name, *verdict(check, bundle)) for name, check in CHECKS_IN_ORDER]
    for name, result, line in found:
        print(f"{name:<11} {result:<8} {line}")
    if bundle.chained:
        print(f"\nThe ledger ends with record {len(bundle.ledger.hashes)}, {bundle.ledger.hashes[-1]}.")
        print("Compare this, the study's hash and the key above with another hospital of the study.")
    failed = sum(result == "FAILED" for _, result, _ in found)
    missing = sum(result == "not run" for _, result, _ in found)
    print(f"\n{failed} checks failed, {missing} were not run.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
