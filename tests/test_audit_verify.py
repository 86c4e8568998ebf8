"""What an audit finds: nothing at honest hospitals, and each cheat by its name."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pytest
from audited import (
    DATA,
    KEYS,
    NAMES,
    OWNER,
    Bodies,
    Consortium,
    Hospital,
    agreement,
    chained,
    public,
    seal,
    sigma,
    study,
)

from fedmedgan.audit import evidence, signatures
from fedmedgan.audit.evidence import gather
from fedmedgan.audit.findings import Finding
from fedmedgan.audit.verify import verify
from fedmedgan.shared.errors import RunError
from fedmedgan.shared.privacy.data_owner import sign_override
from fedmedgan.shared.privacy.events import TrainingSteps
from fedmedgan.shared.privacy.history import complete_lines

NAME = "clinic-a"
CHECKS = ["chain", "signatures", "study", "anchors", "rounds", "noise", "proof", "budget", "patients"]


@pytest.fixture(scope="module")
def _made(tmp_path_factory):
    consortium = Consortium(tmp_path_factory.mktemp("paper") / "run")
    consortium.join(study())
    for round in range(1, 5):
        consortium.round(study(), round)
    return consortium.folder


@pytest.fixture
def consortium(_made, tmp_path) -> Consortium:
    """Three honest hospitals after a whole study."""
    return Consortium(shutil.copytree(_made, tmp_path / "run"))


def failed(found: list[Finding]) -> dict[tuple[str, str], str]:
    """(hospital, check) -> code of what failed."""
    return {(f.hospital, f.check): f.code for f in found if f.verdict == "failed"}


def words(found: list[Finding], check: str, hospital: str = NAME) -> str:
    return next(f.words for f in found if (f.hospital, f.check) == (hospital, check))


def audit(consortium: Consortium) -> list[Finding]:
    return verify(gather(consortium.folder))


def of_kind(bodies: Bodies, kind: str) -> Bodies:
    return [body for body in bodies if body["kind"] == kind]


# ---- honest


def test_honest_hospitals_pass_every_check(consortium):
    found = audit(consortium)
    wanted = dict.fromkeys(CHECKS, "passed") | {"patients": "not-run"}  # other hospitals' books say nothing of it
    assert [(f.hospital, f.check, f.verdict, f.code) for f in found] == [
        (name, check, wanted[check], "") for name in NAMES for check in CHECKS
    ]
    assert "3.9" in words(found, "budget") and "of 4" in words(found, "budget")
    assert "4 heads that its hospital signed" in words(found, "anchors")


def test_one_ledger_alone_is_checked_as_far_as_it_goes(consortium):
    found = verify(gather(consortium.hospitals[NAME].path))
    verdicts = {f.check: f.verdict for f in found}
    assert {check for check, verdict in verdicts.items() if verdict == "passed"} == {
        "chain", "signatures", "noise", "proof", "budget",
    }  # fmt: skip
    assert {check for check, verdict in verdicts.items() if verdict == "not-run"} == {
        "study", "anchors", "rounds", "patients",
    }  # fmt: skip
    assert all("bring" in f.words for f in found if f.verdict == "not-run")


def test_a_study_under_way_and_a_torn_line_are_in_order(consortium):
    hospital = consortium.hospitals[NAME]
    with hospital.ledger() as ledger:
        ledger.open_study(study("another").hash, ledger.history.terms(study().hash))
        ledger.reserve(study("another").hash, 1, [TrainingSteps(sigma(study()), 0.05, 25)])
    hospital.path.write_bytes(hospital.path.read_bytes() + b'{"body":{"bo')
    found = audit(consortium)
    assert not failed(found)
    assert "12 bytes" in words(found, "chain")
    assert "1 more are in the ledger" in words(found, "study")


# ---- five cheats, and more


def test_records_dropped_and_signed_again_are_a_fork(consortium):
    def drop(bodies: Bodies) -> Bodies:
        """Round 2, with all that names it."""
        kept = [b for b in bodies if b.get("round") != 2 and b["kind"] != "charge"]
        numbers = {b["round"]: seq for seq, b in enumerate(kept, start=1) if b["kind"] == "reserve"}
        charge = of_kind(bodies, "charge")[0]
        for number, seq in enumerate(sorted(numbers.values())):
            kept.insert(seq + number, {**charge, "reserve": seq + number})
        return kept

    consortium.hospitals[NAME].rewrite(drop)
    wrong = failed(audit(consortium))
    assert wrong[NAME, "anchors"] in ("LEDGER_FORK", "LEDGER_ROLLBACK")
    assert wrong[NAME, "rounds"] == "AUDIT_UNCHARGED"
    assert {hospital for hospital, _ in wrong} == {NAME}


def test_a_changed_record_is_a_fork(consortium):
    def fewer(bodies: Bodies) -> Bodies:
        of_kind(bodies, "charge")[1]["steps"] = [5]
        return bodies

    consortium.hospitals[NAME].rewrite(fewer)
    found = audit(consortium)
    assert failed(found) == {(NAME, "anchors"): "LEDGER_FORK", (NAME, "rounds"): "AUDIT_UNCHARGED"}
    assert "its own signature in round 2" in words(found, "anchors")


def test_a_rollback_is_seen_by_the_hospitals_own_words_and_by_others(consortium):
    hospital = consortium.hospitals[NAME]
    lines = hospital.path.read_bytes().splitlines(keepends=True)
    hospital.path.write_bytes(b"".join(lines[:8]))
    wrong = failed(audit(consortium))
    assert wrong[NAME, "anchors"] == "LEDGER_ROLLBACK"
    assert wrong[NAME, "rounds"] == "AUDIT_UNCHARGED"
    for other in consortium.hospitals.values():  # without any certificate
        shutil.rmtree(other.home / "certificates")
    found = audit(consortium)
    assert failed(found) == {(NAME, "anchors"): "LEDGER_ROLLBACK"}
    assert "the ledger of clinic-b" in words(found, "anchors")


def test_less_noise_than_the_study_needs(consortium):
    """Records agree with each other; the noise is simply too small, and certificates were never written."""

    def quiet(bodies: Bodies) -> Bodies:
        for body in bodies:
            for holder in [body] if body["kind"] == "open" else body.get("events", []):
                holder["noise_multiplier"] = "0.7"
        return bodies

    consortium.hospitals[NAME].rewrite(quiet)
    found = audit(consortium)
    assert failed(found)[NAME, "noise"] == "AUDIT_NOISE"
    assert failed(found)[NAME, "budget"] == "AUDIT_CEILING"
    assert "with noise 0.7 the whole study costs" in words(found, "noise")


def test_less_noise_in_one_round(consortium):
    def quiet(bodies: Bodies) -> Bodies:
        of_kind(bodies, "reserve")[1]["events"][0]["noise_multiplier"] = "0.8"
        return bodies

    consortium.hospitals[NAME].rewrite(quiet)
    found = audit(consortium)
    assert failed(found)[NAME, "noise"] == "AUDIT_NOISE"
    assert "other noise" in words(found, "noise")


@pytest.mark.parametrize(
    ("change", "code"),
    [({"ceiling": "5.0"}, "AUDIT_CEILING"), ({"clip_norm": "3.0"}, "AUDIT_NOISE"), ({"steps": 50}, "AUDIT_NOISE")],
)
def test_terms_that_the_study_does_not_have(consortium, change, code):
    def other(bodies: Bodies) -> Bodies:
        of_kind(bodies, "open")[0].update(change)
        return bodies

    consortium.hospitals[NAME].rewrite(other)
    assert failed(audit(consortium))[NAME, "noise"] == code


def test_an_extra_round_without_a_charge(consortium):
    longer = study("longer", rounds=2)
    consortium.join(longer)
    consortium.round(longer, 1)
    consortium.round(longer, 2, uncharged=NAME)
    found = audit(consortium)
    assert failed(found) == {(NAME, "rounds"): "AUDIT_UNCHARGED"}
    assert "round 2 of longer" in words(found, "rounds")


def test_an_update_that_was_sent_and_then_taken_back(consortium):
    """What was released cannot be taken back."""

    def voided(bodies: Bodies) -> Bodies:
        charge = of_kind(bodies, "charge")[3]
        place, release = bodies.index(charge), of_kind(bodies, "release")[3]
        void = {name: charge[name] for name in ("v", "time", "hospital", "study", "reserve")}
        rest = [body for body in bodies[place + 1 :] if body is not release]
        return [*bodies[:place], release, {**void, "kind": "void", "reason": "no data"}, *rest]

    consortium.hospitals[NAME].rewrite(voided)
    assert failed(audit(consortium)) == {(NAME, "chain"): "LEDGER_STATE"}


def test_another_study_on_the_same_patients(consortium, tmp_path):
    second = Hospital(tmp_path / "run" / "hospitals" / "second-home", NAME)
    second.join(study("other"))
    second.train(study("other"), 1)
    found = audit(consortium)
    assert failed(found) == {(NAME, "patients"): "AUDIT_SAME_PATIENTS"}
    assert "together epsilon" in words(found, "patients")
    bodies = [json.loads(line)["body"] for line in second.path.read_bytes().splitlines()]
    bodies[0]["signing_key"] = public(OWNER)  # a home with an identity of its own, and the same budget book
    second.path.write_bytes(chained(bodies, OWNER))
    (second.home / "study.json").unlink()
    assert failed(audit(consortium)) == {(NAME, "patients"): "AUDIT_SAME_PATIENTS"}


@pytest.mark.parametrize("which", ["first", "second"])
def test_the_data_owner_may_allow_it_in_either_ledger(consortium, tmp_path, which):
    first, second = consortium.hospitals[NAME], Hospital(tmp_path / "run" / "hospitals" / "second-home", NAME)
    second.join(study("other", epsilon=1.0), ceiling=1.0)
    second.train(study("other", epsilon=1.0), 1)
    allow(*((first, second) if which == "first" else (second, first)))
    found = audit(consortium)
    assert not failed(found)
    assert public(OWNER)[:16] in words(found, "patients")


def allow(hospital: Hospital, beside: Hospital, key=OWNER, reason: str = "two consortia") -> None:
    with beside.ledger() as other:
        beside_id = other.history.ledger_id
    with hospital.ledger() as ledger:
        own, book = ledger.history.ledger_id, ledger.history.book
        ledger.override(**sign_override(key, book_id=book, ledger_id=own, others=[beside_id], reason=reason))


@pytest.mark.parametrize("wrong", ["own key", "not the policy's key", "changed reason"])
def test_an_override_that_the_data_owner_did_not_sign_counts_for_nothing(consortium, tmp_path, wrong):
    first, second = consortium.hospitals[NAME], Hospital(tmp_path / "run" / "hospitals" / "second-home", NAME)
    second.join(study("other"))
    allow(first, second, KEYS[NAME] if wrong == "own key" else OWNER)
    if wrong == "not the policy's key":
        for home in (first.home, second.home):
            (home / "policy.toml").write_text(f'data_owner_key = "{public(KEYS["clinic-b"])}"\n')
    if wrong == "changed reason":
        first.rewrite(lambda bodies: [b if b["kind"] != "override" else {**b, "reason": "three"} for b in bodies])
    assert failed(audit(consortium))[NAME, "patients"] == "AUDIT_SAME_PATIENTS"


def test_an_override_adds_no_budget(consortium, tmp_path):
    first, second = consortium.hospitals[NAME], Hospital(tmp_path / "run" / "hospitals" / "second-home", NAME)
    second.join(study("other"), total_ceiling=4.5)
    for round in range(1, 5):
        second.train(study("other"), round)
    allow(second, first)
    assert failed(audit(consortium)) == {(NAME, "patients"): "AUDIT_CEILING"}


def test_other_patients_or_another_book_are_told(consortium, tmp_path):
    home = tmp_path / "run" / "hospitals" / "second-home"
    Hospital(home, NAME).join(study("other"), dataset=DATA["clinic-b"])
    second = evidence.gather(home)[0]
    bodies = [json.loads(line)["body"] for line in second.ledger.splitlines()]
    key = OWNER  # a home of the same hospital with a key of its own
    bodies[0]["signing_key"] = public(key)
    for change, told in [({}, "another set of patients"), ({"book": "e" * 64}, "another budget book")]:
        bodies[0].update(change)
        (home / "ledger.jsonl").write_bytes(chained(bodies, key))
        (home / "study.json").unlink(missing_ok=True)
        found = audit(consortium)
        assert failed(found) == {}
        assert told in words(found, "patients")


def test_more_rounds_than_the_budget_holds(consortium):
    hospital = consortium.hospitals[NAME]
    for round in range(5, 9):
        hospital.train(study(), round)
    found = audit(consortium)
    assert failed(found) == {(NAME, "budget"): "AUDIT_CEILING"}
    assert "of 4" in words(found, "budget")


def test_the_ceiling_that_held_when_it_was_spent_counts(consortium):
    hospital = consortium.hospitals[NAME]
    with hospital.ledger() as ledger:
        terms = ledger.history.terms(study().hash)
        ledger.open_study(study().hash, type(terms)(**{**terms.__dict__, "total_ceiling": 1.0}))
    assert not failed(audit(consortium)), "lowered afterwards: nothing more may be spent, nothing was"
    hospital.train(study(), 5)
    assert failed(audit(consortium))[NAME, "budget"] == "AUDIT_CEILING"


def test_a_failed_proof_and_one_that_never_ran(consortium):
    def verdict(word: str, every: bool):
        def change(bodies: Bodies) -> Bodies:
            for body in of_kind(bodies, "charge")[: None if every else 1]:
                body["checks"] = dict.fromkeys(body["checks"], word) if every else {**body["checks"], "rows": word}
            return bodies

        return change

    hospital = consortium.hospitals[NAME]
    hospital.rewrite(verdict("too-few", every=False))
    assert "rows passed 3 too-few 1" in words(audit(consortium), "proof")
    hospital.rewrite(verdict("failed", every=False))
    found = audit(consortium)
    assert failed(found)[NAME, "proof"] == "AUDIT_PROOF"
    assert "rows" in words(found, "proof")
    hospital.rewrite(verdict("not-run", every=True))
    assert next(f.verdict for f in audit(consortium) if (f.hospital, f.check) == (NAME, "proof")) == "not-run"


def test_repeatable_noise_is_a_fault_but_in_a_simulation_that_says_so(consortium):
    def seeded(bodies: Bodies) -> Bodies:
        for body in of_kind(bodies, "charge"):
            body["noise_source"] = "INSECURE-seed"
        return bodies

    for hospital in consortium.hospitals.values():
        hospital.rewrite(seeded)
    assert failed(audit(consortium))[NAME, "noise"] == "AUDIT_NOISE"
    (consortium.folder / evidence.INSECURE_MARK).write_text("7\n")
    found = audit(consortium)
    assert (NAME, "noise") not in failed(found)
    assert "protects nobody" in words(found, "noise")
    alone = gather(consortium.folder / "hospitals" / NAME)
    assert alone[0].insecure_simulation


def test_another_key_than_the_studys(consortium):
    hospital = consortium.hospitals[NAME]
    bodies = [json.loads(line)["body"] for line in hospital.path.read_bytes().splitlines()]
    bodies[0]["signing_key"] = public(OWNER)
    hospital.path.write_bytes(chained(bodies, OWNER))
    assert failed(audit(consortium))[NAME, "study"] == "LEDGER_OWNER"


def test_a_record_signed_by_somebody_else(consortium):
    hospital = consortium.hospitals[NAME]
    bodies = [json.loads(line)["body"] for line in hospital.path.read_bytes().splitlines()]
    hospital.path.write_bytes(chained(bodies, KEYS[NAME], {5: OWNER}))
    found = audit(consortium)
    assert failed(found)[NAME, "signatures"] == "LEDGER_SIGNATURE"
    assert "record 5" in words(found, "signatures")


def test_a_broken_chain_ends_that_ledgers_checks_and_not_the_others(consortium):
    path = consortium.hospitals[NAME].path
    path.write_bytes(path.read_bytes().replace(b'"steps":[25]', b'"steps":[24]', 1))
    found = audit(consortium)
    assert failed(found) == {(NAME, "chain"): "LEDGER_CORRUPT"}
    assert {f.verdict for f in found if f.hospital == NAME and f.check != "chain"} == {"not-run"}
    path.write_bytes(b"")
    assert failed(audit(consortium)) == {("run/clinic-a", "chain"): "LEDGER_CORRUPT"}, "no name is left in it"


def test_a_study_without_everybodys_signature(consortium):
    for hospital in consortium.hospitals.values():
        agreed = json.loads(agreement(study()).to_json())
        del agreed["signatures"]["clinic-b"]
        (hospital.home / "study.json").write_text(json.dumps(agreed))
    assert failed(audit(consortium)) == {(name, "study"): "STUDY_SIGNATURE" for name in NAMES}
    (consortium.hospitals["clinic-c"].home / "study.json").write_bytes(agreement(study()).to_json())
    assert not failed(audit(consortium)), "one complete copy is enough"


def test_a_certificate_that_was_changed_is_told_of_whoever_brought_it(consortium):
    path = consortium.hospitals["clinic-b"].home / "certificates" / "round-0002.json"
    path.write_bytes(path.read_bytes().replace(b'attempt\\":1', b'attempt\\":2'))
    wrong = failed(audit(consortium))
    assert wrong == {("clinic-b", "rounds"): "MSG_SIGNATURE"}
    path.write_text("{}")
    assert failed(audit(consortium)) == {("clinic-b", "study"): "AUDIT_EVIDENCE"}


def test_an_older_copy_of_a_ledger_is_told(consortium, tmp_path):
    lines = consortium.hospitals[NAME].path.read_bytes().splitlines(keepends=True)
    (tmp_path / "old.jsonl").write_bytes(b"".join(lines[:6]))
    found = verify([*gather(consortium.folder), *gather(tmp_path / "old.jsonl")])
    assert {(f.where, f.code) for f in found if f.verdict == "failed"} == {
        ("old.jsonl", "LEDGER_ROLLBACK"), ("old.jsonl", "AUDIT_UNCHARGED"),
    }  # fmt: skip


# ---- long ledgers


def test_signatures_of_a_long_ledger_are_checked_in_processes_of_their_own(monkeypatch, consortium):
    lines = complete_lines(consortium.hospitals[NAME].path.read_bytes())
    key = public(KEYS[NAME])
    monkeypatch.setattr(signatures, "FEW", 5)
    assert signatures.Signatures(lines, key).first_unsigned() is None
    for place in (0, 3, len(lines) - 1):
        wrong = [*lines[:place], lines[place].replace(b'"seq":', b'"sep":'), *lines[place + 1 :]]
        assert signatures.Signatures(wrong, key).first_unsigned() == place + 1
    assert signatures.Signatures([b"no record\n"] * 9, key).first_unsigned() == 1
    assert signatures.Signatures(lines, "no key").first_unsigned() == 1
    unasked = signatures.Signatures(lines, key)
    unasked.give_up()


# ---- what is handed over


def test_a_bundle_as_a_folder_and_as_a_zip(consortium, tmp_path):
    folder = consortium.bundle(NAME, tmp_path / "audit-paper-clinic-a")
    found = verify(gather(folder))
    assert [f.check for f in found] == ["seal", *CHECKS]
    assert not failed(found)
    for top in ("audit-paper-clinic-a/", ""):
        path = zipped(folder, tmp_path / "bundle.zip", top)
        assert [(f.check, f.verdict) for f in verify(gather(path))] == [(f.check, f.verdict) for f in found]
    (tmp_path / "all").mkdir()
    for name in ("clinic-b", "clinic-c"):
        zipped(consortium.bundle(name, tmp_path / name), tmp_path / "all" / f"{name}.zip", f"{name}/")
    assert not failed(verify([*gather(folder), *gather(tmp_path / "all")]))


def zipped(folder: Path, path: Path, top: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, top + file.relative_to(folder).as_posix())
    return path


@pytest.mark.parametrize("change", ["byte", "more", "less", "seal", "other key", "capitals", "no seal"])
def test_a_bundle_that_is_not_as_it_was_sealed(consortium, tmp_path, change):
    folder = consortium.bundle(NAME, tmp_path / "bundle")
    match change:
        case "byte":
            (folder / "anchors.json").write_text("[]")
        case "more":
            (folder / "more.txt").write_text("more")
        case "less":
            (folder / "anchors.json").unlink()
        case "seal":
            (folder / "SHA256SUMS.sig").write_text("0" * 128 + "\n")
        case "other key":
            seal(folder, KEYS["clinic-b"])
        case "capitals":
            (folder / "SHA256SUMS.sig").write_text((folder / "SHA256SUMS.sig").read_text().upper())
        case "no seal":
            (folder / "SHA256SUMS.sig").unlink()
    assert failed(verify(gather(folder))) == {(NAME, "seal"): "AUDIT_SEAL"}


def test_past_studies_of_a_home_are_gathered(consortium):
    hospital = consortium.hospitals[NAME]
    past = hospital.home / "past" / study().hash[:16]
    past.mkdir(parents=True)
    for name in ("study.json", "certificates"):
        shutil.move(hospital.home / name, past / name)
    found = gather(hospital.home)[0]
    assert set(found.agreements) == {study().hash}
    assert len(found.certificates[study().hash]) == 4
    assert "/" not in found.where, "a name, not a path of this machine"


def hostile(path: Path, names: list[str], content: bytes = b"x", mode: int = 0o100644) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            member = zipfile.ZipInfo(name)
            member.external_attr, member.compress_type = mode << 16, zipfile.ZIP_DEFLATED
            archive.writestr(member, content)
    return path


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    "names",
    [["../ledger.jsonl"], ["/ledger.jsonl"], ["a/../ledger.jsonl"], ["a\\ledger.jsonl"], ["ledger.jsonl"] * 2, ["x"]],
)
def test_a_zip_that_leads_out_of_itself_is_refused(tmp_path, names):
    with pytest.raises(RunError) as caught:
        gather(hostile(tmp_path / "b.zip", names))
    assert caught.value.code == "AUDIT_EVIDENCE"


def test_a_zip_with_a_link_a_bomb_or_damage_is_refused(tmp_path, monkeypatch):
    link = hostile(tmp_path / "link.zip", ["ledger.jsonl"], b"/etc/passwd", 0o120777)
    monkeypatch.setattr(evidence, "MAX_BYTES", 1 << 20)
    bomb = hostile(tmp_path / "bomb.zip", ["ledger.jsonl", "b"], b"\0" * (700 << 10))
    many = hostile(tmp_path / "many.zip", [f"{i}" for i in range(30)])
    damaged = tmp_path / "damaged.zip"
    damaged.write_bytes(bomb.read_bytes().replace(b"\0\0", b"\1\1", 3))
    monkeypatch.setattr(evidence, "MAX_FILES", 20)
    for path in (link, bomb, many, damaged):
        with pytest.raises(RunError) as caught:
            gather(path)
        assert caught.value.code == "AUDIT_EVIDENCE", path


def test_links_in_a_folder_are_not_followed(consortium, tmp_path):
    home = consortium.hospitals[NAME].home
    (tmp_path / "secret.json").write_text('{"header": "x", "signature": ""}')
    (home / "certificates" / "round-0009.json").symlink_to(tmp_path / "secret.json")
    assert len(gather(home)[0].certificates[study().hash]) == 4


def test_nothing_to_audit_is_an_error(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(RunError) as caught:
            gather(path)
        assert caught.value.code == "AUDIT_EVIDENCE"
