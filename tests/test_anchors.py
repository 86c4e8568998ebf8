"""A ledger that became shorter is noticed: by the hospital, by its own words at the server, and by its peers."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from ledgers import ledger_of
from test_cycle import collect, hospitals, open_round

from fedmedgan.client import anchors, checkpoint
from fedmedgan.client.cycle import Hospital
from fedmedgan.server.app import KEY_FILE
from fedmedgan.server.cycle import Coordinator
from fedmedgan.shared.agreement import Agreement
from fedmedgan.shared.errors import FedMedGanError, MessageError, PrivacyError
from fedmedgan.shared.messages import (
    Certificate,
    Envelope,
    KeyGrant,
    Roll,
    Signed,
    Update,
    open_certificate,
    open_shown,
)
from fedmedgan.shared.privacy.events import TrainingSteps
from fedmedgan.shared.privacy.history import read as read_ledger
from fedmedgan.shared.secure_sum.keys import load_signing_key
from fedmedgan.simulations import consortium
from fedmedgan.simulations.local_grid import LocalGrid


def coordinator(place) -> Coordinator:
    folder, study = place
    grid = LocalGrid(consortium.homes(folder, study))
    return Coordinator(grid, Agreement.load(folder / "study.json"), load_signing_key(folder / KEY_FILE), folder)


@pytest.fixture(scope="module")
def states(_prepared, tmp_path_factory):
    """Run folders of one study: before any round, after round 1, after round 2."""
    _, study = _prepared
    base = tmp_path_factory.mktemp("anchors")
    shutil.copytree(_prepared[0], base / "run")
    running = coordinator((base / "run", study))
    with running.journal:
        running._call_roll(wait=True)
        running._renew_key(1)
        for number in range(3):
            if number:
                running.round(number)
            shutil.copytree(base / "run", base / str(number))
    return base, study


@pytest.fixture
def after(states, tmp_path) -> Callable[[int], tuple]:
    """after(n): a copy of the run folder as it was after round n."""

    def copy(number: int):
        shutil.copytree(states[0] / str(number), tmp_path / "run", dirs_exist_ok=True)
        return tmp_path / "run", states[1]

    return copy


def lines(ledger: Path) -> list[bytes]:
    return ledger.read_bytes().splitlines(keepends=True)


def fork(ledger: Path, study, kept: int, more: int) -> None:
    """Back to `kept` records, and on from there: every record is valid."""
    ledger.write_bytes(b"".join(lines(ledger)[:kept]))
    with ledger_of(ledger.parent) as opened:
        for number in range(more):
            opened.reserve(study.hash, number + 1, [TrainingSteps(9.0, 0.25, 1)])


def put_back(earlier: Path, place, *, book: bool = True) -> Path:
    """Site-0 as it was in an earlier copy of the run folder, with its budget book or without. Returns its home."""
    homes = [consortium.homes(folder, place[1])[0] for folder in (earlier, place[0])]
    books = [folder / "budget-books" / "site-0" for folder in (earlier, place[0])]
    for old, now in (homes, books)[: 1 + book]:
        shutil.rmtree(now)
        shutil.copytree(old, now)
    return homes[1]


ROLL_BACKS: dict[str, tuple[Callable[[Path, Path, object], object], str]] = {
    "one record": (lambda now, old, study: now.write_bytes(b"".join(lines(now)[:-1])), "LEDGER_ROLLBACK"),
    "to the beginning": (lambda now, old, study: now.write_bytes(b""), "LEDGER_ROLLBACK"),
    "removed": (lambda now, old, study: now.unlink(), "LEDGER_ROLLBACK"),
    "restored from a copy": (lambda now, old, study: shutil.copy(old, now), "LEDGER_ROLLBACK"),
    "forked, as long": (lambda now, old, study: fork(now, study, 3, 4), "LEDGER_FORK"),
    "forked, and longer": (lambda now, old, study: fork(now, study, 2, 9), "LEDGER_FORK"),
}


@pytest.mark.parametrize("name", ROLL_BACKS)
def test_the_hospital_itself_notices_by_its_model(states, after, name):
    place = after(1)
    home = consortium.homes(*place)[0]
    alter, code = ROLL_BACKS[name]
    alter(home / "ledger.jsonl", consortium.homes(states[0] / "0", place[1])[0] / "ledger.jsonl", place[1])
    ledger = (home / "ledger.jsonl").read_bytes() if (home / "ledger.jsonl").exists() else None
    model = (home / "model.safetensors").read_bytes()
    key_id = Hospital(home).keys.key_id
    certificate = coordinator((states[0] / "2", place[1]))
    with certificate.journal as journal:
        sum_of_2 = journal.certificate(2)
    for call, *arguments in (
        ("present", Roll(study=place[1].hash, approvals=(), anchors=())),
        ("local_update", open_round(place[1], 2, key_id=key_id)),
        ("apply_sum", *sum_of_2),
        ("take_key", KeyGrant.model_construct(), b""),
    ):
        with pytest.raises(PrivacyError) as caught:
            getattr(Hospital(home), call)(*arguments)
        assert caught.value.code == code
    assert (home / "model.safetensors").read_bytes() == model
    assert ((home / "ledger.jsonl").read_bytes() if (home / "ledger.jsonl").exists() else None) == ledger
    assert not (home / "update.safetensors").exists(), "nothing was trained"


def test_a_whole_home_restored_from_a_copy_is_noticed_by_its_own_words_at_the_server(states, after):
    place = after(2)
    home = put_back(states[0] / "1", place)
    silent = Roll(study=place[1].hash, approvals=(), anchors=())
    Hospital(home).present(silent)  # by itself it is whole: only others can know
    running = coordinator(place)
    with running.journal as journal:
        running._call_roll()
        assert set(running.members) == {"site-1", "site-2", "site-3"}
        shown = silent.model_copy(update={"anchors": journal.anchors()})
    with pytest.raises(PrivacyError) as caught:
        Hospital(home).present(shown)
    assert caught.value.code == "LEDGER_ROLLBACK"
    assert "LEDGER_ROLLBACK" in (place[0] / "events.jsonl").read_text(), "and the coordinator's log says why"


def test_a_whole_home_restored_from_a_copy_is_noticed_by_the_hospitals_budget_book(states, after):
    home = put_back(states[0] / "1", after(2), book=False)
    with pytest.raises(PrivacyError) as caught:
        Hospital(home).present(Roll(study=states[1].hash, approvals=(), anchors=()))
    assert caught.value.code == "LEDGER_ROLLBACK"


def test_a_restored_home_that_went_another_way_is_a_fork(states, after):
    place = after(2)
    home = put_back(states[0] / "1", place)
    fork(home / "ledger.jsonl", place[1], 7, 5)
    with coordinator(place).journal as journal:
        shown = Roll(study=place[1].hash, approvals=(), anchors=journal.anchors())
    with pytest.raises(PrivacyError) as caught:
        Hospital(home).present(shown)
    assert caught.value.code == "LEDGER_FORK"


def test_the_server_cannot_make_an_anchor_up(after):
    """Else it could lock a hospital out with a ledger that never was."""
    place = after(1)
    home = consortium.homes(*place)[0]
    running = coordinator(place)
    with running.journal as journal:
        own = next(s for s in journal.anchors() if open_shown(Update, s, place[1]).hospital == "site-0")
    longer = open_shown(Update, own, place[1]).model_copy(update={"ledger_seq": 99})
    for forged in (
        Signed(header=longer.canonical().decode(), signature=own.signature),
        Envelope.seal(longer, running.private).shown(),
        Envelope.seal(longer, Hospital(consortium.homes(*place)[1]).keys.signing).shown(),
    ):
        with pytest.raises(MessageError) as caught:
            Hospital(home).present(Roll(study=place[1].hash, approvals=(), anchors=(forged,)))
        assert caught.value.code == "MSG_SIGNATURE"


# ---- the server helps the cheater: only peers are left


def cheated(place, seq: int, head: str):
    """A certificate of round 2 in which site-0, with its own key, says that its ledger is this one."""
    key_id = hospitals(place)[0].keys.key_id
    total, envelopes = collect(place, open_round(place[1], 2, key_id=key_id))
    lie = envelopes[0].open(Update, place[1]).model_copy(update={"ledger_seq": seq, "ledger_head": head})
    total.signed["site-0"] = Envelope.seal(lie, hospitals(place)[0].keys.signing).shown()
    return total.certify()


@pytest.mark.parametrize(
    ("back", "code"), [(1, "LEDGER_ROLLBACK"), (3, "LEDGER_ROLLBACK"), (0, "LEDGER_FORK")], ids=["one", "all", "fork"]
)
def test_peers_notice_by_the_certificate_where_the_server_keeps_still(after, back, code):
    place = after(1)
    site = place[1].sites[0]
    seq, _ = read_ledger(consortium.homes(*place)[1] / "ledger.jsonl").peers[site.signing_key]
    certificate, payload = cheated(place, seq - back, "5" * 64)
    for home in consortium.homes(*place)[1:]:
        known, model = (home / "ledger.jsonl").read_bytes(), (home / "model.safetensors").read_bytes()
        with pytest.raises(PrivacyError) as caught:
            Hospital(home).apply_sum(certificate, payload)
        assert caught.value.code == code
        assert "site-0" in caught.value.line()
        assert (home / "ledger.jsonl").read_bytes() == known
        assert (home / "model.safetensors").read_bytes() == model


def test_a_journal_that_was_restored_too_has_nothing_to_bring_the_hospital_up_with(states, after):
    """Site-0 and the journal are back before round 1, the others are not: nothing is trained a second time."""
    place = after(2)
    home = put_back(states[0] / "0", place)
    for name in ("journal.db", "sums", "updates"):
        old, now = states[0] / "0" / name, place[0] / name
        shutil.rmtree(now, ignore_errors=True)
        now.unlink(missing_ok=True) if old.is_file() else None
        shutil.copytree(old, now) if old.is_dir() else shutil.copy(old, now)
    for left in place[0].glob("journal.db-*"):
        left.unlink()
    with pytest.raises(FedMedGanError) as caught:
        coordinator(place).run()
    assert caught.value.code == "RUN_JOURNAL"
    assert read_ledger(home / "ledger.jsonl").spent() == []


def test_the_server_refuses_the_update_of_a_shorter_ledger(after):
    place = after(1)
    running = coordinator(place)
    with running.journal as journal:
        known = open_shown(Update, journal.anchors()[0], place[1])
        running._check_anchor(known)
        for change, code in (
            ({"ledger_seq": known.ledger_seq - 1}, "LEDGER_ROLLBACK"),
            ({"ledger_head": "5" * 64}, "LEDGER_FORK"),
        ):
            with pytest.raises(PrivacyError) as caught:
                running._check_anchor(known.model_copy(update=change))
            assert caught.value.code == code


def test_peers_keep_anchors_over_studies_by_key_and_not_by_name(after):
    """A second study may give a hospital another name; its ledger goes on."""
    place = after(1)
    home = consortium.homes(*place)[1]
    known = read_ledger(home / "ledger.jsonl").peers
    study = place[1]
    assert set(known) == {site.signing_key for site in study.sites}
    sites = (study.sites[1].model_copy(update={"name": "other"}), *study.sites[2:], study.sites[0])
    renamed = study.model_copy(update={"sites": sites})
    seq, head = known[study.sites[1].signing_key]
    update = Update.model_construct(ledger_seq=seq - 1, ledger_head=head)
    with pytest.raises(PrivacyError) as caught:
        anchors.check_peers(known, {"other": update}, renamed)
    assert caught.value.code == "LEDGER_ROLLBACK"


def test_the_certificate_is_kept_and_every_head_in_it_is_in_the_ledger(after):
    place = after(2)
    for home in consortium.homes(*place):
        history = read_ledger(home / "ledger.jsonl")
        written = [record.body for record in history.records if record.kind == "anchor"]
        assert [body["round"] for body in written] == [1, 2]
        for body in written:
            kept = Signed.model_validate_json((home / "certificates" / f"round-{body['round']:04d}.json").read_bytes())
            certificate = open_shown(Certificate, kept, place[1])
            assert hashlib.sha256(kept.header.encode()).hexdigest() == body["certificate"]
            for name, update in open_certificate(certificate, place[1]).items():
                assert body["heads"][place[1].site(name).signing_key] == [update.ledger_seq, update.ledger_head]


def test_the_model_names_the_ledger_that_it_was_made_under(after):
    home = consortium.homes(*after(1))[0]
    notes = checkpoint.read(home / "model.safetensors")[1]
    history = read_ledger(home / "ledger.jsonl")
    assert (notes["ledger_seq"], notes["ledger_head"]) == (history.seq, history.head)
