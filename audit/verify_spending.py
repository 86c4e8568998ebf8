"""Check what a ledger says was done to patients: enough noise, tests that did not fail, ceilings, one budget a patient.

Epsilon is the larger of two accountants, as at the hospital (audit/recompute.py).

    case                                                   result
    a ceiling was lowered after more was spent             passed: what held when it was spent counts
    a ceiling was raised after more was spent              AUDIT_CEILING
    a reservation that was never settled                   counts in full
    noise recorded with less than the budget needs         AUDIT_NOISE, though every record agrees with it
    noise that can be repeated                             AUDIT_NOISE; not-run in a simulation that says so
    a round's own test failed                              AUDIT_PROOF, even if its update was thrown away
    two ledgers, one book, the same patients               AUDIT_SAME_PATIENTS, unless the data owner signed for it
    the same with the data owner's override                what both spent must stay within the lower ceiling
    the same hospital under two books                      told; its patients cannot be compared
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedmedgan.audit.findings import NotRun, refuse
from fedmedgan.audit.recompute import all_costs, enforced
from fedmedgan.shared.agreement import Agreement
from fedmedgan.shared.errors import PrivacyError
from fedmedgan.shared.privacy.data_owner import owner_statement
from fedmedgan.shared.privacy.events import TrainingSteps
from fedmedgan.shared.privacy.history import History
from fedmedgan.shared.privacy.records import CHECKS, Record, Terms, failed_checks

ROUNDING = 1 + 1e-6
"""Accountants of another version may differ in the last digits."""
MAX_OPENED = 200
"""`open` records of different terms; each is worked out, and no hospital has nearly as many."""
SYSTEM_NOISE = "os-aes256ctr"
"""`SystemRandom.name` (client/training/randomness.py): the one source that nobody can repeat."""
_FIXED = ("noise_multiplier", "sampling_rate")


# ---- noise


def check_noise(history: History, studies: Mapping[str, Agreement], *, insecure_simulation: bool = False) -> str:
    opened = [record for record in history.records if record.kind == "open"]
    if not opened:
        raise NotRun("no study was ever opened in this ledger")
    every = {(Terms.of(record.body), record.body["study"]): f"record {record.seq}" for record in opened}
    refuse(len(every) > MAX_OPENED, "AUDIT_NOISE", f"studies were opened under {len(every)} different terms")
    for (terms, study), where in every.items():
        _refuse_other_terms(terms, studies.get(study), history.hospital, where)
        planned = TrainingSteps(terms.noise_multiplier, terms.sampling_rate, terms.steps)
        epsilon = enforced([planned], terms.delta)
        what = f"with noise {terms.noise_multiplier:g} the whole study costs {epsilon:.4g} of {terms.ceiling:g}"
        refuse(epsilon > terms.ceiling * ROUNDING, "AUDIT_NOISE", what, where)
    for record, under in _reservations(history):
        # The one form in which a number is written makes equal numbers equal strings.
        other = any(event[name] != under[name] for event in record.body["events"] for name in _FIXED)
        refuse(other, "AUDIT_NOISE", "other noise or sampling than the study was opened with", f"record {record.seq}")
    sources = {r.body["noise_source"]: f"record {r.seq}" for r in history.records if r.kind == "charge"}
    for source, where in sources.items():
        if source != SYSTEM_NOISE and insecure_simulation:
            raise NotRun(f"a simulation with repeatable noise ({source}): it protects nobody, and was not meant to")
        refuse(source != SYSTEM_NOISE, "AUDIT_NOISE", f"noise of {source!r} can be repeated: it protects nobody", where)
    words = "noise is enough for the whole of every study, and every step has it"
    unknown = sum(study not in studies for study in history.studies)
    return f"{words}; {unknown} studies could not be compared with their study.json" if unknown else words


def _refuse_other_terms(terms: Terms, agreement: Agreement | None, hospital: str, where: str) -> None:
    """The terms must be those of the study, wherever it is here."""
    if agreement is None:
        return
    study = agreement.study
    site = study.site(hospital)
    agreed = {
        "delta": study.privacy.delta,
        "clip_norm": study.privacy.clip_norm,
        "sampling_rate": study.sampling_rate(site),
        "steps": study.total_steps,
        "patients": site.patients,
    }
    other = ", ".join(name for name, value in agreed.items() if getattr(terms, name) != value)
    refuse(bool(other), "AUDIT_NOISE", f"not as in the study: {other}", where)
    what = f"a ceiling of {terms.ceiling:g}, the study allows {study.privacy.epsilon:g}"
    refuse(terms.ceiling > study.privacy.epsilon, "AUDIT_CEILING", what, where)


def _reservations(history: History) -> Iterator[tuple[Record, dict[str, Any]]]:
    """Every reservation, and the body of the `open` record under which it was made."""
    opened: dict[str, dict[str, Any]] = {}
    for record in history.records:
        if record.kind == "open":
            opened[record.body["study"]] = record.body
        elif record.kind == "reserve":
            yield record, opened[record.body["study"]]


# ---- proof


def check_proof(history: History) -> str:
    charges = [record for record in history.records if record.kind == "charge"]
    if not charges:
        raise NotRun("no round was charged")
    failed = [(record, names) for record in charges if (names := failed_checks(record.body["checks"]))]
    if failed:
        record, names = failed[0]
        what = f"tests of {len(failed)} of {len(charges)} rounds failed, the first: {', '.join(names)}"
        refuse(True, "AUDIT_PROOF", what, f"record {record.seq}")
    words = f"{len(charges)} rounds: " + ", ".join(f"{name} {_count(charges, name)}" for name in CHECKS)
    never = [name for name in CHECKS if all(record.body["checks"][name] != "passed" for record in charges)]
    if {"noise", "clipping", "rows"} & set(never):
        raise NotRun(f"no round shows {', '.join(never)}; {words}")
    return words


def _count(charges: Sequence[Record], name: str) -> str:
    """``passed``, or ``passed 3, too-few 1``."""
    verdicts = Counter(record.body["checks"][name] for record in charges)
    return " ".join(verdicts) if len(verdicts) == 1 else " ".join(f"{v} {n}" for v, n in sorted(verdicts.items()))


# ---- budget


def check_budget(history: History) -> str:
    """Both ceilings, at the last reservation under each `open` record: epsilon only ever grows in between."""
    if not history.studies:
        raise NotRun("no study was ever opened in this ledger")
    done = _steps_done(history)
    last_under: dict[int, int] = {}
    for record, under in _reservations(history):
        if any(done[record.seq]):
            last_under[under["seq"]] = record.seq
    bodies = {opened: history.records[opened - 1].body for opened in last_under}
    last = {(body["study"], Terms.of(body)): last_under[opened] for opened, body in bodies.items()}
    refuse(len(last) > MAX_OPENED, "AUDIT_CEILING", f"steps were reserved under {len(last)} different terms")
    words = []
    for (study, terms), seq in sorted(last.items(), key=lambda item: item[1]):
        own, everything = _spent(history, done, seq, study), _spent(history, done, seq)
        words = [
            _within(own, terms.delta, terms.ceiling, f"study {study[:12]}", seq),
            _within(everything, terms.delta, terms.total_ceiling, "all studies", seq),
        ]
    return "; ".join(words) or "nothing was spent"


def _within(spent: Sequence[TrainingSteps], delta: float, ceiling: float, what: str, last: int) -> str:
    epsilon = enforced(spent, delta)
    words = f"{what}: epsilon {epsilon:.4g} of {ceiling:g}"
    refuse(epsilon > ceiling * ROUNDING, "AUDIT_CEILING", words, f"up to record {last}")
    return words


def _steps_done(history: History) -> dict[int, list[int]]:
    """What each reservation came to in the end: the charged steps, none if it was taken back, or all of them."""
    done: dict[int, list[int]] = {}
    for record in history.records:
        if record.kind == "reserve":
            done[record.seq] = [event["steps"] for event in record.body["events"]]
        elif record.kind == "void":
            done[record.body["reserve"]] = [0] * len(done[record.body["reserve"]])
        elif record.kind == "charge":
            done[record.body["reserve"]] = record.body["steps"]
    return done


def _spent(history: History, done: Mapping[int, list[int]], last: int, study: str = "") -> list[TrainingSteps]:
    """What the reservations up to a record's number came to, of one study or of all."""
    total: Counter[tuple[str, str]] = Counter()
    for record in history.records[:last]:
        if record.kind == "reserve" and study in ("", record.body["study"]):
            for event, steps in zip(record.body["events"], done[record.seq], strict=True):
                total[event["noise_multiplier"], event["sampling_rate"]] += steps
    return [TrainingSteps(float(sigma), float(rate), steps) for (sigma, rate), steps in sorted(total.items()) if steps]


# ---- patients


def check_patients(history: History, everybody: Sequence[History], *, owner_key: str = "") -> str:
    """No two ledgers on the same patients without the data owner's word.

    Args:
        owner_key: the data owner's public key, where the hospital's policy is here; else any key counts, and is told.
    """
    others = {other.ledger_id: other for other in everybody if other.ledger_id != history.ledger_id}
    if not history.studies:
        raise NotRun("no study was ever opened in this ledger")
    if not others:
        raise NotRun("bring the hospital's other ledgers: its budget book lists them (`fedmedgan site budget`)")
    allowed, notes = [], []
    for other in others.values():
        if _same_patients(history, other):
            where = f"ledger {other.ledger_id[:12]} of {other.hospital}"
            signed_by = _allowing(history, other, owner_key)
            together = all_costs([history, other])
            what = f"both on the same patients, together epsilon {together.epsilon:.4g}"
            refuse(not signed_by, "AUDIT_SAME_PATIENTS", f"{what}, and the data owner did not allow it", where)
            refuse(together.epsilon > together.ceiling, "AUDIT_CEILING", f"{what} of {together.ceiling:g}", where)
            allowed.append(other)
            notes.append(f"{where} is allowed by the data owner's key {signed_by[:16]}; {what}")
        elif other.book == history.book or other.hospital == history.hospital:
            notes.append(f"another ledger of {other.hospital}: {_different(history, other)}")
    if not any(o.book == history.book or o.signing_key == history.signing_key for o in others.values()):
        ask = "bring the hospital's other ledgers: its budget book lists them (`fedmedgan site budget`)"
        raise NotRun("; ".join([*notes, f"nothing here is of the same budget book: {ask}"]))
    together_all = all_costs([history, *allowed])
    words = f"epsilon {together_all.epsilon:.4g} of {together_all.ceiling:g} over all ledgers of these patients"
    what = f"epsilon {together_all.epsilon:.4g} of {together_all.ceiling:g} over {1 + len(allowed)} ledgers"
    refuse(together_all.epsilon > together_all.ceiling and bool(allowed), "AUDIT_CEILING", what)
    return "; ".join(notes) or f"none of {len(others)} other ledgers here is on the same patients; {words}"


def _same_patients(one: History, other: History) -> bool:
    same_key = one.signing_key == other.signing_key
    return same_key or (one.book == other.book and bool(_datasets(one) & _datasets(other)))


def _different(one: History, other: History) -> str:
    same_book = "another set of patients, as far as their commitments tell"
    return same_book if one.book == other.book else "another budget book, so their patients cannot be compared"


def _datasets(history: History) -> set[str]:
    return {record.body["dataset"] for record in history.records if record.kind == "open"}


def _allowing(one: History, other: History, owner_key: str) -> str:
    """The key that allows two ledgers side by side, in either of them; empty if none does."""
    pairs = ((one, other), (other, one))
    overrides = [(body, at) for at, beside in pairs for body in at.overrides if beside.ledger_id in body["ledgers"]]
    return next(filter(None, (_signer(body, at, owner_key) for body, at in overrides)), "")


def _signer(body: Mapping[str, Any], history: History, owner_key: str) -> str:
    """The data owner's key of an override that is valid; otherwise empty."""
    key: str = body["owner_key"]
    if key == history.signing_key or (owner_key and key != owner_key):
        return ""
    try:
        statement = owner_statement(history.book, history.ledger_id, body["ledgers"], body["reason"])
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(bytes.fromhex(body["owner_signature"]), statement)
    except (PrivacyError, InvalidSignature, ValueError):
        return ""
    return key
