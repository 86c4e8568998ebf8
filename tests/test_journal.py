"""The coordinator's journal: whatever kills it, reopening finds an update or a certificate whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fedmedgan.server.journal import EpochRow, Journal
from fedmedgan.shared import crash
from fedmedgan.shared.errors import FedMedGanError, MessageError, ModelError, RunError
from fedmedgan.shared.messages import Certificate, Envelope, Leave, RoundOpen, Signed, Update, parse

STUDY = "5" * 64
SITES = ("ham", "nih", "rig")
KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)


def attempt(round: int = 1, attempt: int = 1, cohort: tuple[str, ...] = SITES) -> RoundOpen:
    return RoundOpen(study=STUDY, round=round, attempt=attempt, cohort=cohort, epoch=1, key_id="ab" * 16)


def update(opened: RoundOpen, hospital: str, payload: bytes = b"", seq: int | None = None) -> tuple[Envelope, Update]:
    payload = payload or f"ciphertext of {hospital} in round {opened.round}".encode() * 50
    header = Update(
        **opened.model_dump(),
        hospital=hospital,
        weight=1,
        model_hash="6" * 64,
        payload_bytes=len(payload),
        payload_sha256=hashlib.sha256(payload).hexdigest(),
        ledger_seq=opened.round if seq is None else seq,
        ledger_head="7" * 64,
        generator_loss=0.5,
    )
    return Envelope.seal(header, KEY, payload), header


def certificate(opened: RoundOpen) -> tuple[Certificate, bytes]:
    payload = f"sum of round {opened.round}".encode() * 100
    updates = tuple(update(opened, name)[0].shown() for name in opened.cohort)
    digest = hashlib.sha256(payload).hexdigest()
    header = Certificate(**opened.model_dump(), updates=updates, payload_bytes=len(payload), payload_sha256=digest)
    return header, payload


def signed(word: str) -> Signed:
    return Signed(header=word, signature="a" * 128)


def one_round(journal: Journal, number: int = 1, done=lambda *step: None) -> None:
    """A whole round; `done` hears of each step that the journal has acknowledged."""
    opened = attempt(number)
    journal.open_attempt(opened)
    done("opened", number)
    for name in SITES:
        journal.accept(opened, *update(opened, name))
        done("accepted", number, name)
    journal.certify(*certificate(opened))
    done("certified", number)


def one_epoch(journal: Journal) -> None:
    journal.store_offer(1, "ham", signed("offer"), {name: name.encode() * 1000 for name in SITES})
    for name in SITES:
        journal.note_ready(1, name, signed(f"ready {name}"))
    journal.request_rotation()
    journal.seal_epoch(1, "ab" * 16, SITES, 1)


def held(journal: Journal, opened: RoundOpen) -> list[str]:
    return [parse(envelope.header, Update).hospital for envelope in journal.accepted(opened)]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def code(caught) -> str:
    return caught.value.code


@pytest.fixture
def journal(tmp_path):
    with Journal(tmp_path, STUDY) as journal:
        yield journal


def test_a_round_is_remembered(tmp_path):
    opened = attempt()
    with Journal(tmp_path, STUDY) as journal:
        assert (journal.attempt_under_way(), journal.last_round(), journal.certificate(1)) == (None, 0, None)
        journal.open_attempt(opened)
        for name in reversed(SITES):
            journal.accept(opened, *update(opened, name))
    with Journal(tmp_path, STUDY) as journal:
        assert journal.attempt_under_way() == opened
        assert list(journal.accepted(opened)) == [update(opened, name)[0] for name in SITES]
        journal.certify(*certificate(opened))
    with Journal(tmp_path, STUDY) as journal:
        assert (journal.attempt_under_way(), journal.last_round()) == (None, 1)
        assert journal.certificate(1) == certificate(opened)


def test_ciphertexts_of_a_hospital_go_with_the_certificate_and_its_word_stays(journal, tmp_path):
    one_round(journal)
    assert names(tmp_path / "updates") == []
    assert names(tmp_path / "sums") == ["round-0001.bin"]
    assert list(journal.accepted(attempt())) == []
    assert journal.anchors() == tuple(update(attempt(), name)[0].shown() for name in SITES)


def test_a_further_attempt_deletes_the_updates_of_the_one_before(journal, tmp_path):
    first, second = attempt(cohort=("a-1", *SITES)), attempt(attempt=2)
    journal.open_attempt(first)
    journal.accept(first, *update(first, "ham"))
    journal.open_attempt(second)
    assert journal.attempt_under_way() == second
    assert names(tmp_path / "updates") == []
    journal.accept(first, *update(first, "ham"))  # again, and late: nothing
    with pytest.raises(MessageError) as caught:
        journal.accept(first, *update(first, "nih"))
    assert code(caught) == "MSG_ROUND"
    assert names(tmp_path / "updates") == []


def test_everything_may_be_said_twice(journal, tmp_path):
    for _ in range(2):
        one_round(journal)
        one_epoch(journal)
        journal.note_applied(1, "ham", "8" * 64)
        journal.note_leave("rig", signed("leave"))
    assert names(tmp_path / "updates") == []
    assert len(journal.anchors()) == len(journal.readies(1)) == 3
    assert len(journal.epochs()) == 1


def test_two_updates_for_one_attempt_are_equivocation(journal):
    opened = attempt()
    journal.open_attempt(opened)
    journal.accept(opened, *update(opened, "ham"))
    with pytest.raises(MessageError) as caught:
        journal.accept(opened, *update(opened, "ham", b"other bytes"))
    assert code(caught) == "MSG_EQUIVOCATION"
    assert list(journal.accepted(opened)) == [update(opened, "ham")[0]]
    one_round(journal)
    with pytest.raises(MessageError) as caught:  # the certificate does not make it forget
        journal.accept(opened, *update(opened, "ham", b"other bytes"))
    assert code(caught) == "MSG_EQUIVOCATION"


def test_an_update_of_another_attempt_is_refused(journal):
    journal.open_attempt(attempt())
    for opened, of in ((attempt(round=2), attempt(round=2)), (attempt(), attempt(attempt=2))):
        with pytest.raises(MessageError) as caught:
            journal.accept(opened, *update(of, "ham"))
        assert code(caught) == "MSG_ROUND"
    one_round(journal)
    with pytest.raises(MessageError) as caught:
        journal.accept(attempt(), *update(attempt(), "late"))
    assert code(caught) == "MSG_ROUND"


@pytest.mark.parametrize(
    "again",
    [
        attempt(cohort=("ham", "nih", "other")),  # another cohort under the same number
        attempt(attempt=1),  # an earlier attempt
        attempt(round=1, attempt=9),  # a round that has its certificate
    ],
)
def test_attempts_only_go_forward(journal, again):
    if again.attempt == 9:
        one_round(journal)
    else:
        journal.open_attempt(attempt())
        if again == attempt():
            journal.open_attempt(again)  # the same words: nothing
            journal.open_attempt(attempt(attempt=2))
            again = attempt(attempt=1, cohort=("ham", "nih"))
    with pytest.raises(RunError) as caught:
        journal.open_attempt(again)
    assert code(caught) == "RUN_JOURNAL"


def test_a_round_has_one_certificate(journal, tmp_path):
    one_round(journal)
    header, payload = certificate(attempt())
    for other in (header.model_copy(update={"updates": ()}), certificate(attempt(round=2))[0]):
        with pytest.raises(RunError) as caught:
            journal.certify(other, b"another sum")
        assert code(caught) == "RUN_JOURNAL"
    assert journal.certificate(1) == (header, payload)


# ---- damage


@pytest.mark.parametrize("damage", ["flip", "cut", "longer", "gone"])
def test_a_damaged_update_counts_as_not_accepted(tmp_path, damage):
    opened = attempt()
    with Journal(tmp_path, STUDY) as journal:
        journal.open_attempt(opened)
        for name in SITES:
            journal.accept(opened, *update(opened, name))
        spoil(next((tmp_path / "updates").glob("*nih*")), damage)
        assert held(journal, opened) == ["ham", "rig"]
        assert not list((tmp_path / "updates").glob("*nih*"))
    with Journal(tmp_path, STUDY) as journal:
        assert held(journal, opened) == ["ham", "rig"]
        with pytest.raises(MessageError):  # its word is remembered, though
            journal.accept(opened, *update(opened, "nih", b"other bytes"))
        journal.accept(opened, *update(opened, "nih"))
        assert held(journal, opened) == list(SITES)


def test_an_update_that_cannot_be_added_is_dropped(journal, tmp_path):
    opened = attempt()
    journal.open_attempt(opened)
    for name in SITES:
        journal.accept(opened, *update(opened, name))
    journal.drop(opened, "ham")
    assert held(journal, opened) == ["nih", "rig"]
    assert len(names(tmp_path / "updates")) == 2


@pytest.mark.parametrize("damage", ["flip", "cut", "longer", "gone"])
def test_a_damaged_sum_stops_the_run(journal, tmp_path, damage):
    one_round(journal)
    spoil(tmp_path / "sums" / "round-0001.bin", damage)
    with pytest.raises(RunError) as caught:
        journal.certificate(1)
    assert code(caught) == "RUN_JOURNAL"


def spoil(path: Path, damage: str) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    if damage != "gone":
        path.write_bytes({"flip": data, "cut": data[:-1], "longer": data + b"x"}[damage])


@pytest.mark.parametrize("content", [b"not a database, but long enough to have a header" * 99, b"\0" * 5000])
def test_a_file_that_is_no_journal_is_refused(tmp_path, content):
    (tmp_path / "journal.db").write_bytes(content)
    with pytest.raises(RunError) as caught:
        Journal(tmp_path, STUDY)
    assert code(caught) == "RUN_JOURNAL"
    assert (tmp_path / "journal.db").read_bytes() == content


def test_a_damaged_database_is_refused(tmp_path):
    with Journal(tmp_path, STUDY) as journal:
        for number in range(1, 20):
            one_round(journal, number)
    path = tmp_path / "journal.db"
    data = bytearray(path.read_bytes())
    data[4096 : len(data) - 4096] = b"\xa5" * (len(data) - 8192)
    path.write_bytes(data)
    with pytest.raises(RunError) as caught:
        Journal(tmp_path, STUDY)
    assert code(caught) == "RUN_JOURNAL"


def test_an_altered_header_is_refused(tmp_path):
    with Journal(tmp_path, STUDY) as journal:
        one_round(journal)
        journal.open_attempt(attempt(round=2))
    with sqlite3.connect(tmp_path / "journal.db") as db:
        db.execute("UPDATE attempts SET header = replace(header, 'cohort', 'kohort')")
        db.execute("UPDATE certificates SET header = header || ' '")
    db.close()
    with Journal(tmp_path, STUDY) as journal:
        for read in (journal.attempt_under_way, lambda: journal.certificate(1)):
            with pytest.raises(RunError) as caught:
                read()
            assert code(caught) == "RUN_JOURNAL"


@pytest.mark.parametrize("statement", ["PRAGMA user_version = 2", "PRAGMA user_version = 0", "DELETE FROM meta"])
def test_another_version_is_refused(tmp_path, statement):
    Journal(tmp_path, STUDY).close()
    db = sqlite3.connect(tmp_path / "journal.db")
    db.execute(statement)
    db.commit()
    db.close()
    with pytest.raises(RunError) as caught:
        Journal(tmp_path, STUDY)
    assert code(caught) == "RUN_JOURNAL"


def test_another_study_is_refused(tmp_path):
    Journal(tmp_path, STUDY).close()
    with pytest.raises(RunError) as caught:
        Journal(tmp_path, "4" * 64)
    assert code(caught) == "RUN_JOURNAL"
    Journal(tmp_path, STUDY).close()


def test_rounds_without_their_journal_are_refused(tmp_path):
    with Journal(tmp_path, STUDY) as journal:
        one_round(journal)
    for path in tmp_path.glob("journal.*"):
        path.unlink()
    with pytest.raises(RunError) as caught:
        Journal(tmp_path, STUDY)
    assert code(caught) == "RUN_JOURNAL"
    assert names(tmp_path / "sums") == ["round-0001.bin"]


def test_one_coordinator_at_a_time(tmp_path):
    with Journal(tmp_path, STUDY):
        with pytest.raises(RunError) as caught:
            Journal(tmp_path, STUDY)
        assert "another coordinator" in caught.value.what
    Journal(tmp_path, STUDY).close()


def test_a_closed_journal_says_so(tmp_path):
    journal = Journal(tmp_path, STUDY)
    journal.close()
    journal.close()
    with pytest.raises(RunError) as caught:
        journal.last_round()
    assert code(caught) == "RUN_JOURNAL"


@pytest.mark.parametrize("call", ["fsync", "open"])
def test_a_full_disk_is_one_of_our_errors_and_nothing_is_half_there(tmp_path, monkeypatch, call):
    opened = attempt()
    with Journal(tmp_path, STUDY) as journal:
        journal.open_attempt(opened)
        journal.accept(opened, *update(opened, "ham"))

        def full(*_: object, **__: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device", "/secret/place")

        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            with pytest.raises(RunError) as caught:
                journal.accept(opened, *update(opened, "nih"))
        assert code(caught) == "RUN_JOURNAL"
        assert "No space" in caught.value.what
        assert "/secret" not in str(caught.value)
        assert held(journal, opened) == ["ham"]
    with Journal(tmp_path, STUDY) as journal:
        assert held(journal, opened) == ["ham"]
        assert len(names(tmp_path / "updates")) == 1
        journal.accept(opened, *update(opened, "nih"))


def test_files_are_private(journal, tmp_path):
    journal.open_attempt(attempt())
    journal.accept(attempt(), *update(attempt(), "ham"))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 4
    assert {path.stat().st_mode & 0o077 for path in files} == {0}


# ---- order on the disk


def test_a_file_is_on_the_disk_before_its_row(journal, monkeypatch):
    """Names of what is synced, and of the places that are passed, in their order."""
    passed: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        passed.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(crash, "point", passed.append)
    opened = attempt()
    journal.open_attempt(opened)
    passed.clear()
    journal.accept(opened, *update(opened, "ham"))
    assert passed == ["r0001-a01-ham.bin.tmp", "updates", "server.update-file", "server.update-row"]
    passed.clear()
    journal.certify(*certificate(opened))
    assert passed == [
        "round-0001.bin.tmp",
        "sums",
        "server.certificate-file",
        "server.certificate-row",
        "updates",
    ]
    # SQLite syncs by itself; 2 is FULL (sqlite.org/pragma.html#pragma_synchronous)
    assert journal._db.value("PRAGMA synchronous") == 2
    assert journal._db.value("PRAGMA journal_mode") == "wal"
    assert journal._db.value("PRAGMA foreign_keys") == 1


# ---- models, anchors, key epochs


def test_hospitals_hold_one_model(journal):
    assert journal.model_hash(1) == ""
    journal.note_applied(1, "ham", "8" * 64)
    journal.note_applied(1, "ham", "9" * 64)  # it was alone, and may correct itself
    journal.note_applied(1, "nih", "9" * 64)
    with pytest.raises(ModelError) as caught:
        journal.note_applied(1, "rig", "8" * 64)
    assert code(caught) == "MODEL_DIVERGED"
    journal.note_applied(2, "rig", "8" * 64)
    assert (journal.model_hash(1), journal.model_hash(2)) == ("9" * 64, "8" * 64)


def test_anchors_are_the_longest_ledgers_not_the_latest_updates(journal):
    first, second = attempt(), attempt(round=2)
    words = {}
    for opened, sequence in ((first, {"ham": 5, "nih": 2}), (second, {"ham": 3, "nih": 4})):
        journal.open_attempt(opened)
        for name, seq in sequence.items():
            envelope, header = update(opened, name, seq=seq)
            journal.accept(opened, envelope, header)
            words[name, seq] = envelope.shown()
    assert journal.anchors() == (words["ham", 5], words["nih", 4])


def test_a_key_epoch(tmp_path):
    blobs = {name: name.encode() * 1000 for name in SITES}
    with Journal(tmp_path, STUDY) as journal:
        assert (journal.newest_number(), journal.current_epoch(), journal.epochs()) == (0, None, [])
        assert (journal.offer(1), journal.blob(1, "ham"), journal.readies(1)) == (None, None, {})
        journal.store_offer(1, "ham", signed("offer"), blobs)
        journal.note_ready(1, "nih", signed("ready"))
        journal.request_rotation()
    with Journal(tmp_path, STUDY) as journal:
        assert journal.newest_number() == 1
        assert journal.offer(1) == signed("offer")
        assert {name: journal.blob(1, name) for name in SITES} == blobs
        assert journal.readies(1) == {"nih": signed("ready")}
        assert journal.rotation_requested()
        journal.seal_epoch(1, "ab" * 16, SITES, 1)
        assert not journal.rotation_requested()
        journal.seal_epoch(3, "cd" * 16, SITES[:2], 8)
        assert journal.current_epoch() == EpochRow(3, "cd" * 16, SITES[:2], 8)
        assert [epoch.number for epoch in journal.epochs()] == [1, 3]
        assert journal.newest_number() == 3


def test_wrapped_keys_leave_the_disk_with_the_sealed_epoch(journal, tmp_path):
    marker = os.urandom(64)

    def on_disk() -> list[str]:
        return [path.name for path in tmp_path.glob("journal.db*") if marker in path.read_bytes()]

    journal.store_offer(1, "ham", signed("offer"), {"ham": marker * 1000})
    journal.note_ready(1, "ham", signed("ready"))
    assert on_disk()
    journal.seal_epoch(1, "ab" * 16, SITES, 1)
    assert journal.blob(1, "ham") is None
    assert on_disk() == []


def test_a_wrapped_key_waits_for_a_member_that_is_away(journal):
    journal.store_offer(1, "ham", signed("nobody confirms"), dict.fromkeys(SITES, b"old"))
    journal.store_offer(2, "ham", signed("offer"), dict.fromkeys(SITES, b"new"))
    journal.note_ready(2, "ham", signed("ready ham"))
    assert journal.blob(2, "ham") == b"new"
    journal.seal_epoch(2, "ab" * 16, SITES, 1)
    assert [journal.blob(1, name) for name in SITES] == [None] * 3
    assert [journal.blob(2, name) for name in SITES] == [None, b"new", b"new"]
    journal.note_ready(2, "nih", signed("ready nih"))
    assert journal.blob(2, "nih") is None
    journal.note_leave("rig", signed("leave"))
    assert journal.blob(2, "rig") is None


def test_a_sum_that_nobody_could_use_is_made_again_under_a_later_key(journal):
    one_round(journal)
    again = attempt(attempt=2).model_copy(update={"epoch": 2})
    journal.open_attempt(again)
    assert (journal.last_round(), journal.certificate(1), journal.attempt_under_way()) == (0, None, again)
    journal.certify(*certificate(again))
    assert journal.certificate(1) == certificate(again)


def test_a_sum_that_somebody_applied_is_final(journal):
    one_round(journal)
    journal.note_applied(1, "ham", "8" * 64)
    with pytest.raises(RunError) as caught:
        journal.open_attempt(attempt(attempt=2).model_copy(update={"epoch": 2}))
    assert code(caught) == "RUN_JOURNAL"


def test_two_offers_or_confirmations_of_one_epoch_are_equivocation(journal):
    journal.store_offer(1, "ham", signed("offer"), {"ham": b"1"})
    journal.note_ready(1, "ham", signed("ready"))
    for call in (
        lambda: journal.store_offer(1, "ham", signed("another"), {"ham": b"2"}),
        lambda: journal.note_ready(1, "ham", signed("another")),
    ):
        with pytest.raises(MessageError) as caught:
            call()
        assert code(caught) == "MSG_EQUIVOCATION"
    assert (journal.offer(1), journal.blob(1, "ham")) == (signed("offer"), b"1")
    with pytest.raises(RunError):  # a confirmation of what nobody offered
        journal.note_ready(2, "ham", signed("ready"))


def test_epochs_only_go_forward(journal):
    journal.seal_epoch(2, "ab" * 16, SITES, 4)
    for number, key in ((2, "cd" * 16), (1, "ab" * 16)):
        with pytest.raises(RunError) as caught:
            journal.seal_epoch(number, key, SITES, 4)
        assert code(caught) == "RUN_JOURNAL"
    assert journal.current_epoch() == EpochRow(2, "ab" * 16, SITES, 4)


def test_the_first_word_of_leaving_stays(journal):
    leave = Envelope.seal(Leave(study=STUDY, hospital="ham"), KEY).shown()
    journal.note_leave("ham", leave)
    journal.note_leave("ham", signed("again"))
    assert journal.leaves() == {"ham": leave}


# ---- death of the process


def child(folder: Path, call: str, **environment: str) -> subprocess.Popen[str]:
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_journal as t
from pathlib import Path
journal = t.Journal(Path(sys.argv[1]), t.STUDY)
{call}
"""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", program, str(folder)],
        stdout=subprocess.PIPE,
        env={**os.environ, "FLWR_TELEMETRY_ENABLED": "0", **environment},
        text=True,
    )


SWEEP = {
    # place: (update files left behind, accepted after reopening, has a certificate)
    "server.update-file": (1, [], False),
    "server.update-row": (1, ["ham"], False),
    "server.certificate-file": (3, list(SITES), False),
    "server.certificate-row": (3, [], True),
}
SWEEP_KEYS = ("server.offer-stored", "server.epoch-sealed")


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> dict[str, Path]:
    """place -> folder of a journal whose process died there. They die at the same time: starting takes a second."""
    folders = {place: tmp_path_factory.mktemp("killed") for place in (*SWEEP, *SWEEP_KEYS)}
    children = {
        place: child(folder, "t.one_round(journal); t.one_epoch(journal)", FEDMEDGAN_CRASH_AT=place)
        for place, folder in folders.items()
    }
    for process in children.values():
        with process:
            assert process.wait(60) == crash.EXIT_CODE
    return folders


@pytest.mark.parametrize("place", SWEEP)
def test_killed_in_a_round(killed, place):
    folder = killed[place]
    left, accepted, certified = SWEEP[place]
    assert len(names(folder / "updates")) == left
    with Journal(folder, STUDY) as journal:
        assert held(journal, attempt()) == accepted
        assert len(names(folder / "updates")) == len(accepted)
        assert (journal.certificate(1) is not None, journal.last_round()) == (certified, int(certified))
        assert (journal.attempt_under_way() is None) == certified
        one_round(journal)  # goes on
        assert journal.certificate(1) == certificate(attempt())
        assert names(folder / "updates") == []


@pytest.mark.parametrize("place", SWEEP_KEYS)
def test_killed_in_a_key_epoch(killed, place):
    sealed = place == "server.epoch-sealed"
    with Journal(killed[place], STUDY) as journal:
        assert journal.offer(1) == signed("offer")
        assert [journal.blob(1, name) is None for name in SITES] == [sealed] * 3
        assert journal.current_epoch() == (EpochRow(1, "ab" * 16, SITES, 1) if sealed else None)
        assert not journal.rotation_requested()
        one_epoch(journal)
        assert journal.current_epoch() == EpochRow(1, "ab" * 16, SITES, 1)


def test_all_crash_points_of_the_journal_are_swept():
    source = Path(__file__).parents[1] / "server" / "journal.py"
    swept = {*SWEEP, *SWEEP_KEYS}
    assert {name for name in crash.CRASH_POINTS if f'crash.point("{name}")' in source.read_text()} == swept


def test_killed_at_any_moment_nothing_acknowledged_is_lost(tmp_path):
    call = """
number = 1 + journal.last_round()
while True:
    t.one_round(journal, number, lambda *step: print(*step, flush=True))
    number += 1
"""
    chance = random.Random(1)
    for _ in range(3):
        with child(tmp_path, call) as process:
            steps = [process.stdout.readline().split() for _ in range(chance.randint(1, 25))]
            process.send_signal(signal.SIGKILL)
            steps += [line.split() for line in process.stdout]
        kind, number, *hospital = steps[-1]
        opened = attempt(int(number))
        with Journal(tmp_path, STUDY) as journal:
            for certified in range(1, journal.last_round() + 1):
                assert journal.certificate(certified) == certificate(attempt(certified))
            if kind == "certified" or journal.last_round() == opened.round:
                assert journal.last_round() == opened.round
                assert journal.attempt_under_way() in (None, attempt(opened.round + 1))
            else:
                assert journal.attempt_under_way() == opened
                assert set(hospital) <= set(held(journal, opened))
            under_way = journal.attempt_under_way()
            assert len(names(tmp_path / "updates")) == (len(held(journal, under_way)) if under_way else 0)


# ---- against a slow and obvious one


class AgainstDictionaries(RuleBasedStateMachine):
    """The journal does what two dictionaries would do, over any order of calls, damage and restarts."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(prefix="journal")
        self.path = Path(self.folder.name)
        self.journal = Journal(self.path, STUDY)
        self.opened: RoundOpen | None = None
        self.held: dict[str, bytes] = {}
        self.sent: dict[str, bytes] = {}
        self.certificates: dict[int, tuple[Certificate, bytes]] = {}

    def teardown(self) -> None:
        self.journal.close()
        self.folder.cleanup()

    @rule(further=st.booleans())
    def open_attempt(self, further: bool) -> None:
        if self.opened and self.opened.round not in self.certificates:
            self.opened = attempt(self.opened.round, self.opened.attempt + further)
        else:
            further, self.opened = True, attempt(len(self.certificates) + 1)
        self.journal.open_attempt(self.opened)
        if further:
            self.held, self.sent = {}, {}

    @precondition(lambda self: self.opened)
    @rule(hospital=st.sampled_from(SITES), payload=st.sampled_from([b"one", b"two"]))
    def accept(self, hospital: str, payload: bytes) -> None:
        over = self.opened.round in self.certificates
        expected = ""
        if self.sent.get(hospital, payload) != payload:
            expected = "MSG_EQUIVOCATION"
        elif over and hospital not in self.sent:
            expected = "MSG_ROUND"
        elif not over:
            self.held[hospital] = self.sent[hospital] = payload
        try:
            self.journal.accept(self.opened, *update(self.opened, hospital, payload))
            assert expected == ""
        except FedMedGanError as error:
            assert error.code == expected

    @precondition(lambda self: self.opened)
    @rule()
    def certify(self) -> None:
        self.journal.certify(*certificate(self.opened))
        self.certificates[self.opened.round], self.held = certificate(self.opened), {}

    @precondition(lambda self: self.held)
    @rule(choice=st.integers(0, 2), damage=st.sampled_from(["flip", "cut", "gone"]))
    def damage(self, choice: int, damage: str) -> None:
        hospital = sorted(self.held)[choice % len(self.held)]
        spoil(next((self.path / "updates").glob(f"*-{hospital}.bin")), damage)
        del self.held[hospital]

    @rule()
    def restart(self) -> None:
        self.journal.close()
        self.journal = Journal(self.path, STUDY)

    @invariant()
    def agree(self) -> None:
        assert self.journal.last_round() == len(self.certificates)
        assert {n: self.journal.certificate(n) for n in self.certificates} == self.certificates
        over = self.opened is None or self.opened.round in self.certificates
        assert self.journal.attempt_under_way() == (None if over else self.opened)
        if self.opened:
            held = {parse(e.header, Update).hospital: e.payload for e in self.journal.accepted(self.opened)}
            assert held == self.held
        assert len(names(self.path / "updates")) == len(self.held)


AgainstDictionaries.TestCase.settings = settings(
    max_examples=15, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
)
TestAgainstDictionaries = AgainstDictionaries.TestCase
