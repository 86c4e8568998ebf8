"""R11: is an encrypted sum exact, and how far from not being so? R12: does a hospital notice a server's every trick?

R12 tries every kind of manipulation on real ciphertexts, 50 times with the masks of the cohort and 50 times without:
with masks a wrong cohort is noise anyway, without them MAC and presence have to find it alone. The server lies as well
as it can: it frames and signs what it made, and its certificate shows the honest hospitals' own signed words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import tenseal.sealapi as seal
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from faults.cohort import Cohort
from faults.figures import Figure, at_least, slug
from fedmedgan.shared.errors import FedMedGanError
from fedmedgan.shared.messages import Certificate, Envelope, RoundOpen, parse
from fedmedgan.shared.secure_sum import cipher
from fedmedgan.shared.secure_sum.quantize import PLAIN_MODULUS, Slots
from fedmedgan.shared.study import MAX_SITES

NAME = "crypto"
NOTES = [
    "R11: 32 sums of 312,500 values, 3 to 100 hospitals, 4 to 16 bits, with masks and proof; one of 100 hospitals.",
    "R11_first_wrong_repeats: one ciphertext added to itself more than the 100 times that are allowed, the worst noise",
    "R11_first_wrong_repeats: that adding can make; the smallest of all tried. docs/decisions/0002 promises 381.",
    "R11_noise_budget_bits: by SEAL's measure; for each bit noise could double once more. The design has 10 bits:",
    "R11_noise_budget_bits: not kept. They were for noise without a bound. Here it has one (docs/decisions/0002).",
    "R12: each kind 50 times with masks and 50 times without. R12_honest_refused are honest sums between them.",
]

# ---- R11

SUM_VALUES, SUM_SITES, SUM_BITS = 312_500, (3, 4, 5, 8, 10, 16, 20, 32), (4, 8, 12, 16)
CIPHERTEXTS = 40


def measure(size: float) -> list[Figure]:
    n_values = at_least(size, SUM_VALUES, 5)
    cells = [(n, bits) for bits in SUM_BITS for n in SUM_SITES]
    cells[SUM_SITES.index(32) + len(SUM_SITES)] = (MAX_SITES, 8) if size == 1 else (33, 8)
    cells = cells[:: max(1, round(0.1 / size))]
    mismatches = sum(wrong_values(n, bits, n_values, case) for case, (n, bits) in enumerate(cells))
    return [
        Figure("R11_sums", len(cells), ">= 32"),
        Figure("R11_values", len(cells) * n_values, ">= 10000000"),
        Figure("R11_mismatches", mismatches, "== 0"),
        Figure("R11_first_wrong_repeats", first_wrong_repeats(at_least(size, CIPHERTEXTS)), ">= 382"),
        *noise_budgets(at_least(size, CIPHERTEXTS // 10)),
        *manipulations(at_least(size, REPEATS)),
    ]


def wrong_values(n_sites: int, bits: int, n_values: int, case: int) -> int:
    """One sum of a whole cohort: values that are not what plain integers say."""
    rng = np.random.default_rng([11, case])
    cohort = Cohort([int(w) for w in rng.integers(1, 4, n_sites)], n_values, bits)
    opened, total = cohort.open_round(), cipher.AddOnly(cohort.n_blobs)
    expected = np.zeros(n_values, dtype=np.int64)
    for site, weight in enumerate(cohort.weights):
        levels = cohort.levels(rng)
        if case % 4 == 1:
            levels[rng.random(n_values) < 0.5] = cohort.plan.levels - 1
        elif case % 4 == 2:
            levels[:] = cohort.plan.levels - 1  # the largest sum that there is
        elif case % 4 == 3:
            levels[:] = 0
        expected += weight * levels
        total.add(cohort.cipher.encrypt(cohort.seal(site, levels, opened)))
    updates = [cohort.signed_payload(site, b"", opened) for site in range(n_sites)]
    payload = cohort.sum_payload(total.result(), opened)
    try:
        sums = cohort.open_sum(cohort.certificate(opened, updates, payload))
    except FedMedGanError:
        return n_values
    return int(np.count_nonzero(sums != expected))


def first_wrong_repeats(ciphertexts: int) -> int:
    """How often one ciphertext can be added to itself until a slot is wrong: the smallest of many."""
    secret, slots = cipher.HospitalCipher(cipher.new_secret()), np.arange(cipher.RING_DEGREE, dtype=np.int64)
    server = Server()

    def exact(blob: bytes, times: int) -> bool:
        return np.array_equal(secret.decrypt(server.times([blob], times), slots.size), slots * times % PLAIN_MODULUS)

    least = 1 << 14
    for _ in range(ciphertexts):
        blob = secret.encrypt(slots)[0]
        right, wrong = 1, 1 << 14
        while wrong - right > 1:
            middle = (right + wrong) // 2
            right, wrong = (middle, wrong) if exact(blob, middle) else (right, middle)
        least = min(least, wrong)
    return least


def noise_budgets(sums: int) -> list[Figure]:
    """SEAL's noise budget in bits, the smallest of some sums: of 100 hospitals, and of 100 times the same upload."""
    secret = cipher.new_secret()
    hospital, server = cipher.HospitalCipher(secret), Server()
    meter = seal.Decryptor(cipher._context(), cipher._load_secret(secret))
    slots = np.random.default_rng(100).integers(0, PLAIN_MODULUS, cipher.RING_DEGREE)

    def bits(blobs: Blobs) -> int:
        with cipher._Scratch() as scratch:
            return int(meter.invariant_noise_budget(scratch.load_ciphertext(blobs[0])))

    uploads = [[hospital.encrypt(slots) for _ in range(MAX_SITES)] for _ in range(sums)]
    fresh = min(bits(server.add(*hundred)) for hundred in uploads)
    copies = min(bits(server.times(hundred[0], MAX_SITES)) for hundred in uploads)
    return [
        Figure("R11_noise_budget_bits_100_hospitals", fresh, ">= 1"),
        Figure("R11_noise_budget_bits_100_copies", copies, ">= 1"),
    ]


# ---- R12

REPEATS, MIN_KINDS = 50, 12
N_SITES, N_VALUES = 5, 20_000
PRESENT = (0, 1, 2, 3)
"""The cohort; hospital 4 of the study is not in it. Weights are equal, so that nothing is told by them alone."""
ROUND, OTHER_ROUND = 7, 6

Blobs = list[bytes]


class Server:
    """What can be done to ciphertexts without any key."""

    def __init__(self) -> None:
        self._context = cipher._context()
        self._evaluator, self._encoder = seal.Evaluator(self._context), seal.BatchEncoder(self._context)

    def add(self, *uploads: Sequence[bytes]) -> Blobs:
        total = cipher.AddOnly(len(uploads[0]))
        for blobs in uploads:
            total.add(blobs)
        return total.result()

    def plus(self, blobs: Sequence[bytes], changes: dict[int, int]) -> Blobs:
        """With numbers added to some slots."""
        delta = np.zeros(len(blobs) * cipher.RING_DEGREE, dtype=np.int64)
        for slot, change in changes.items():
            delta[slot] = change % PLAIN_MODULUS
        plain, out = seal.Plaintext(), []
        with cipher._Scratch() as scratch:
            for blob, row in zip(blobs, delta.reshape(len(blobs), -1), strict=True):
                item = scratch.load_ciphertext(blob)
                self._encoder.encode(row.tolist(), plain)
                self._evaluator.add_plain_inplace(item, plain)
                out.append(scratch.save(item))
        return out

    def scaled(self, blobs: Sequence[bytes], by: int) -> Blobs:
        """Every slot times a number."""
        plain, out = seal.Plaintext(), []
        self._encoder.encode([by] * cipher.RING_DEGREE, plain)
        with cipher._Scratch() as scratch:
            for blob in blobs:
                item = scratch.load_ciphertext(blob)
                self._evaluator.multiply_plain_inplace(item, plain)
                out.append(scratch.save(item))
        return out

    def times(self, blobs: Sequence[bytes], times: int) -> Blobs:
        """The sum of that many copies, by doubling: the noise is that of adding them one by one."""
        out = []
        with cipher._Scratch() as scratch:
            for blob in blobs:
                total = scratch.load_ciphertext(blob)
                for digit in bin(times)[3:]:
                    self._evaluator.add_inplace(total, total)
                    if digit == "1":
                        self._evaluator.add_inplace(total, scratch.load_ciphertext(blob))
                out.append(scratch.save(total))
        return out


class Case:
    """One round of the cohort, and what the server has seen of other rounds and attempts."""

    def __init__(self, cohort: Cohort, rng: np.random.Generator, *, masked: bool) -> None:
        self.cohort, self.rng, self.masked, self.server = cohort, rng, masked, Server()
        self.opened = cohort.open_round(ROUND, 2, PRESENT)
        self.earlier_attempt = cohort.open_round(ROUND, 1)
        self.earlier_round = cohort.open_round(OTHER_ROUND, 1, PRESENT)
        self.n = cohort.plan.n_slots
        self.levels = cache(lambda site, round: cohort.levels(rng))
        self.upload = cache(self._upload)

    def _upload(self, site: int, opened: RoundOpen) -> Blobs:
        levels = self.levels(site, opened.round)  # a further attempt seals the same update again
        masked = self.masked and self.cohort.names[site] in opened.cohort
        return self.cohort.cipher.encrypt(self.cohort.seal(site, levels, opened, masked=masked))

    def sum(self, sites: Sequence[int] = PRESENT, opened: RoundOpen | None = None) -> Blobs:
        return self.server.add(*(self.upload(site, opened or self.opened) for site in sites))

    def mixed(self, opened: dict[int, RoundOpen]) -> Blobs:
        """The cohort, with some hospitals' uploads of another round or attempt."""
        return self.server.add(*(self.upload(site, opened.get(site, self.opened)) for site in PRESENT))

    def one(self) -> int:
        """Any hospital of the cohort."""
        return int(self.rng.choice(PRESENT))

    def others(self, site: int) -> list[int]:
        return [other for other in PRESENT if other != site]

    def slot(self) -> int:
        """Any slot of the data."""
        return int(self.rng.integers(self.n))

    def number(self) -> int:
        """Anything but 0 modulo t."""
        return int(self.rng.integers(1, PLAIN_MODULUS))

    def certified(self, blobs: Blobs) -> Envelope:
        """As the server sends it: framed, and with the signed words of the cohort."""
        return self.envelope(self.cohort.sum_payload(blobs, self.opened))

    def envelope(self, payload: bytes) -> Envelope:
        updates = [self.cohort.signed_payload(site, b"", self.opened) for site in PRESENT]
        return self.cohort.certificate(self.opened, updates, payload)

    def true_sums(self) -> Slots:
        return sum(self.cohort.weights[i] * self.levels(i, ROUND) for i in PRESENT)


def _flipped(case: Case, data: bytes) -> bytes:
    """One bit, but not among the low ones of a coefficient that are noise: those carry no number."""
    raw = bytearray(data)
    raw[8 * int(case.rng.integers(200, len(raw) // 8 - 200)) + 5 + len(raw) % 8] ^= 1 << int(case.rng.integers(8))
    return bytes(raw)


def _flip_blob(case: Case, blobs: Blobs) -> Blobs:
    out, which = list(blobs), int(case.rng.integers(len(blobs)))
    raw = bytearray(out[which])
    header = len(raw) % 8  # coefficients of 8 bytes fill the end of a serialised ciphertext
    place = header + 8 * int(case.rng.integers(40, len(raw) // 8 - 40)) + 4
    raw[place] ^= 1 << int(case.rng.integers(8))
    out[which] = bytes(raw)
    return out


def _omit(case: Case) -> Blobs:
    return case.sum(case.others(case.one()))


def _omit_and_forge_presence(case: Case) -> Blobs:
    out = case.one()
    return case.server.plus(case.sum(case.others(out)), {case.n + out: case.cohort.weights[out]})


def _another_twice(case: Case) -> Blobs:
    out = case.one()
    return case.sum([*case.others(out), case.others(out)[0]])


def _exchanged(case: Case) -> Blobs:
    """Two hospitals' uploads of this attempt, for those of the earlier one."""
    first = case.one()
    return case.mixed({first: case.earlier_attempt, case.others(first)[0]: case.earlier_attempt})


def _stranger_key(case: Case, slots: Callable[[], Slots]) -> Blobs:
    return cipher.HospitalCipher(_stranger_secret()).encrypt(slots())


@cache
def _stranger_secret() -> bytes:
    return cipher.new_secret()


def _noise(case: Case) -> Blobs:
    places = range(case.n)
    return case.server.plus(case.sum(), dict(zip(places, case.rng.integers(1, 1000, case.n).tolist(), strict=True)))


def _undone(case: Case) -> Blobs:
    slot, number = case.slot(), case.number()
    return case.server.plus(case.sum(), {slot: number, (slot + 1) % case.n: -number})


def _mixed_ciphertexts(case: Case) -> Blobs:
    return [case.sum(opened=case.earlier_round)[0], *case.sum()[1:]]


def _smaller_cohort(case: Case) -> Envelope:
    """Everybody is in the sum, and the certificate says otherwise."""
    opened = case.opened.model_copy(update={"cohort": case.opened.cohort[:3]})
    updates = [case.cohort.signed_payload(site, b"", opened) for site in PRESENT[:3]]
    return case.cohort.certificate(opened, updates, case.cohort.sum_payload(case.sum(), opened))


def _forged_header(case: Case) -> Envelope:
    """One hospital's words are those of the earlier attempt."""
    updates = [case.cohort.signed_payload(site, b"", case.opened) for site in PRESENT]
    updates[case.one()] = case.cohort.signed_payload(0, b"", case.earlier_attempt)
    return case.cohort.certificate(case.opened, updates, case.cohort.sum_payload(case.sum(), case.opened))


def _unsigned(case: Case) -> Envelope:
    honest = case.certified(case.sum())
    return Envelope.seal(parse(honest.header, Certificate), Ed25519PrivateKey.generate(), honest.payload)


# In the order of what is touched: numbers, cohort, time, key, places, bytes, words.
KINDS: dict[str, Callable[[Case], Blobs | bytes | Envelope]] = {
    "one added to a weight": lambda c: c.server.plus(c.sum(), {c.slot(): 1}),
    "one taken from a weight": lambda c: c.server.plus(c.sum(), {c.slot(): -1}),
    "any number added to a slot": lambda c: c.server.plus(c.sum(), {c.slot(): c.number()}),
    "a change undone in the next slot": _undone,
    "small numbers added to all weights": _noise,
    "a tag changed": lambda c: c.server.plus(c.sum(), {c.n + N_SITES + int(c.rng.integers(4)): c.number()}),
    "the sum doubled": lambda c: c.server.add(c.sum(), c.sum()),
    "the sum times a number": lambda c: c.server.scaled(c.sum(), int(c.rng.integers(2, 1000))),
    "all zeros": lambda c: c.cohort.cipher.encrypt(np.zeros(c.cohort.n_slots, dtype=np.int64)),
    "a hospital left out": _omit,
    "a hospital left out, its presence forged": _omit_and_forge_presence,
    "a hospital counted twice": lambda c: c.sum([*PRESENT, c.one()]),
    "a hospital left out, another counted twice": _another_twice,
    "a hospital that is not in the cohort": lambda c: c.sum([*PRESENT, 4]),
    "replay of another round": lambda c: c.sum(opened=c.earlier_round),
    "replay of another attempt": lambda c: c.sum(range(N_SITES), c.earlier_attempt),
    "one update of another round": lambda c: c.mixed({c.one(): c.earlier_round}),
    "one update of another attempt": lambda c: c.mixed({c.one(): c.earlier_attempt}),
    "two updates of another attempt": _exchanged,
    "the sum under another key": lambda c: _stranger_key(c, lambda: c.cohort.seal(0, c.levels(0, ROUND), c.opened)),
    "a fresh encryption under another key added": lambda c: c.server.add(
        c.sum(), _stranger_key(c, lambda: np.zeros(c.cohort.n_slots, dtype=np.int64))
    ),
    "ciphertexts swapped": lambda c: c.sum()[::-1],
    "a ciphertext in the place of another": lambda c: [c.sum()[0]] * c.cohort.n_blobs,
    "ciphertexts of two rounds": _mixed_ciphertexts,
    "a bit flipped in the sum": lambda c: _flip_blob(c, c.sum()),
    "a bit flipped in one update": lambda c: c.server.add(_flip_blob(c, c.upload(0, c.opened)), c.sum((1, 2, 3))),
    "the last ciphertext left out": lambda c: c.sum()[:-1],
    "a ciphertext too many": lambda c: [*c.sum(), c.sum()[0]],
    "bytes cut off": lambda c: c.cohort.sum_payload(c.sum(), c.opened)[: -1 - int(c.rng.integers(70_000))],
    "bytes added": lambda c: c.cohort.sum_payload(c.sum(), c.opened) + bytes(1 + int(c.rng.integers(70_000))),
    "a bit flipped on the way": lambda c: _flipped(c, c.cohort.sum_payload(c.sum(), c.opened)),
    "another cohort certified": _smaller_cohort,
    "another attempt's words certified": _forged_header,
    "a certificate of a stranger": _unsigned,
}


def manipulations(repeats: int) -> list[Figure]:
    """Every kind, with masks and without: how many went unnoticed."""
    cohort = Cohort([1] * N_SITES, N_VALUES, 8)
    unnoticed, honest_refused = dict.fromkeys(KINDS, 0), 0
    for repeat in range(2 * repeats):
        case = Case(cohort, np.random.default_rng([12, repeat]), masked=repeat % 2 == 0)
        sums = opened_sum(cohort, case.certified(case.sum()))
        honest_refused += sums is None or not np.array_equal(sums, case.true_sums())
        for kind, manipulate in KINDS.items():
            made = manipulate(case)
            if not isinstance(made, Envelope):
                made = case.envelope(made) if isinstance(made, bytes) else case.certified(made)
            unnoticed[kind] += opened_sum(cohort, made) is not None
    return [
        Figure("R12_kinds", len(KINDS), f">= {MIN_KINDS}"),
        Figure("R12_repeats_of_each", 2 * repeats, f">= {REPEATS}"),
        Figure("R12_unnoticed", sum(unnoticed.values()), "== 0"),
        Figure("R12_honest_refused", honest_refused, "== 0"),
        *(Figure(f"R12_unnoticed_{slug(kind)}", count, "== 0") for kind, count in unnoticed.items()),
    ]


def opened_sum(cohort: Cohort, envelope: Envelope) -> Slots | None:
    """What a hospital gets out of it; None if it refuses."""
    try:
        return cohort.open_sum(envelope)
    except FedMedGanError:
        return None
