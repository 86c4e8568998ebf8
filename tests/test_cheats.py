"""A study of four hospitals, one of which cheats in each of several ways: the audit names hospital and cheat, and the
honest hospitals pass. Every hospital is the real one, with its own key; the cheater changes only what is its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
from conftest import tiny_study
from ledgers import rewritten
from test_anchors import coordinator
from test_privacy_cycle import second  # noqa: F401

from fedmedgan.audit.evidence import gather
from fedmedgan.audit.findings import Finding
from fedmedgan.audit.verify import verify
from fedmedgan.client import joining
from fedmedgan.client.budget_book import BudgetBook
from fedmedgan.client.cycle import Hospital
from fedmedgan.shared.privacy.history import NOTHING, complete_lines
from fedmedgan.shared.privacy.history import read as read_ledger
from fedmedgan.shared.privacy.ledger import Ledger
from fedmedgan.shared.privacy.records import line_hash
from fedmedgan.simulations import consortium

CHEATER, HONEST = "site-0", {"site-1", "site-2", "site-3"}


def run_study(place, before_round: Callable[[int], object] = lambda number: nullcontext()) -> None:
    """Both rounds, through the real coordinator; `before_round` gives a context in which a round runs."""
    running = coordinator(place)
    with running.journal:
        running._call_roll(wait=True)
        running._renew_key(1)
        for number in (1, 2):
            with before_round(number):
                running.round(number)


@pytest.fixture(scope="module")
def honest(_prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("honest") / "run"
    shutil.copytree(_prepared[0], folder)
    place = folder, _prepared[1]
    run_study(place)
    return place


@pytest.fixture
def place(honest, tmp_path):
    """A copy of the finished study."""
    shutil.copytree(honest[0], tmp_path / "run")
    return tmp_path / "run", honest[1]


def failures(*paths: Path) -> dict[str, set[str | None]]:
    """hospital -> codes of its failed checks."""
    evidence = [one for path in paths for one in gather(path)]
    found: list[Finding] = verify(evidence)
    assert found
    return {
        name: {f.code for f in found if f.hospital == name and f.verdict == "failed"} for name in [CHEATER, *HONEST]
    }


def assert_named(found: dict[str, set[str | None]], code: str, *also: str) -> None:
    assert code in found[CHEATER], found
    assert found[CHEATER] <= {code, *also}, found
    assert not any(found[name] for name in HONEST), found


def ledger_of_cheater(place) -> Path:
    return consortium.home_of(place[0], CHEATER) / "ledger.jsonl"


def rewrite(place, change: Callable[[dict], dict | None]) -> None:
    """Write the cheater's ledger anew with its own key: `change` gives each body's new fields, None drops it."""
    path = ledger_of_cheater(place)
    signing = Hospital(path.parent).keys.signing
    lines: list[bytes] = []
    numbers: dict[int, int] = {}
    for line in complete_lines(path.read_bytes()):
        body = json.loads(line)["body"]
        fields = change(body)
        if fields is None:
            continue
        numbers[body["seq"]] = seq = len(lines) + 1
        if "reserve" in body:
            fields["reserve"] = numbers[body["reserve"]]
        lines.append(rewritten(line, signing, **fields, seq=seq, prev=line_hash(lines[-1]) if lines else NOTHING))
    path.write_bytes(b"".join(lines))
    read_ledger(path)  # by itself it is a whole, signed ledger


def test_the_honest_study_passes(honest):
    found = failures(honest[0])
    assert not any(found.values()), found


def test_records_dropped(place):
    """The second round is taken out, everything after it is signed again."""
    rewrite(place, lambda body: None if body.get("round") == 2 or body.get("reserve") == 8 else {})
    assert_named(failures(place[0]), "LEDGER_ROLLBACK", "LEDGER_FORK", "AUDIT_UNCHARGED")


def test_records_dropped_and_replaced(place):
    """As long as it was: a ledger in which the second round cost one step."""

    def change(body: dict) -> dict:
        if body["kind"] == "reserve" and body["round"] == 2:
            return {"events": [{**body["events"][0], "steps": 1}]}
        return {"steps": [1]} if body["kind"] == "charge" and body["reserve"] > 5 else {}

    rewrite(place, change)
    assert_named(failures(place[0]), "LEDGER_FORK", "AUDIT_UNCHARGED")


def test_rollback(place):
    path = ledger_of_cheater(place)
    path.write_bytes(b"".join(complete_lines(path.read_bytes())[:7]))
    assert_named(failures(place[0]), "LEDGER_ROLLBACK", "AUDIT_UNCHARGED")


def test_sigma_changed_in_the_records(place):
    """More noise is claimed than there was, in every record."""

    def change(body: dict) -> dict:
        if body["kind"] != "reserve":
            return {}
        event = body["events"][0]
        return {"events": [{**event, "noise_multiplier": repr(2 * float(event["noise_multiplier"]))}]}

    rewrite(place, change)
    assert_named(failures(place[0]), "AUDIT_NOISE", "LEDGER_FORK")


def test_sigma_changed_in_the_training(tmp_path):
    """The hospital adds less noise than the study's budget needs, and says so in its records."""
    place = tmp_path / "run", consortium.prepare(tiny_study(privacy={"epsilon": 2.0}), tmp_path / "run", {})
    home = consortium.home_of(place[0], CHEATER)
    noise = json.loads((home / joining.NOISE).read_text())
    (home / joining.NOISE).write_text(json.dumps(noise | {"noise_multiplier": 0.8 * noise["noise_multiplier"]}))
    policy = home / "policy.toml"
    policy.write_text(policy.read_text().replace("max_epsilon = 2.0", "max_epsilon = 100.0"))
    with pytest.MonkeyPatch.context() as patch:
        budget = Hospital._budget

        def generous(self, ledger):
            made = budget(self, ledger)
            made.study_ceiling = made.total_ceiling = 100.0
            return made

        require = Hospital._require_proof
        patch.setattr(Hospital, "_require_proof", lambda h, x: h.site.name == CHEATER or require(h, x))

        patch.setattr(
            Hospital, "_budget", lambda h, ledger: (generous if h.site.name == CHEATER else budget)(h, ledger)
        )
        run_study(place)
    assert_named(failures(place[0]), "AUDIT_NOISE", "AUDIT_CEILING")


def test_an_extra_round_run_uncharged(prepared):
    """Round 2 is trained and sent without a word in the ledger, whose head in the update is therefore true."""
    train, release = Hospital._train, Hospital._record_release

    def train_silently(self, number: int) -> None:
        if self.site.name != CHEATER or number != 2:
            return train(self, number)
        original = self.home / "ledger.jsonl"
        kept, book = original.read_bytes(), self.home.parents[1] / "budget-books" / CHEATER
        shutil.copytree(book, book.with_name("kept"))
        train(self, number)
        original.write_bytes(kept)
        shutil.rmtree(book)
        book.with_name("kept").rename(book)
        return None

    def release_silently(self, opened, digest, size):
        if self.site.name != CHEATER or opened.round != 2:
            return release(self, opened, digest, size)
        return read_ledger(self.home / "ledger.jsonl")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hospital, "_train", train_silently)
        patch.setattr(Hospital, "_record_release", release_silently)
        run_study(prepared)
    assert_named(failures(prepared[0]), "AUDIT_UNCHARGED")


def test_a_round_charged_for_fewer_steps_than_it_took(prepared):
    """The update is in the certificate and the charge in the ledger, but not for what was done."""
    charge = Ledger.charge

    def charge_less(self, reservation: int, *steps: int, **proof) -> None:
        charge(self, reservation, *(1 if self.hospital == CHEATER else done for done in steps), **proof)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ledger, "charge", charge_less)
        run_study(prepared)
    assert_named(failures(prepared[0]), "AUDIT_UNCHARGED")


def test_another_study_on_the_same_patients(keyed, second, monkeypatch):  # noqa: F811
    """A second home with a program that does not ask the data owner."""
    home, study = second
    monkeypatch.setattr(BudgetBook, "_refuse_unless_allowed", lambda *_: None)
    joining.join(home, study)
    assert_named(failures(keyed[0]), "AUDIT_SAME_PATIENTS")  # the second home lies among the others
