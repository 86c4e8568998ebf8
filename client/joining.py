"""A hospital's own decisions: it makes its keys, signs a study and so enters it, allows a new key, or leaves.

Each is a command that a person gives at the hospital; nothing that arrives over the wire can do any of it.
"""

from __future__ import annotations

import json
from pathlib import Path

from fedmedgan.client import checkpoint, pretrained
from fedmedgan.client.budget_book import BudgetBook
from fedmedgan.client.data.declared import load_declared
from fedmedgan.client.data.patients import PatientImages
from fedmedgan.client.policy import Policy
from fedmedgan.client.training.estimate import refuse_mixing
from fedmedgan.shared.agreement import Agreement, Identity, sign
from fedmedgan.shared.errors import PrivacyError, RunError, StudyError
from fedmedgan.shared.privacy.accounting import calibrate_noise
from fedmedgan.shared.privacy.data_owner import check_override
from fedmedgan.shared.privacy.ledger import Ledger
from fedmedgan.shared.privacy.records import Terms
from fedmedgan.shared.secure_sum.keys import HospitalKeys, generate_identity
from fedmedgan.shared.study import Study

ADAM_STATES = "optimizers.safetensors"
ATTEMPT = "attempt.json"
OUTBOX = "outbox.msg"
LEFT = "left"
CERTIFICATES = "certificates"
ROTATION_ALLOWED = "rotation-allowed.json"
REJECTED = "rejected.json"
NOISE = "noise.json"
WITHOUT_PRIVACY = "without-privacy"
"""Names the study that was trained in this home without privacy; stays for good."""
SIGN_AGAIN = "sign the study again, which writes it: `fedmedgan study sign`"
REQUEST = "override-request.json"
"""What the data owner would have to allow, where another ledger has touched the same patients."""
STATE = (
    pretrained.WEIGHTS,
    "model.safetensors",
    ADAM_STATES,
    "update.safetensors",
    ATTEMPT,
    OUTBOX,
    REJECTED,
    ROTATION_ALLOWED,
    LEFT,
    NOISE,
    CERTIFICATES,
    "samples",
)
"""What belongs to one study in a home folder, beside study.json and the key epoch."""


def init_home(
    home: Path,
    *,
    site: str,
    data: str,
    max_epsilon: float,
    budget_book: Path,
    device: str = "auto",
    passphrase: bytes | None = None,
    public_images: bool = False,
) -> Identity:
    """Make a hospital's home: its rules, its keys. Returns the public identity, which goes to the coordinator.

    Args:
        budget_book: folder of the hospital's budget book, which all its homes share; made if it is not there. A
            relative path starts at the home.
        public_images: the images are public, or drawn; only a simulation says so.

    Raises:
        RunError: RUN_PATH, the folder is in use or cannot be written.
        StudyError: CONFIG_TYPE, the policy would not be valid.
    """
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        if (home / "policy.toml").exists() or (home / "keys").exists():
            hint = "a hospital's identity is made once; choose another folder, or remove this one yourself"
            raise RunError("RUN_PATH", "the folder holds a hospital already", str(home), hint=hint)
        lines = [
            f"# The rules of {site}. They outrank every study: the study asks, the hospital grants.",
            f"site = {json.dumps(site)}",
            f"data = {json.dumps(data)}",
            f"max_epsilon = {float(max_epsilon)!r}  # for the same patients, over ALL studies",
            f"budget_book = {json.dumps(str(budget_book))}  # the same for all homes of this hospital",
            'data_owner_key = ""  # who alone may allow a second ledger on the same patients',
            "min_cohort = 3  # smallest number of hospitals in a sum",
            'recipes = ["*"]  # networks that may be trained; "*": all that are installed',
            f"device = {json.dumps(device)}",
            *(["public_images = true  # a simulation's: studies without privacy are allowed"] if public_images else []),
            "",
        ]
        (home / "policy.toml").write_text("\n".join(lines), encoding="utf-8")
        try:
            Policy.load(home / "policy.toml")
        except StudyError:
            (home / "policy.toml").unlink()
            raise
        BudgetBook.open(home / budget_book, create=True)
        own = generate_identity()
        own.save(home / "keys", passphrase)
    except OSError as error:
        raise RunError("RUN_PATH", f"cannot be written ({error.strerror})", str(home)) from None
    return identity(site, own)


def identity(site: str, own: HospitalKeys) -> Identity:
    """The public halves, signed."""
    public = Identity(
        role="hospital",
        name=site,
        signing_key=own.signing_public,
        exchange_key=own.exchange_public,
        wrapping_key=own.wrapping_public,
    )
    return public.signed(own.signing)


def join(home: Path, study: Study, passphrase: bytes | None = None, weights: Path | None = None) -> Agreement:
    """The hospital enters a study: its policy grants it, the noise is calibrated, its patients are entered in the
    budget book and the terms in the ledger, the hash is signed.

    The images are read now: what is signed is that these patients suit the study. Other patients later have to be
    signed for again, and so has a study in which a round's tests failed.

    Args:
        weights: file of the initial weights, where the study names some.

    Returns:
        The agreement with this hospital's signature; the same one is kept in the home.

    Raises:
        StudyError: STUDY_POLICY; STUDY_KEYS, the study has no keys or not this hospital's; CONFIG_RANGE, no recipe.
        PrivacyError: BUDGET_EXHAUSTED, LEDGER_*; PRIVACY_MODEL, the recipe mixes patients; PRIVACY_NONE.
        DataError: DATA_*. ModelError: MODEL_HASH, MODEL_MISMATCH: other initial weights than the study's, or none.
    """
    policy = Policy.load(home / "policy.toml")
    keys = HospitalKeys.load(home / "keys", passphrase)
    site = study.site(policy.site)
    policy.grant(study)
    own = (keys.signing_public, keys.exchange_public, keys.wrapping_public)
    if (site.signing_key, site.exchange_key, site.wrapping_key) != own:
        raise StudyError("STUDY_KEYS", "the study lists other keys for this hospital", site.name)
    book = BudgetBook.open(home / policy.budget_book)
    refuse_mixing(study)
    kept = home / pretrained.WEIGHTS
    weights = weights or (kept if kept.exists() else None)
    initial = pretrained.check(study, weights)
    patients = load_declared(Path(policy.data), study, site, pseudonym_key=book.pseudonym_key, home=home)
    # Without privacy nothing is opened in the ledger; a home has one all the same, which others see not to shrink.
    terms = _terms(study, policy, book, patients) if study.is_private else None
    with Ledger(home / "ledger.jsonl", site.name, signing=keys.signing, book=book.id) as ledger:
        _refuse_broken_promise(home, study, ledger, book, patients)
        _enter(book, ledger, patients, policy.data_owner_key)
        if terms:
            _open_in_ledger(ledger, study, terms, book)
        else:
            checkpoint.write_bytes(home / WITHOUT_PRIVACY, study.hash.encode())
    _put_away(home, study)
    pretrained.keep(home, initial)
    noise = {"study": study.hash, "noise_multiplier": terms.noise_multiplier if terms else 0.0}
    checkpoint.write_bytes(home / NOISE, json.dumps(noise).encode())
    agreement = Agreement(study).with_signature(site.name, sign(study, keys.signing))
    if not (home / "study.json").exists():  # joining again must not lose the others' signatures
        keep(home, agreement)
    return agreement


def _refuse_broken_promise(home: Path, study: Study, ledger: Ledger, book: BudgetBook, patients: PatientImages) -> None:
    """Patients who were promised privacy are in no study without it, and the other way round.

    Raises:
        PrivacyError: PRIVACY_NONE.
    """
    if study.is_private and (home / WITHOUT_PRIVACY).exists():
        what = "a study without privacy was trained in this home: nothing can be promised to its patients any more"
        raise PrivacyError("PRIVACY_NONE", what, WITHOUT_PRIVACY, hint="make a home for public images alone")
    promised = ledger.history.studies or book.others(ledger.history.ledger_id, patients.pseudonyms)
    if not study.is_private and promised:
        what = "these patients were promised privacy, and the study gives none"
        raise PrivacyError(
            "PRIVACY_NONE", what, study.name, hint="use a home and a budget book for public images alone"
        )


def _terms(study: Study, policy: Policy, book: BudgetBook, patients: PatientImages) -> Terms:
    """What the study promises this hospital's patients; the noise is calibrated for it."""
    site, p = study.site(policy.site), study.privacy
    rate = study.sampling_rate(site)
    return Terms(
        delta=p.delta,
        ceiling=p.epsilon,
        total_ceiling=policy.max_epsilon,
        noise_multiplier=calibrate_noise(epsilon=p.epsilon, delta=p.delta, sampling_rate=rate, steps=study.total_steps),
        sampling_rate=rate,
        clip_norm=p.clip_norm,
        steps=study.total_steps,
        dataset=book.commitment(patients.pseudonyms),
        patients=site.patients,
    )


def _open_in_ledger(ledger: Ledger, study: Study, terms: Terms, book: BudgetBook) -> None:
    """Open the study in the ledger, whose patients are in the book by now."""
    _refuse_reopening(ledger, study, terms.delta)  # before any study is closed for it
    for earlier in ledger.history.studies:
        if earlier != study.hash and not ledger.history.is_closed(earlier):
            ledger.close_study(earlier)
    ledger.open_study(study.hash, terms)
    book.saw(ledger.history)


def _refuse_reopening(ledger: Ledger, study: Study, delta: float) -> None:
    terms = ledger.history.terms(study.hash)
    if ledger.history.is_closed(study.hash):
        hint = "a study that is over stays over; the coordinator can make a new one"
        raise StudyError("STUDY_POLICY", "this study is over at this hospital", study.name, hint=hint)
    if terms is not None and terms.delta != delta:
        raise PrivacyError("LEDGER_STATE", "the study was opened with another delta", study.name)


def _enter(book: BudgetBook, ledger: Ledger, patients: PatientImages, owner_key: str) -> None:
    """Enter this ledger in the book; where it is refused, write down what the data owner would have to allow."""
    try:
        book.enter(ledger.history, ledger.path, patients.pseudonyms, owner_key=owner_key)
    except PrivacyError as error:
        if error.code == "LEDGER_SAME_PATIENTS":
            others = book.others(ledger.history.ledger_id, patients.pseudonyms)
            request = {
                "book": book.id,
                "ledger": ledger.history.ledger_id,
                "hospital": ledger.hospital,
                "others": [{"ledger": o.ledger, "hospital": o.hospital, "since": o.since} for o in others],
            }
            checkpoint.write_bytes(ledger.path.with_name(REQUEST), json.dumps(request, indent=1).encode())
        raise


def allow_beside(home: Path, override: Path) -> None:
    """Take in what the data owner signed: this ledger may stand beside others of the same patients.

    Raises:
        PrivacyError: LEDGER_OVERRIDE, not signed by the data owner of the policy for just this ledger; LEDGER_*.
    """
    policy, keys = Policy.load(home / "policy.toml"), HospitalKeys.load(home / "keys")
    book = BudgetBook.open(home / policy.budget_book)
    try:
        fields = json.loads(override.read_text(encoding="utf-8"))
        fields = {name: fields[name] for name in ("ledgers", "reason", "owner_key", "owner_signature")}
        if not all(isinstance(text, str) for text in (*fields["ledgers"], *list(fields.values())[1:])):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError):
        raise PrivacyError("LEDGER_OVERRIDE", "this is nothing that a data owner signed", override.name) from None
    with Ledger(home / "ledger.jsonl", policy.site, signing=keys.signing, book=book.id) as ledger:
        check_override(fields, ledger.history, policy.data_owner_key)
        ledger.override(**fields)
        if ledger.history.studies:
            book.saw(ledger.history)


def keep(home: Path, agreement: Agreement) -> None:
    """Keep an agreement in the home; it survives a crash at any point."""
    checkpoint.write_bytes(home / "study.json", agreement.to_json())


def allow_rotation(home: Path) -> int:
    """A person allows the epoch's key to be replaced, after rejected sums were looked into. Returns its number."""
    epoch = HospitalKeys.load(home / "keys").epoch
    number = epoch.number if epoch else 0
    checkpoint.write_bytes(home / ROTATION_ALLOWED, json.dumps({"epoch": number}).encode())
    return number


def leave(home: Path) -> None:
    """The hospital leaves the study for good: its next answer says so, and it is given no further key.

    Raises:
        StudyError: CONFIG_NOT_FOUND, it is in no study.
    """
    Agreement.load(home / "study.json")
    checkpoint.write_bytes(home / LEFT, b"")


def _put_away(home: Path, study: Study) -> None:
    """Move the state of an earlier study to ``past/<hash>``: ledger, identity and cache serve every study."""
    known = home / "study.json"
    earlier = Agreement.load(known).study.hash if known.exists() else study.hash
    if earlier != study.hash:
        past = home / "past" / earlier[:16]
        past.mkdir(parents=True, exist_ok=True)
        for name in ("epoch.key", "next-epoch.key"):  # a key is good for one study
            (home / "keys" / name).unlink(missing_ok=True)
        for name in (*STATE, "study.json"):  # the agreement last: a crash before it repeats this
            if (home / name).exists():
                (home / name).rename(past / name)
