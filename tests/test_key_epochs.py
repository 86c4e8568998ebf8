"""Key epochs: hospitals make and change the key, the server carries it and cannot open it, and lies are refused."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import Message

from fedmedgan.client import joining
from fedmedgan.client.cycle import Hospital
from fedmedgan.client.joining import REJECTED
from fedmedgan.server import cycle, worker
from fedmedgan.server.app import KEY_FILE
from fedmedgan.server.cycle import Coordinator
from fedmedgan.shared import crash
from fedmedgan.shared.agreement import Agreement
from fedmedgan.shared.errors import FedMedGanError, RunError
from fedmedgan.shared.messages import (
    Envelope,
    EpochOpen,
    EpochStart,
    Header,
    KeyGrant,
    KeyOffer,
    KeyReady,
    Leave,
    RoundOpen,
    Signed,
    WrappedHash,
    open_shown,
    split_parts,
)
from fedmedgan.shared.privacy.history import read as read_ledger
from fedmedgan.shared.secure_sum import epochs, keys
from fedmedgan.shared.secure_sum.keys import Epoch, HospitalKeys, load_signing_key
from fedmedgan.simulations import consortium
from fedmedgan.simulations.local_grid import LocalGrid

NAMES = tuple(f"site-{i}" for i in range(4))


class Grid(LocalGrid):
    """Keeps every byte that crossed the wire."""

    wire: list[bytes]

    def call(self, node: int, message: Message) -> Message:
        answer = super().call(node, message)
        for said in (message, answer):
            if not said.has_error():
                self.wire.append(Envelope.from_record(said.content, 1 << 30).to_bytes())
        return answer


def coordinator(place, **misbehaves) -> tuple[Coordinator, Grid]:
    folder, study = place
    grid = Grid(consortium.homes(folder, study), **misbehaves)
    grid.wire = []
    agreement = Agreement.load(folder / "study.json")
    return Coordinator(grid, agreement, load_signing_key(folder / KEY_FILE), folder), grid


def events(place, name: str) -> list[dict]:
    said = [json.loads(line) for line in (place[0] / "events.jsonl").read_text().splitlines()]
    return [event for event in said if event["event"] == name]


def current(place) -> list[Epoch | None]:
    return [HospitalKeys.load(home / "keys").epoch for home in consortium.homes(*place)]


def needles(epoch: Epoch) -> list[bytes]:
    """Pieces of an epoch's two secrets, as bytes, hex and base64 at each alignment."""
    found = []
    for piece in (epoch.mac_root, *(epoch.he_secret[start : start + 33] for start in (600, 9_000, 30_000))):
        shifted = [base64.b64encode(piece[i:])[2:-4] for i in range(3)]
        found += [piece, piece.hex().encode(), piece.hex().upper().encode(), *shifted]
    return found


def holds(data: bytes, epoch: Epoch) -> bool:
    return any(needle in data for needle in needles(epoch))


def files_with(folder: Path, epoch: Epoch) -> list[str]:
    return [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and holds(p.read_bytes(), epoch)]


# ---- the ceremony


def test_a_hospital_makes_the_first_key_and_the_server_never_holds_it(prepared):
    folder, _ = prepared
    running, grid = coordinator(prepared)
    with running.journal:
        running._call_roll(wait=True)
        running._renew_key(1)
        held = current(prepared)
        assert [(e.number, e.members, e.since_round, e.key_id) for e in held] == [(1, NAMES, 1, held[0].key_id)] * 4
        found = {f"hospitals/{name}/keys/epoch.key" for name in NAMES}
        assert set(files_with(folder, held[0])) == found, "and the search itself finds what is there"
        assert (folder / "journal.db").stat().st_size > 0
        assert not any(holds(data, held[0]) for data in grid.wire)
        assert [running.journal.blob(1, name) for name in NAMES] == [None] * 4
        assert [e["leader"] for e in events(prepared, "epoch_opened")] == ["site-0"]


def test_where_a_leader_fails_the_next_hospital_leads(prepared):
    asked = []

    def fails(node: int, kind: str) -> int | None:
        asked.append((node, kind))
        return 2 if (node, kind) == (0, "train.key") and asked.count((node, kind)) == 1 else None

    running, _ = coordinator(prepared, fails=fails)
    with running.journal:
        running._call_roll(wait=True)
        running._renew_key(1)
        assert [e.number for e in current(prepared)] == [2] * 4
        failed, opened = events(prepared, "epoch_failed"), events(prepared, "epoch_opened")
    assert [(e["leader"], e["reason"]) for e in failed] == [("site-0", "RUN_NODE")]
    assert [e["leader"] for e in opened] == ["site-1"]


def test_the_first_key_needs_every_hospital(prepared):
    running, _ = coordinator(prepared, fails=lambda node, kind: 2 if (node, kind) == (3, "train.key") else None)
    with running.journal, pytest.raises(RunError) as caught:
        running._call_roll(wait=True)
        running._renew_key(1)
    assert caught.value.code == "RUN_QUORUM"
    assert current(prepared) == [None] * 4


def test_two_who_are_left_make_no_key(prepared):
    for home in consortium.homes(*prepared)[2:]:
        joining.leave(home)
    running, _ = coordinator(prepared)
    with running.journal, pytest.raises(RunError) as caught:
        running._call_roll(wait=True)
        running._renew_key(1)
    assert caught.value.code == "RUN_QUORUM"
    assert "site-0: KEY_EPOCH" in caught.value.line()
    assert current(prepared) == [None] * 4


# ---- rotation


@pytest.fixture(scope="module")
def _rotating(_prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rotating") / "run"
    shutil.copytree(_prepared[0], folder)
    sections = {
        "training": _prepared[1].training.model_copy(update={"rounds": 3}),
        "secure_sum": _prepared[1].secure_sum.model_copy(update={"rotate_every": 1}),
    }
    study = _prepared[1].model_copy(update=sections)
    agreement = consortium.agree(study, folder)
    (folder / "study.json").write_bytes(agreement.to_json())
    return folder, study


@pytest.fixture
def rotating(_rotating, tmp_path):
    """(run folder, study) of three rounds with a new key each."""
    shutil.copytree(_rotating[0], tmp_path / "run")
    return tmp_path / "run", _rotating[1]


def test_keys_change_by_schedule_and_when_one_leaves_and_one_that_was_away_gets_what_it_missed(rotating):
    """Round 1: all. Round 2: site-3 is away. Then site-2 leaves. Round 3: site-3 is back, behind by two keys."""
    folder, _ = rotating
    homes = consortium.homes(*rotating)
    secrets = {}
    away: set[int] = set()
    running, _ = coordinator(rotating, absent=lambda node, polls: node in away)
    with running.journal:
        running._call_roll(wait=True)
        running.round(1)
        secrets[1] = current(rotating)[0]
        away.add(3)
        running.round(2)
        secrets[2] = current(rotating)[0]
        assert [e.number for e in current(rotating)] == [2, 2, 2, 1]
        assert running.journal.blob(2, "site-3") is not None, "kept for it alone"
        assert [running.journal.blob(2, name) for name in NAMES[:3]] == [None] * 3
    joining.leave(homes[2])
    last, grid = coordinator(rotating)
    last.run()
    secrets[3] = current(rotating)[0]

    held = current(rotating)
    assert [(held[i].number, held[i].members) for i in (0, 1, 3)] == [(3, ("site-0", "site-1", "site-3"))] * 3
    assert held[2].number == 2, "who has left is given no further key"
    assert len({e.key_id for e in secrets.values()}) == 3
    assert len({Hospital(homes[i]).model_hash for i in (0, 1, 3)}) == 1
    assert [e["cohort"] for e in events(rotating, "round_aggregated")][2] == ["site-0", "site-1", "site-3"]
    assert files_with(folder, secrets[1]) == []
    assert files_with(folder, secrets[2]) == ["hospitals/site-2/keys/epoch.key"]
    assert not any(holds(data, secrets[3]) for data in grid.wire)


def test_a_coordinator_that_died_in_a_broadcast_brings_everybody_up_before_it_asks_for_a_new_key(rotating, monkeypatch):
    """Else nobody would give the new key: for those who are a round behind it is not due."""

    class Died(BaseException):
        pass

    def one_sum_was_sent(node: int, kind: str) -> None:
        if (node, kind) == (1, "train.apply"):
            raise Died

    def round_2_was_opened(passed: str) -> None:
        if passed == "server.attempt-opened":
            raise Died

    homes = consortium.homes(*rotating)
    with pytest.raises(Died):
        coordinator(rotating, fails=one_sum_was_sent)[0].run()
    assert [Hospital(home).applied_round for home in homes] == [1, 0, 0, 0]
    monkeypatch.setattr(crash, "point", round_2_was_opened)
    with pytest.raises(Died):
        coordinator(rotating)[0].run()
    assert [Hospital(home).applied_round for home in homes] == [1] * 4
    assert [e.number for e in current(rotating)] == [2] * 4


def test_a_hospital_that_leaves_in_mid_study_is_soon_no_member_and_below_three_it_stops(prepared):
    """Nobody restarts the coordinator here: it hears of it by a refusal and asks for the signed word."""
    homes = consortium.homes(*prepared)
    running, _ = coordinator(prepared)
    with running.journal:
        running._call_roll(wait=True)
        running.round(1)
        joining.leave(homes[3])
        running.round(2)
        assert events(prepared, "round_aggregated")[1]["cohort"] == list(NAMES[:3])
        running._call_roll()
        assert set(running.journal.leaves()) == {"site-3"}
        running._renew_key(3)
        assert [e.number for e in current(prepared)] == [2, 2, 2, 1]
        joining.leave(homes[2])
        running.members.pop("site-2")  # as after the refusal of its next round
        running._call_roll()
        with pytest.raises(RunError) as caught:
            running._renew_key(3)
    assert caught.value.code == "RUN_QUORUM"
    assert [e.number for e in current(prepared)] == [2, 2, 2, 1]


# ---- rejected sums


class Doubling(worker.WorkerSum):
    """A server that counts everybody twice."""

    def add(self, blobs) -> None:
        super().add(blobs)
        super().add(blobs)


def test_three_rejected_sums_stop_the_key_until_persons_allow_another(prepared, monkeypatch):
    homes = consortium.homes(*prepared)

    def one_life() -> RunError:
        with pytest.raises(RunError) as caught:
            coordinator(prepared)[0].run()
        assert caught.value.code == "RUN_QUORUM"
        return caught.value

    monkeypatch.setattr(cycle, "WorkerSum", Doubling)
    for _ in range(3):
        assert "ROUND_REJECTED" in one_life().line()
    monkeypatch.undo()
    assert "KEY_STOPPED" in one_life().line(), "an honest server is not enough"
    stopped = Hospital(homes[0])
    opened = RoundOpen(
        study=stopped.study.hash, round=1, attempt=2, cohort=NAMES[:3], epoch=1, key_id=stopped.keys.key_id
    )
    lead = EpochOpen(study=stopped.study.hash, epoch=2, leader="site-0", members=NAMES, leaves=())
    for call, argument in ((stopped.local_update, opened), (stopped.offer_key, lead)):
        with pytest.raises(FedMedGanError) as caught:
            call(argument)
        assert caught.value.code == "KEY_STOPPED"
    assert "KEY_STOPPED" in one_life().line(), "the server cannot have another key by asking"
    assert [e.number for e in current(prepared)] == [1] * 4

    for home in homes[:2]:
        assert joining.allow_rotation(home) == 1
    assert "site-2: KEY_STOPPED" in one_life().line(), "two are not enough"
    for home in homes[2:]:
        joining.allow_rotation(home)
    coordinator(prepared)[0].run()
    assert events(prepared, "run_closed")[-1]["rounds"] == 2
    assert len({Hospital(home).model_hash for home in homes}) == 1
    numbers = {e.number for e in current(prepared)}
    assert len(numbers) == 1
    assert min(numbers) > 1
    kinds = [r.kind for r in read_ledger(homes[0] / "ledger.jsonl").records]
    assert kinds.count("reserve") == 2, "the update of the rejected round was sealed again, not trained again"


def test_the_permission_is_for_one_key(keyed):
    """A new key starts with no rejected sums, and cannot be replaced by the old permission."""
    home = consortium.homes(*keyed)[0]
    (home / REJECTED).write_text(json.dumps({"epoch": 1, "sums": 3}))
    joining.allow_rotation(home)
    following = keys.new_epoch(2, NAMES)
    keys.store_next(home / "keys", following)
    keys.activate_next(home / "keys", 1)
    hospital = Hospital(home)
    hospital._epochs().check_running()
    with pytest.raises(FedMedGanError) as caught:
        hospital.offer_key(EpochOpen(study=keyed[1].hash, epoch=3, leader="site-0", members=NAMES, leaves=()))
    assert caught.value.code == "KEY_EPOCH"


# ---- a server that lies


class Ceremony:
    """Four hospitals with the key of epoch 1, and what is needed to play the server, a leader, or a member."""

    def __init__(self, place) -> None:
        self.folder, self.study = place
        self.homes = dict(zip(NAMES, consortium.homes(*place), strict=True))
        self.private = load_signing_key(self.folder / KEY_FILE)
        for home in self.homes.values():
            joining.allow_rotation(home)

    def own(self, name: str) -> HospitalKeys:
        return HospitalKeys.load(self.homes[name] / "keys")

    def said_by(self, name: str, header: Header) -> Signed:
        return Envelope.seal(header, self.own(name).signing).shown()

    def leave(self, name: str) -> Signed:
        return self.said_by(name, Leave(study=self.study.hash, hospital=name))

    def opened(self, **changes) -> EpochOpen:
        values = {"study": self.study.hash, "epoch": 2, "leader": "site-0", "members": NAMES, "leaves": ()}
        return EpochOpen(**(values | changes))

    def offer(self, epoch: Epoch, leader: str = "site-0", give: dict[str, str] | None = None):
        """A leader's offer, whatever it says; `give` wraps another hospital's key for a member."""
        give, blobs = give or {}, {}
        for name in epoch.members:
            to = give.get(name, name)
            blobs[name] = epochs.wrap(
                epoch, self.study.site(to).wrapping_key, study_hash=self.study.hash, sender=leader, recipient=to
            )
        return self.offered(epoch, leader, blobs), blobs

    def offered(self, epoch: Epoch, leader: str, blobs: dict[str, bytes]) -> Signed:
        payload = b"".join(blobs.values())
        return self.said_by(
            leader,
            KeyOffer(
                study=self.study.hash,
                hospital=leader,
                epoch=epoch.number,
                key_id=epoch.key_id,
                members=epoch.members,
                wrapped=tuple(WrappedHash(hospital=n, sha256=hashlib.sha256(b).hexdigest()) for n, b in blobs.items()),
                payload_bytes=len(payload),
                payload_sha256=hashlib.sha256(payload).hexdigest(),
            ),
        )

    def grant(self, offer: Signed, blob: bytes, **changes) -> tuple[KeyGrant, bytes]:
        values = {
            "study": self.study.hash,
            "recipient": "site-1",
            "offer": offer,
            "leaves": (),
            "payload_bytes": len(blob),
            "payload_sha256": hashlib.sha256(blob).hexdigest(),
        }
        return KeyGrant(**(values | changes)), blob

    def ready(self, name: str, epoch: Epoch, **changes) -> Signed:
        values = {
            "study": self.study.hash,
            "hospital": name,
            "epoch": epoch.number,
            "key_id": epoch.key_id,
            "confirmation": epochs.confirmation(epoch, study_hash=self.study.hash, hospital=name),
        }
        return self.said_by(name, KeyReady(**(values | changes)))

    def start(self, epoch: Epoch, *ready: Signed) -> EpochStart:
        return EpochStart(study=self.study.hash, epoch=epoch.number, key_id=epoch.key_id, ready=ready)

    def refused(self, name: str, call: str, *arguments) -> str:
        """The code with which a hospital refuses; nothing in its home has changed."""
        home = self.homes[name]
        before = snapshot(home)
        with pytest.raises(FedMedGanError) as caught:
            getattr(Hospital(home), call)(*arguments)
        assert snapshot(home) == before
        return caught.value.code


def snapshot(home: Path) -> dict[str, bytes]:
    kept = ("cache", "dicom", "samples")
    paths = [p for p in home.rglob("*") if p.is_file() and p.relative_to(home).parts[0] not in kept]
    return {str(p.relative_to(home)): p.read_bytes() for p in paths if p.name not in ("events.jsonl", ".lock")}


@pytest.fixture
def ceremony(keyed):
    return Ceremony(keyed)


@pytest.fixture
def first(prepared):
    """The same before the first key."""
    return Ceremony(prepared)


OPENINGS: dict[str, tuple[Callable[[Ceremony], EpochOpen], str]] = {
    "a member is missing": (lambda c: c.opened(members=NAMES[:3]), "KEY_EPOCH"),
    "its Leave is of the coordinator": (
        lambda c: c.opened(
            members=NAMES[:3],
            leaves=(Envelope.seal(Leave(study=c.study.hash, hospital="site-3"), c.private).shown(),),
        ),
        "MSG_SIGNATURE",
    ),
    "its Leave is of another hospital": (
        lambda c: c.opened(
            members=NAMES[:3], leaves=(c.said_by("site-1", Leave(study=c.study.hash, hospital="site-3")),)
        ),
        "MSG_SIGNATURE",
    ),
    "its Leave is of another study": (
        lambda c: c.opened(members=NAMES[:3], leaves=(c.said_by("site-3", Leave(study="0" * 64, hospital="site-3")),)),
        "MSG_STUDY",
    ),
    "who has left is a member": (lambda c: c.opened(leaves=(c.leave("site-3"),)), "KEY_EPOCH"),
    "two are left": (
        lambda c: c.opened(members=NAMES[:2], leaves=(c.leave("site-2"), c.leave("site-3"))),
        "KEY_EPOCH",
    ),
    "a member twice": (lambda c: c.opened(members=(*NAMES, "site-3")), "KEY_EPOCH"),
    "members in another order": (lambda c: c.opened(members=NAMES[::-1]), "KEY_EPOCH"),
    "a stranger": (lambda c: c.opened(members=(*NAMES, "stranger")), "KEY_EPOCH"),
    "another leader": (lambda c: c.opened(leader="site-1"), "KEY_EPOCH"),
    "the number in use": (lambda c: c.opened(epoch=1), "KEY_EPOCH"),
}


@pytest.mark.parametrize("name", OPENINGS)
def test_no_hospital_leads_a_ceremony_that_is_not_right(ceremony, name):
    make, code = OPENINGS[name]
    assert ceremony.refused("site-0", "offer_key", make(ceremony)) == code


def test_a_key_that_is_not_due_is_neither_made_nor_taken(keyed):
    playing = Ceremony(keyed)
    offer, blobs = playing.offer(keys.new_epoch(2, NAMES))
    for home in playing.homes.values():
        (home / joining.ROTATION_ALLOWED).unlink()
    assert playing.refused("site-0", "offer_key", playing.opened()) == "KEY_EPOCH"
    assert playing.refused("site-1", "take_key", *playing.grant(offer, blobs["site-1"])) == "KEY_EPOCH"


def test_only_the_coordinator_asks(ceremony):
    envelope = Envelope.seal(ceremony.opened(), ceremony.own("site-1").signing)
    with pytest.raises(FedMedGanError) as caught:
        envelope.open(EpochOpen, ceremony.study)
    assert caught.value.code == "MSG_SIGNATURE"


def test_an_honest_offer_is_taken_and_a_grant_that_comes_again_is_answered_alike(ceremony):
    opened = ceremony.opened()
    envelope = Hospital(ceremony.homes["site-0"]).offer_key(opened)
    offer = envelope.open(KeyOffer, ceremony.study)
    blobs = dict(zip(offer.members, split_parts(envelope.payload), strict=True))
    grant = ceremony.grant(envelope.shown(), blobs["site-1"])
    answers = [Hospital(ceremony.homes["site-1"]).take_key(*grant) for _ in range(2)]
    assert answers[0] == answers[1]
    assert ceremony.own("site-1").next_epoch.key_id == offer.key_id
    assert ceremony.own("site-1").epoch.number == 1, "not in use before it is confirmed"
    assert ceremony.own("site-0").next_epoch is None, "the leader takes it like the others"


def wrong_grant(c: Ceremony, name: str) -> tuple[KeyGrant, bytes]:
    epoch = keys.new_epoch(2, NAMES)
    offer, blobs = c.offer(epoch)
    own = blobs["site-1"]
    if name == "another hospital's key":
        return c.grant(offer, blobs["site-2"])
    if name == "a grant for another hospital":
        return c.grant(offer, blobs["site-2"], recipient="site-2")
    if name == "cut":
        return c.grant(offer, own[:-1])
    if name == "empty":
        return c.grant(offer, b"")
    if name == "the leader wrapped another hospital's":
        return c.grant(*(lambda o, b: (o, b["site-1"]))(*c.offer(epoch, give={"site-1": "site-2"})))
    if name == "the leader names another key":
        other = keys.new_epoch(2, NAMES)
        return c.grant(c.offered(other, "site-0", blobs), own)
    if name == "changed by the server":
        changed = Signed(header=offer.header.replace(epoch.key_id, "0" * 32), signature=offer.signature)
        return c.grant(changed, own)
    if name == "signed by another hospital":
        header = open_shown(KeyOffer, offer, c.study)
        return c.grant(c.said_by("site-2", header), own)
    if name == "a member is missing":
        fewer, given = c.offer(keys.new_epoch(2, NAMES[:3]))
        return c.grant(fewer, given["site-1"])
    if name == "a leader that has left":
        three = keys.new_epoch(2, NAMES[1:])
        given = {
            n: epochs.wrap(three, c.study.site(n).wrapping_key, study_hash=c.study.hash, sender="site-1", recipient=n)
            for n in NAMES[1:]
        }
        return c.grant(c.offered(three, "site-0", given), given["site-1"], leaves=(c.leave("site-0"),))
    if name == "the number in use":
        return c.grant(*(lambda o, b: (o, b["site-1"]))(*c.offer(keys.new_epoch(1, NAMES))))
    raise LookupError(name)


GRANTS = {
    "another hospital's key": "KEY_UNWRAP",
    "a grant for another hospital": "KEY_EPOCH",
    "cut": "KEY_UNWRAP",
    "empty": "KEY_UNWRAP",
    "the leader wrapped another hospital's": "KEY_UNWRAP",
    "the leader names another key": "KEY_UNWRAP",
    "changed by the server": "MSG_SIGNATURE",
    "signed by another hospital": "MSG_SIGNATURE",
    "a member is missing": "KEY_EPOCH",
    "a leader that has left": "KEY_EPOCH",
    "the number in use": "KEY_EPOCH",
}


@pytest.mark.parametrize("name", GRANTS)
def test_no_hospital_takes_a_key_that_is_not_right(ceremony, name):
    assert ceremony.refused("site-1", "take_key", *wrong_grant(ceremony, name)) == GRANTS[name]


def took(c: Ceremony, number: int = 2) -> Epoch:
    """An epoch that site-1 has taken."""
    epoch = keys.new_epoch(number, NAMES)
    offer, blobs = c.offer(epoch)
    Hospital(c.homes["site-1"]).take_key(*c.grant(offer, blobs["site-1"]))
    return epoch


def wrong_start(c: Ceremony, name: str) -> EpochStart:
    epoch = took(c)
    good = {n: c.ready(n, epoch) for n in NAMES}
    if name == "too few":
        return c.start(epoch, good["site-1"], good["site-2"])
    if name == "one of them three times":
        return c.start(epoch, good["site-1"], good["site-2"], good["site-2"], good["site-2"])
    if name == "not by itself":
        return c.start(epoch, good["site-0"], good["site-2"], good["site-3"])
    if name == "one is forged":
        return c.start(epoch, *list(good.values())[:3], c.ready("site-3", epoch, confirmation="0" * 64))
    if name == "one's own sent back in another's name":
        mine = open_shown(KeyReady, good["site-1"], c.study)
        return c.start(epoch, *list(good.values())[:3], c.ready("site-3", epoch, confirmation=mine.confirmation))
    if name == "one is of the epoch before":
        return c.start(epoch, *list(good.values())[:3], c.ready("site-3", c.own("site-3").epoch))
    if name == "one has another key of that number":
        return c.start(epoch, *list(good.values())[:3], c.ready("site-3", keys.new_epoch(2, NAMES)))
    if name == "signed by the server":
        header = open_shown(KeyReady, good["site-3"], c.study)
        return c.start(epoch, *list(good.values())[:3], Envelope.seal(header, c.private).shown())
    if name == "a key that it was not given":
        other = keys.new_epoch(2, NAMES)
        return c.start(other, *(c.ready(n, other) for n in NAMES))
    raise LookupError(name)


STARTS = {
    "too few": "KEY_CONFIRM",
    "one of them three times": "KEY_CONFIRM",
    "not by itself": "KEY_CONFIRM",
    "one is forged": "KEY_CONFIRM",
    "one's own sent back in another's name": "KEY_CONFIRM",
    "one is of the epoch before": "KEY_CONFIRM",
    "one has another key of that number": "KEY_CONFIRM",
    "signed by the server": "MSG_SIGNATURE",
    "a key that it was not given": "KEY_EPOCH",
}


@pytest.mark.parametrize("name", STARTS)
def test_no_hospital_starts_to_use_a_key_that_is_not_confirmed(ceremony, name):
    started = wrong_start(ceremony, name)
    assert ceremony.refused("site-1", "start_key", started) == STARTS[name]


def test_three_confirmations_start_a_later_key_and_the_start_that_comes_again_is_answered_alike(ceremony):
    epoch = took(ceremony)
    started = ceremony.start(epoch, *(ceremony.ready(n, epoch) for n in NAMES[:3]))
    answers = [Hospital(ceremony.homes["site-1"]).start_key(started) for _ in range(2)]
    assert answers[0] == answers[1]
    assert ceremony.own("site-1").epoch.key_id == epoch.key_id
    assert not (ceremony.homes["site-1"] / joining.ROTATION_ALLOWED).exists(), "the permission is used up"


def test_the_first_key_starts_with_all_confirmations_and_no_fewer(first):
    epoch = took(first, 1)
    ready = [first.ready(name, epoch) for name in NAMES]
    assert first.refused("site-1", "start_key", first.start(epoch, *ready[:3])) == "KEY_CONFIRM"
    Hospital(first.homes["site-1"]).start_key(first.start(epoch, *ready))
    assert first.own("site-1").epoch.number == 1


def test_who_has_left_takes_no_part_for_good(ceremony):
    epoch = keys.new_epoch(2, NAMES)
    offer, blobs = ceremony.offer(epoch)
    joining.leave(ceremony.homes["site-1"])
    assert ceremony.refused("site-1", "take_key", *ceremony.grant(offer, blobs["site-1"])) == "RUN_LEFT"
    assert ceremony.refused("site-1", "offer_key", ceremony.opened(leader="site-1")) == "RUN_LEFT"
    opened = RoundOpen(
        study=ceremony.study.hash, round=1, attempt=1, cohort=NAMES, epoch=1, key_id=ceremony.own("site-1").key_id
    )
    assert ceremony.refused("site-1", "local_update", opened) == "RUN_LEFT"
