"""Check what hospitals handed over: each ledger alone, and against what the others hold.

    seal        every file of a bundle is the one that the hospital sealed
    chain       every record has the one allowed form, holds the hash of the one before, and may follow it
    signatures  the hospital signed every record
    study       the studies were signed by all their hospitals and list the ledger's key
    anchors     the ledger holds what its hospital signed in any certificate, and what other ledgers saw at its end
    rounds      each update in a certificate was charged and released
    noise, proof, budget, patients: audit/verify_spending.py

Certificates and studies count whoever brought them: each is signed. What others' ledgers have seen is their word alone;
a hospital's own signed words in a certificate nobody else can have made.

    case                                                   result
    the chain is broken                                    chain failed; of that ledger nothing else is run
    one ledger, no certificates                            anchors, rounds and patients not-run
    the ledger ends within a line                          passed, with words: that line was never acknowledged
    two copies of one ledger, one of them older            the older one: LEDGER_ROLLBACK
    a certificate whose signatures are not right           rounds failed, at whoever brought it
    a record names a study that nobody brought             checked as far as the ledger alone goes, with words
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedmedgan.audit import verify_spending
from fedmedgan.audit.evidence import SEAL, SUMS, HospitalEvidence
from fedmedgan.audit.findings import Finding, NotRun, found, refuse
from fedmedgan.audit.signatures import Signatures
from fedmedgan.shared.agreement import Agreement
from fedmedgan.shared.errors import FedMedGanError, PrivacyError
from fedmedgan.shared.messages import Certificate, Signed, Update, open_certificate, open_shown
from fedmedgan.shared.privacy import history as ledgers
from fedmedgan.shared.privacy.history import History
from fedmedgan.shared.privacy.records import decode
from fedmedgan.shared.study import Study

SEAL_DOMAIN = b"fedmedgan audit bundle 1\n"


@dataclass(frozen=True)
class Case:
    """One ledger, and what was made of it."""

    evidence: HospitalEvidence
    chain: History | PrivacyError
    signatures: Signatures

    @property
    def history(self) -> History:
        if isinstance(self.chain, PrivacyError) or not self.chain.seq:
            raise NotRun("needs a ledger whose chain is whole")
        return self.chain


@dataclass(frozen=True)
class Round:
    """A certificate that everybody in it signed."""

    study: Study
    sha256: str
    """Of its signed bytes, as `anchor` records name it."""
    round: int
    updates: Mapping[str, Update]

    def of(self, key: str) -> Update | None:
        """The update that was signed with a key."""
        names = {site.signing_key: site.name for site in self.study.sites}
        return self.updates.get(names.get(key, ""))


@dataclass(frozen=True)
class Handed:
    """Everything that was handed over, by whomever."""

    cases: Sequence[Case]
    studies: Mapping[str, Agreement]
    """Study hash -> the study, with every signature that anybody brought."""
    rounds: Sequence[Round]
    broken: Mapping[int, FedMedGanError]
    """Place of a case -> what is wrong with a certificate that it brought."""

    def histories(self) -> Iterator[History]:
        """Ledgers whose chain is whole."""
        return (case.chain for case in self.cases if isinstance(case.chain, History) and case.chain.seq)


def verify(evidence: Sequence[HospitalEvidence]) -> list[Finding]:
    """Every check of every ledger, in the order above.

    Give all hospitals of a study together: what one holds is what shows a roll-back of another.
    """
    cases = [_case(one) for one in evidence]
    handed = _handed(cases)
    return [finding for place in range(len(cases)) for finding in _findings(place, handed)]


def _findings(place: int, handed: Handed) -> Iterator[Finding]:
    case = handed.cases[place]
    checks = {
        "chain": lambda: check_chain(case),
        "signatures": lambda: check_signatures(case),
        "study": lambda: check_study(case, handed.studies),
        "anchors": lambda: check_anchors(case, handed),
        "rounds": lambda: check_rounds(case, handed, handed.broken.get(place)),
        "noise": lambda: verify_spending.check_noise(
            case.history, handed.studies, insecure_simulation=case.evidence.insecure_simulation
        ),
        "proof": lambda: verify_spending.check_proof(case.history),
        "budget": lambda: verify_spending.check_budget(case.history),
        "patients": lambda: verify_spending.check_patients(
            case.history, list(handed.histories()), owner_key=case.evidence.owner_key
        ),
    }
    if case.evidence.sealed is not None:
        checks = {"seal": lambda: check_seal(case), **checks}
    results = {}
    for name in sorted(checks, key=lambda name: name == "signatures"):  # last: other processes are at it meanwhile
        results[name] = found(case.evidence.hospital, name, checks[name], case.evidence.where)
    yield from (results[name] for name in checks)


def _case(evidence: HospitalEvidence) -> Case:
    lines = ledgers.complete_lines(evidence.ledger)
    signatures = Signatures(lines, _claimed_key(lines))
    try:
        return Case(evidence, ledgers.verify(evidence.ledger, "ledger.jsonl"), signatures)
    except PrivacyError as error:
        signatures.give_up()
        return Case(evidence, error, signatures)


def _claimed_key(lines: Sequence[bytes]) -> str:
    """The key that the first record names; checked by `ledgers.verify`."""
    try:
        return str(decode(lines[0], "ledger.jsonl").get("signing_key", ""))
    except (PrivacyError, IndexError):
        return ""


def _handed(cases: Sequence[Case]) -> Handed:
    studies: dict[str, Agreement] = {}
    for case in cases:
        for name, agreement in case.evidence.agreements.items():
            known = studies.get(name, agreement)
            studies[name] = Agreement(agreement.study, {**known.signatures, **agreement.signatures})
    rounds: dict[str, Round] = {}
    broken: dict[int, FedMedGanError] = {}
    for place, case in enumerate(cases):
        for name, certificates in case.evidence.certificates.items():
            for signed in certificates:
                if signed.header + signed.signature in rounds:
                    continue
                try:
                    rounds[signed.header + signed.signature] = _round(signed, studies[name].study)
                except FedMedGanError as error:
                    broken.setdefault(place, error)
    return Handed(cases, studies, tuple(rounds.values()), broken)


def _round(signed: Signed, study: Study) -> Round:
    certificate = open_shown(Certificate, signed, study)
    digest = hashlib.sha256(signed.header.encode()).hexdigest()
    return Round(study, digest, certificate.round, open_certificate(certificate, study))


# ---- one ledger


def check_chain(case: Case) -> str:
    if isinstance(case.chain, PrivacyError):
        raise case.chain
    history = case.chain
    refuse(not history.seq, "LEDGER_CORRUPT", "the ledger is empty")
    torn = history.torn_bytes
    words = f"{history.seq} records follow each other, up to {history.records[-1].body['time']}"
    return f"{words}; {torn} bytes of a line that was never acknowledged follow" if torn else words


def check_signatures(case: Case) -> str:
    history = case.history
    first = case.signatures.first_unsigned()
    refuse(first is not None, "LEDGER_SIGNATURE", "the ledger's key did not sign this", f"record {first}")
    return f"all {history.seq} records are signed with the key {history.signing_key[:16]}"


def check_seal(case: Case) -> str:
    files = dict(case.evidence.sealed or {})
    sums, seal = files.pop(SUMS, b""), files.pop(SEAL, b"")
    listed = "".join(f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files)).encode()
    if listed != sums:
        theirs, ours = set(sums.splitlines()), set(listed.splitlines())
        odd = sorted({line[66:].decode(errors="replace") for line in theirs ^ ours})
        raise PrivacyError("AUDIT_SEAL", "not as the hospital sealed it", ", ".join(odd[:3]) or SUMS)
    try:
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(case.history.signing_key))
        refuse(seal != seal[:128].lower() + b"\n", "AUDIT_SEAL", "the seal is not in its one form", SEAL)
        public.verify(bytes.fromhex(seal.decode()), SEAL_DOMAIN + sums)
    except (InvalidSignature, ValueError):
        raise PrivacyError("AUDIT_SEAL", "the ledger's key did not sign the list of files", SEAL) from None
    return f"{len(files)} files are as the hospital sealed them"


def check_study(case: Case, studies: Mapping[str, Agreement]) -> str:
    history = case.history
    for problem in case.evidence.problems:
        refuse(True, "AUDIT_EVIDENCE", problem)
    known = [studies[name] for name in history.studies if name in studies]
    if not known:
        raise NotRun("bring the studies that the ledger names (study.json of a home or a bundle)")
    trained = {record.body["study"] for record in history.records if record.kind == "reserve"}
    for agreement in known:
        study = agreement.study
        other = {site.name: site.signing_key for site in study.sites}.get(history.hospital) != history.signing_key
        refuse(other, "LEDGER_OWNER", "the study lists another key for this hospital", study.name)
        if study.hash in trained:
            missing = ", ".join(agreement.missing())
            refuse(bool(missing), "STUDY_SIGNATURE", f"trained, and not signed by {missing}", study.name)
    names = ", ".join(agreement.study.name for agreement in known)
    left = len(history.studies) - len(known)
    words = f"signed by all hospitals, with this ledger's key: {names}"
    return f"{words}; {left} more are in the ledger, bring their study.json" if left else words


# ---- against what others hold


def check_anchors(case: Case, handed: Handed) -> str:
    history, key = case.history, case.history.signing_key
    own, siblings, seen = 0, _siblings(history, handed), 0
    for signed in handed.rounds:
        if (update := signed.of(key)) and not any(_has(s, update.ledger_seq, update.ledger_head) for s in siblings):
            _holds(history, update.ledger_seq, update.ledger_head, f"its own signature in round {update.round}")
            own += 1
    for other in handed.histories():
        if other.ledger_id == history.ledger_id:
            _holds(history, other.seq, other.head, "another copy of this ledger")
            continue
        for record in other.records:
            seq, head = record.body["heads"].get(key, (0, "")) if record.kind == "anchor" else (0, "")
            if seq and not any(_has(sibling, seq, head) for sibling in siblings):
                _holds(history, seq, head, f"the ledger of {other.hospital}, record {record.seq}")
                seen += 1
    if not own and not seen:
        raise NotRun("bring ledgers of other hospitals of the study, or certificates of its rounds")
    return f"it holds all {own} heads that its hospital signed in certificates, and {seen} that others recorded"


def _siblings(history: History, handed: Handed) -> list[History]:
    """Other ledgers that were signed with the same key (which `patients` reports): a head may be theirs."""
    same = (other for other in handed.histories() if other.signing_key == history.signing_key)
    return [other for other in same if other.ledger_id != history.ledger_id]


def _has(history: History, seq: int, head: str) -> bool:
    return 0 < seq <= history.seq and history.records[seq - 1].line_sha256 == head


def _holds(history: History, seq: int, head: str, by: str) -> None:
    try:
        history.check_anchor(seq, head)
    except PrivacyError as error:
        raise PrivacyError(error.code, error.what, f"seen by {by}") from None


def check_rounds(case: Case, handed: Handed, broken: FedMedGanError | None) -> str:
    if broken is not None:
        raise broken
    history, rounds = case.history, handed.rounds
    if unpromised := sorted({one.study.name for one in rounds if not one.study.is_private}):
        raise NotRun(f"{', '.join(unpromised)}: a study WITHOUT privacy, nothing is promised and nothing charged")
    elsewhere = {sent for sibling in _siblings(history, handed) for sent in _released(sibling)}
    certified = [
        (one, update) for one in rounds if (update := one.of(history.signing_key)) and _sent(update) not in elsewhere
    ]
    if not certified:
        raise NotRun("bring certificates of the rounds (a home or a bundle)")
    released = _released(history)
    for one, update in certified:
        where = f"round {update.round} of {one.study.name}"
        paid, needed = history.steps_paid(one.study.hash, update.round), one.study.steps_per_round
        refuse(not paid, "AUDIT_UNCHARGED", "an update without a charge", where)
        refuse(paid < needed, "AUDIT_UNCHARGED", f"an update of {needed} steps for a charge of {paid}", where)
        refuse(_sent(update) not in released, "AUDIT_UNCHARGED", "an update that the ledger does not know", where)
    _refuse_two_certificates(history, rounds)
    given = {(one.study.hash, one.round) for one in rounds}
    anchored = {(r.body["study"], r.body["round"]) for r in history.records if r.kind == "anchor"}
    missing = len(anchored - given)
    words = f"all {len(certified)} updates in certificates were charged and released"
    return f"{words}; certificates of {missing} more rounds are not here" if missing else words


def _released(history: History) -> set[tuple[str, int, int, str]]:
    bodies = (record.body for record in history.records if record.kind == "release")
    return {(body["study"], body["round"], body["attempt"], body["sha256"]) for body in bodies}


def _sent(update: Update) -> tuple[str, int, int, str]:
    return (update.study, update.round, update.attempt, update.payload_sha256)


def _refuse_two_certificates(history: History, rounds: Sequence[Round]) -> None:
    given: dict[tuple[str, int], set[str]] = {}
    for one in rounds:
        given.setdefault((one.study.hash, one.round), set()).add(one.sha256)
    for record in history.records:
        if record.kind == "anchor":
            digests = given.get((record.body["study"], record.body["round"]), {record.body["certificate"]})
            other = digests != {record.body["certificate"]}
            what = "the coordinator signed another certificate of this round"
            refuse(other, "MSG_EQUIVOCATION", what, f"round {record.body['round']}")
