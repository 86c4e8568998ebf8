"""The budget book: the same patients have one budget, in however many ledgers they are."""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from ledgers import PROOF, SIGNING, terms

from fedmedgan.client import budget_book
from fedmedgan.client.budget_book import BudgetBook, Entry
from fedmedgan.shared.errors import FedMedGanError, PrivacyError
from fedmedgan.shared.privacy.accounting import epsilon_pld
from fedmedgan.shared.privacy.budget import Budget
from fedmedgan.shared.privacy.data_owner import sign_override
from fedmedgan.shared.privacy.events import TrainingSteps, merge
from fedmedgan.shared.privacy.history import read
from fedmedgan.shared.privacy.ledger import Ledger
from fedmedgan.shared.secure_sum import key_file

STUDY, DELTA = "a" * 64, 1e-4
OWNER = Ed25519PrivateKey.from_private_bytes(b"\x0a" * 32)
OWNER_KEY = OWNER.public_key().public_bytes_raw().hex()
ROUND = TrainingSteps(1.1, 0.05, 30)


def people(*numbers: int) -> list[str]:
    """Pseudonyms of patients that have these numbers."""
    return [hashlib.sha256(str(number).encode()).hexdigest()[:32] for number in numbers]


def refused(code: str, act, *args, **options) -> FedMedGanError:
    with pytest.raises(FedMedGanError) as caught:
        act(*args, **options)
    assert caught.value.code == code, caught.value
    return caught.value


class Home:
    """One home of the hospital, as far as the book is concerned."""

    def __init__(self, book: BudgetBook, folder: Path, hospital: str = "clinic-a") -> None:
        self.book, self.folder, self.path, self.hospital = book, folder, folder / "ledger.jsonl", hospital
        folder.mkdir(parents=True, exist_ok=True)
        self.id = self.write(lambda ledger: ledger.history.ledger_id)

    def write(self, act):
        with Ledger(self.path, self.hospital, signing=SIGNING, book=self.book.id) as ledger:
            return act(ledger)

    def enter(self, patients: Iterable[str], owner_key: str = OWNER_KEY) -> Entry:
        def act(ledger: Ledger) -> Entry:
            entry = self.book.enter(ledger.history, self.path, patients, owner_key=owner_key)
            ledger.open_study(STUDY, terms())
            self.book.saw(ledger.history)
            return entry

        return self.write(act)

    def train(self, *events: TrainingSteps, settle: bool = True) -> None:
        def act(ledger: Ledger) -> None:
            seq = ledger.reserve(STUDY, 1, events)
            if settle:
                ledger.charge(seq, *(event.steps for event in events), **PROOF)
            self.book.saw(ledger.history)

        self.write(act)

    def permit(self, *others: str, private: Ed25519PrivateKey = OWNER, **changes) -> None:
        about = {"book_id": self.book.id, "ledger_id": self.id, "others": others, "reason": "IRB 12/26"}
        fields = sign_override(private, **{**about, **changes})
        self.write(lambda ledger: ledger.override(**fields))


@pytest.fixture
def book(tmp_path) -> BudgetBook:
    return BudgetBook.open(tmp_path / "book", create=True)


@pytest.fixture
def homes(book, tmp_path):
    """Makes homes of one hospital: `homes("lung")`."""
    return lambda name, hospital="clinic-a": Home(book, tmp_path / name, hospital)


def content(book: BudgetBook) -> dict[str, bytes]:
    return {str(p.relative_to(book.folder)): p.read_bytes() for p in sorted(book.folder.rglob("*")) if p.is_file()}


# ---- the mistake that the book is for


def test_a_second_ledger_on_the_same_patients_is_refused(book, homes):
    first, second = homes("lung"), homes("heart")
    first.enter(people(1, 2, 3))
    before = content(book)
    error = refused("LEDGER_SAME_PATIENTS", second.enter, people(1, 2, 3))
    assert first.id[:12] in error.what
    assert "fedmedgan site override" in error.hint
    assert content(book) == before
    assert read(second.path).studies == ()


def test_one_common_patient_among_a_hundred_is_enough(homes):
    homes("lung").enter(people(*range(100)))
    refused("LEDGER_SAME_PATIENTS", homes("heart").enter, people(*range(99, 199)))
    homes("kidney").enter(people(*range(100, 199)))


def test_a_patient_who_joins_later_is_found_too(homes):
    first, second = homes("lung"), homes("heart")
    first.enter(people(1, 2))
    second.enter(people(3, 4))
    second.enter(people(3, 4, 5))
    refused("LEDGER_SAME_PATIENTS", second.enter, people(2, 3, 4))
    assert second.enter(people(3)).pseudonyms == frozenset(people(3, 4, 5))


def test_a_patient_who_left_has_still_been_touched(homes):
    first = homes("lung")
    first.enter(people(1, 2))
    assert first.enter(people(2)).pseudonyms == frozenset(people(1, 2))
    refused("LEDGER_SAME_PATIENTS", homes("heart").enter, people(1))


def test_nothing_common_nothing_to_be_asked(book, homes):
    first, second = homes("lung"), homes("heart")
    first.enter(people(1, 2), owner_key="")
    second.enter(people(3), owner_key="")
    first.train(ROUND)
    assert book.spent_elsewhere(second.id) == []


def test_the_same_patients_again_in_the_same_ledger(book, homes):
    home = homes("lung")
    home.enter(people(1, 2))
    before = content(book)
    entry = home.enter(people(2, 1, 2), owner_key="")
    assert content(book) == before
    assert entry.pseudonyms == frozenset(people(1, 2))
    assert book.others(home.id, people(1, 2)) == ()


def test_nobody(book, homes):
    home = homes("lung")
    refused("DATA_EMPTY", home.enter, [])
    refused("DATA_EMPTY", book.commitment, [])
    refused("DATA_EMPTY", book.others, home.id, [])
    for wrong in ("", "x" * 32, people(1)[0] + "\n", people(1)[0].upper(), people(1)[0] + people(2)[0]):
        refused("LEDGER_BOOK", home.enter, [*people(1), wrong])


sets = st.lists(st.frozensets(st.integers(0, 12), min_size=1, max_size=5), min_size=1, max_size=6)


@settings(deadline=None, max_examples=15)
@given(sets)
def test_entries_against_an_obvious_oracle(touched):
    """Two ledgers stand side by side only if no patient is in both; everybody else is let in."""
    with tempfile.TemporaryDirectory() as folder:
        book = BudgetBook.open(Path(folder, "book"), create=True)
        let_in: list[tuple[str, frozenset[int]]] = []
        for number, patients in enumerate(touched):
            home = Home(book, Path(folder, f"home-{number}"))
            common = {name for name, earlier in let_in if any(p in earlier for p in patients)}
            assert {e.ledger for e in book.others(home.id, people(*patients))} == common
            if common:
                refused("LEDGER_SAME_PATIENTS", home.enter, people(*patients))
            else:
                home.enter(people(*patients))
                let_in.append((home.id, patients))


# ---- composition


def side_by_side(homes, *sets_of_patients: list[str]) -> list[Home]:
    """Homes that the data owner allows beside each other."""
    made: list[Home] = []
    for number, patients in enumerate(sets_of_patients):
        home = homes(f"home-{number}")
        if made:
            home.permit(*(other.id for other in made))
        home.enter(patients)
        made.append(home)
    return made


def test_both_ledgers_compose(book, homes):
    one, two, other = side_by_side(homes, people(1, 2), people(2, 3), people(4))
    first, second = TrainingSteps(1.1, 0.05, 30), TrainingSteps(0.9, 0.1, 12)
    one.train(first)
    two.train(second)
    two.train(first, settle=False)  # a crash: counts in full
    other.train(second)
    assert book.spent_elsewhere(one.id) == merge([first, second])
    assert book.spent_elsewhere(two.id) == [first]
    assert book.spent_elsewhere(other.id) == []
    # What a patient of both has paid does not depend on which ledger is asked, and is what was done, added up.
    paid = [merge([*read(home.path).spent(), *book.spent_elsewhere(home.id)]) for home in (one, two)]
    assert paid[0] == paid[1] == merge([first, second, first])
    together = epsilon_pld([first, second, first], DELTA)
    assert epsilon_pld(paid[0], DELTA) == together
    assert together > max(epsilon_pld([first], DELTA), epsilon_pld([second, first], DELTA))


def test_each_patient_is_covered(book, homes):
    """An oracle by hand: for every patient, own spending and spending elsewhere hold all that touched that patient."""
    touched = [{1, 2}, {2, 3}, {3, 4}, {9}]
    made = side_by_side(homes, *(people(*patients) for patients in touched))
    for number, home in enumerate(made):
        home.train(TrainingSteps(1.0 + number, 0.05, 10 + number))
    for home, patients in zip(made, touched, strict=True):
        counted = [*read(home.path).spent(), *book.spent_elsewhere(home.id)]
        for patient in patients:
            paid = [
                e
                for other, them in zip(made, touched, strict=True)
                if patient in them
                for e in read(other.path).spent()
            ]
            assert set(paid) <= set(counted)
    assert len(book.spent_elsewhere(made[0].id)) == 1  # not what nobody of its patients paid


def test_the_ceiling_holds_over_both_ledgers(book, homes):
    one, two = side_by_side(homes, people(1, 2), people(2, 3))
    ceiling = epsilon_pld([ROUND, ROUND], DELTA)
    for home, allowed in ((one, True), (two, True), (one, False), (two, False)):

        def act(ledger: Ledger, home: Home = home, allowed: bool = allowed) -> None:
            budget = Budget(
                ledger,
                study=STUDY,
                delta=DELTA,
                study_ceiling=100.0,
                total_ceiling=ceiling,
                accountants={"pld": epsilon_pld},
                elsewhere=book.spent_elsewhere(home.id),
            )
            assert budget.preview(ROUND)[1].allowed == allowed

        home.write(act)
        if allowed:
            home.train(ROUND)


def test_the_answer_is_read_now(book, homes):
    one, two = side_by_side(homes, people(1), people(1))
    for rounds in range(3):
        assert book.spent_elsewhere(one.id) == merge([ROUND] * rounds)
        two.train(ROUND)


def test_a_ledger_that_was_never_entered_has_no_answer(book, homes):
    refused("LEDGER_BOOK", book.spent_elsewhere, homes("lung").id)
    refused("LEDGER_BOOK", book.spent_elsewhere, "../index")


# ---- the data owner's word


def test_one_permission_serves_both_ledgers(book, homes):
    one, two = side_by_side(homes, people(1, 2), people(2, 3))
    one.enter(people(1, 2))  # its own ledger says nothing of the second one
    one.enter(people(1, 2, 3))
    two.enter(people(2, 3))
    assert [entry.ledger for entry in book.others(one.id, people(2))] == [two.id]
    refused("LEDGER_SAME_PATIENTS", one.enter, people(1, 2), owner_key="")


def test_a_permission_lets_in_beside_those_that_it_names(homes):
    one, two = side_by_side(homes, people(1), people(2))
    third = homes("third")
    third.permit(one.id)
    assert two.id[:12] in refused("LEDGER_SAME_PATIENTS", third.enter, people(1, 2)).what
    third.permit(two.id)
    third.enter(people(1, 2))


@pytest.mark.parametrize(
    ("case", "owner_key"),
    [
        ("none", OWNER_KEY),
        ("another ledger beside it", OWNER_KEY),
        ("for another ledger", OWNER_KEY),
        ("of another book", OWNER_KEY),
        ("another key", OWNER_KEY),
        ("another reason", OWNER_KEY),
        ("valid", ""),
        ("valid", "9" * 64),
        ("valid", OWNER_KEY),
    ],
)
def test_permissions(homes, case, owner_key):
    one, two = homes("lung"), homes("heart")
    one.enter(people(1))
    match case:
        case "valid":
            two.permit(one.id)
        case "another ledger beside it":
            two.permit("5" * 64)
        case "for another ledger":
            two.permit(one.id, ledger_id="5" * 64)
        case "of another book":
            two.permit(one.id, book_id="5" * 64)
        case "another key":
            two.permit(one.id, private=Ed25519PrivateKey.generate())
        case "another reason":
            about = {"book_id": two.book.id, "ledger_id": two.id, "others": [one.id]}
            fields = sign_override(OWNER, **about, reason="pilot, 10 patients") | {"reason": "pilot, 1000 patients"}
            two.write(lambda ledger: ledger.override(**fields))
    if (case, owner_key) == ("valid", OWNER_KEY):
        two.enter(people(1), owner_key)
    else:
        refused("LEDGER_SAME_PATIENTS", two.enter, people(1), owner_key)


# ---- the key, and what is derived from it


def test_the_book_is_made_once_and_is_its_owners_alone(book):
    again = BudgetBook.open(book.folder, create=True)
    assert (again.id, again.pseudonym_key) == (book.id, book.pseudonym_key)
    assert BudgetBook.open(book.folder).id == book.id
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in [book.folder, *book.folder.rglob("*")]}
    assert modes == {"book": 0o700, "ledgers": 0o700, "book.key": 0o600, "index.json": 0o600, "book.lock": 0o600}


def test_the_public_id_and_the_commitment_are_what_the_specification_says(book):
    key = book._key
    assert len(key) == 32
    assert book.id == hashlib.sha256(b"fedmedgan budget book 1\n" + key).hexdigest()
    one, two = sorted(people(1, 2))
    expected = hmac.new(key, f"dataset\n{one}\n{two}".encode(), "sha256").hexdigest()
    assert book.commitment([two, one, two]) == expected
    assert book.commitment([one]) != expected
    assert len({key, book.pseudonym_key, bytes.fromhex(book.id), bytes.fromhex(expected)}) == 4
    assert len(book.pseudonym_key) == 32


def test_nothing_secret_is_printed(book, homes):
    entry = homes("lung").enter(people(1))
    assert people(1)[0] not in repr(entry)
    assert book._key.hex() not in repr(book) + repr(vars(entry))
    error = refused("LEDGER_SAME_PATIENTS", homes("heart").enter, people(1))
    assert people(1)[0] not in error.line()


def test_two_books_say_different_things_of_the_same_patients(book, tmp_path):
    other = BudgetBook.open(tmp_path / "other", create=True)
    assert other.id != book.id
    assert other.pseudonym_key != book.pseudonym_key
    assert other.commitment(people(1)) != book.commitment(people(1))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o700 | 0o010])
def test_a_key_that_others_may_use(book, mode):
    (book.folder / "book.key").chmod(mode)
    refused("KEY_PERMISSIONS", BudgetBook.open, book.folder)
    refused("KEY_PERMISSIONS", BudgetBook.open, book.folder, create=True)


def test_a_sealed_key(tmp_path):
    folder = tmp_path / "book"
    made = BudgetBook.open(folder, create=True, passphrase=b"words")
    assert BudgetBook.open(folder, passphrase=b"words").id == made.id
    refused("KEY_PASSPHRASE", BudgetBook.open, folder)
    refused("KEY_PASSPHRASE", BudgetBook.open, folder, create=True, passphrase=b"others")


def test_a_key_of_another_kind(book):
    for values in ({"key": "AAAA"}, {"key": "?"}, {}):
        key_file.write(book.folder / "book.key", "budget-book", values)
        refused("KEY_FORMAT", BudgetBook.open, book.folder)
    key_file.write(book.folder / "book.key", "signing", {"key": "AAAA"})
    refused("KEY_FORMAT", BudgetBook.open, book.folder)


def test_there_is_no_book(tmp_path):
    refused("LEDGER_BOOK", BudgetBook.open, tmp_path / "book")
    assert not (tmp_path / "book").exists()
    (tmp_path / "file").write_text("")
    refused("KEY_MISSING", BudgetBook.open, tmp_path / "file", create=True)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "ledgers").write_text("")
    refused("LEDGER_WRITE", BudgetBook.open, tmp_path / "odd", create=True)


# ---- deleted, copied, moved, put back


def test_a_new_book_for_an_old_ledger(book, homes, tmp_path):
    home = homes("lung")
    home.enter(people(1))
    shutil.rmtree(book.folder)
    refused("LEDGER_BOOK", BudgetBook.open, book.folder)
    home.book = BudgetBook.open(book.folder, create=True)
    refused("LEDGER_BOOK", home.enter, people(1))  # the ledger itself says so
    history = read(home.path)
    for act in (lambda: home.book.enter(history, home.path, people(1)), lambda: home.book.check(history, home.path)):
        refused("LEDGER_BOOK", act)
    refused("LEDGER_BOOK", home.book.saw, history)


def test_a_ledger_that_was_begun_under_another_book_and_is_not_used_yet(homes, tmp_path):
    home = homes("lung")
    history = read(home.path)
    other = BudgetBook.open(tmp_path / "other", create=True)
    refused("LEDGER_BOOK", other.enter, history, home.path, people(1))


def test_a_lost_key_is_not_made_anew_over_entries(book, homes):
    homes("lung").enter(people(1))
    (book.folder / "book.key").unlink()
    before = content(book)
    for create in (False, True):
        refused("LEDGER_BOOK", BudgetBook.open, book.folder, create=create)
    assert content(book) == before


def test_a_book_of_another_hospital(book, homes, tmp_path):
    homes("lung").enter(people(1))
    theirs = Home(BudgetBook.open(tmp_path / "theirs", create=True), tmp_path / "there", "clinic-b")
    theirs.enter(people(1))
    shutil.rmtree(theirs.book.folder)
    shutil.copytree(book.folder, theirs.book.folder)
    theirs.book = BudgetBook.open(theirs.book.folder)
    refused("LEDGER_BOOK", theirs.enter, people(1))
    refused("LEDGER_BOOK", theirs.book.check, read(theirs.path), theirs.path)


def test_a_book_copied_before_there_is_a_ledger_is_seen_by_its_id(book, tmp_path):
    shutil.copytree(book.folder, tmp_path / "theirs")
    theirs = Home(BudgetBook.open(tmp_path / "theirs"), tmp_path / "there", "clinic-b")
    theirs.enter(people(1))  # nothing here can tell
    assert read(theirs.path).book == book.id


def test_a_ledger_with_a_study_that_the_book_does_not_know(book, homes):
    home = homes("lung")
    home.write(lambda ledger: ledger.open_study(STUDY, terms()))
    refused("LEDGER_BOOK", home.enter, people(1))
    refused("LEDGER_BOOK", book.check, read(home.path), home.path)


def test_a_ledger_at_another_place(book, homes, tmp_path):
    home = homes("lung")
    home.enter(people(1))
    book.check(read(home.path), home.path)
    shutil.copytree(home.folder, tmp_path / "copy")
    refused("LEDGER_BOOK", book.check, read(home.path), tmp_path / "copy" / "ledger.jsonl")
    refused("LEDGER_BOOK", book.enter, read(home.path), tmp_path / "copy" / "ledger.jsonl", people(1))
    shutil.rmtree(tmp_path / "copy")
    moved = home.folder.rename(tmp_path / "moved") / "ledger.jsonl"
    assert "symbolic link" in refused("LEDGER_BOOK", book.check, read(moved), moved).hint
    home.folder.symlink_to(tmp_path / "moved")
    book.check(read(moved), moved)
    book.enter(read(moved), moved, people(1, 2))


def test_book_and_homes_move_together(tmp_path):
    book = BudgetBook.open(tmp_path / "here" / "book", create=True)
    one, two = side_by_side(lambda name: Home(book, tmp_path / "here" / name), people(1), people(1))
    one.train(ROUND)
    there = (tmp_path / "here").rename(tmp_path / "there")
    moved = BudgetBook.open(there / "book")
    moved.check(read(there / "home-0" / "ledger.jsonl"), there / "home-0" / "ledger.jsonl")
    assert moved.spent_elsewhere(two.id) == [ROUND]


def test_a_book_that_is_reached_by_two_ways_is_one_book(book, homes, tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    link = tmp_path / "deep" / "er" / "link"
    link.symlink_to(book.folder)
    home = homes("lung")
    home.enter(people(1))
    home.train(ROUND)
    other = Home(BudgetBook.open(link), tmp_path / "heart")
    other.permit(home.id)
    other.enter(people(1))
    assert other.book.spent_elsewhere(other.id) == [ROUND]
    assert book.spent_elsewhere(home.id) == []
    book.check(read(other.path), other.path)


def test_a_copy_of_everything_is_seen_by_whoever_sees_both(book, homes, tmp_path):
    home = homes("lung")
    home.enter(people(1))
    (tmp_path / "copy").mkdir()
    for folder in (book.folder, home.folder):
        shutil.copytree(folder, tmp_path / "copy" / folder.name)
    copy = Home(BudgetBook.open(tmp_path / "copy" / "book"), tmp_path / "copy" / "lung")
    copy.train(ROUND)  # nothing here can tell
    home.train(TrainingSteps(2.0, 0.05, 30))
    there = read(copy.path)
    refused("LEDGER_FORK", read(home.path).check_anchor, there.seq, there.head)


def test_another_ledger_in_the_place_of_a_known_one(book, homes):
    home = homes("lung")
    home.enter(people(1))
    home.path.unlink()
    fresh = homes("lung")
    assert fresh.id != home.id
    refused("LEDGER_BOOK", fresh.enter, people(7))
    refused("LEDGER_BOOK", fresh.enter, people(1))


def test_a_ledger_of_another_hospitals_name(book, homes):
    home = homes("lung", "clinic-a")
    home.enter(people(1))
    entry = book._own(home.id)
    book._write(Entry(**{**vars(entry), "hospital": "clinic-b"}))
    refused("LEDGER_BOOK", book.check, read(home.path), home.path)


def test_one_hospital_may_have_another_name_in_another_consortium(book, homes):
    homes("lung", "clinic-a").enter(people(1))
    homes("heart", "site-7").enter(people(2))
    refused("LEDGER_SAME_PATIENTS", homes("kidney", "north").enter, people(2))


def test_a_book_inside_a_home(tmp_path):
    home = Home(BudgetBook.open(tmp_path / "home" / "book", create=True), tmp_path / "home")
    refused("LEDGER_BOOK", home.enter, people(1))
    (tmp_path / "beside").symlink_to(tmp_path / "home" / "book")
    home.book = BudgetBook.open(tmp_path / "beside")
    refused("LEDGER_BOOK", home.enter, people(1))


def test_an_own_ledger_that_was_put_back(book, homes):
    home = homes("lung")
    home.enter(people(1))
    older = home.path.read_bytes()
    home.train(ROUND)
    newer = home.path.read_bytes()
    home.path.write_bytes(older)
    for act in (lambda: home.enter(people(1)), lambda: book.check(read(home.path), home.path)):
        refused("LEDGER_ROLLBACK", act)
    home.write(lambda ledger: ledger.reserve(STUDY, 1, [ROUND]))
    home.write(lambda ledger: ledger.reserve(STUDY, 1, [ROUND]))
    refused("LEDGER_FORK", book.check, read(home.path), home.path)
    refused("LEDGER_FORK", book.saw, read(home.path))
    home.path.write_bytes(newer)
    book.check(read(home.path), home.path)


@pytest.mark.parametrize(
    "harm",
    [
        lambda path, older: path.unlink(),
        lambda path, older: shutil.rmtree(path.parent),
        lambda path, older: path.parent.rename(path.parent.with_name("elsewhere")),
        lambda path, older: path.write_bytes(b""),
        lambda path, older: path.write_bytes(older),
        lambda path, older: path.write_bytes(path.read_bytes().replace(b'"steps":30', b'"steps":10')),
        lambda path, older: path.write_bytes(b"".join(path.read_bytes().splitlines(True)[:-1])),
        lambda path, older: (path.unlink(), Ledger(path, "clinic-a", signing=SIGNING, book="5" * 64).close_file()),
        lambda path, older: (path.unlink(), path.mkdir()),
    ],
    ids=[
        "gone",
        "home gone",
        "home moved",
        "empty",
        "put back",
        "edited",
        "last line cut",
        "of another book",
        "a folder",
    ],
)
def test_a_ledger_that_cannot_be_counted_stops_the_others(book, homes, harm):
    one, two, apart = side_by_side(homes, people(1, 2), people(2, 3), people(4))
    older = one.path.read_bytes()
    one.train(ROUND)
    harm(one.path, older)
    refused("LEDGER_BOOK", book.spent_elsewhere, two.id)
    refused("LEDGER_BOOK", homes("new").enter, people(1))
    assert book.spent_elsewhere(apart.id) == []
    apart.enter(people(4, 5))


def test_a_line_that_is_being_written_is_no_damage(book, homes):
    one, two = side_by_side(homes, people(1), people(1))
    one.train(ROUND)
    with one.path.open("ab") as file:
        file.write(b'{"body":{"')
    assert book.spent_elsewhere(two.id) == [ROUND]


# ---- damage in the book


@pytest.mark.parametrize("name", ["entry", "index"])
def test_any_damage_to_an_entry_or_the_index_is_found(book, homes, name):
    one, two = homes("lung"), homes("heart")
    one.enter(people(1))
    two.enter(people(2))
    path = book.folder / "index.json" if name == "index" else book.folder / "ledgers" / f"{one.id}.json"
    good = path.read_bytes()
    damaged = [b"", b"{}", b"[]", good[:-1], good + b"\n", good.replace(b'","', b'", "', 1), b"\xff" + good]
    damaged += [good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in range(0, len(good), 7)]
    for content in damaged:
        path.write_bytes(content)
        refused("LEDGER_BOOK", book.others, two.id, people(2))
    path.unlink()
    refused("LEDGER_BOOK", book.others, two.id, people(2))
    refused("LEDGER_BOOK", two.enter, people(2))
    refused("LEDGER_BOOK", homes("new").enter, people(3))
    path.write_bytes(good)
    two.enter(people(2))


def test_an_entry_in_the_place_of_another_or_of_another_book(book, homes, tmp_path):
    one, two = homes("lung"), homes("heart")
    one.enter(people(1))
    two.enter(people(2))
    files = [book.folder / "ledgers" / f"{home.id}.json" for home in (one, two)]
    kept = files[1].read_bytes()
    files[1].write_bytes(files[0].read_bytes())
    refused("LEDGER_BOOK", book.others, one.id, people(1))
    files[1].write_bytes(kept)
    assert json.loads(kept)["body"]["ledger"] == two.id
    third = book.folder / "ledgers" / f"{'4' * 64}.json"
    third.write_bytes(kept)
    refused("LEDGER_BOOK", book.others, one.id, people(1))
    third.unlink()
    book.others(one.id, people(1))
    theirs = Home(BudgetBook.open(tmp_path / "theirs", create=True), tmp_path / "there")
    theirs.enter(people(3))
    shutil.copy(next((tmp_path / "theirs" / "ledgers").iterdir()), book.folder / "ledgers")
    refused("LEDGER_BOOK", book.others, one.id, people(1))


def test_a_crash_between_entry_and_index_forgets_no_patient(book, homes, monkeypatch):
    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(BudgetBook, "_write_index", crash)
        with pytest.raises(KeyboardInterrupt):
            homes("lung").enter(people(1))
    refused("LEDGER_SAME_PATIENTS", homes("heart").enter, people(1))
    homes("lung").enter(people(1))
    homes("kidney").enter(people(2))


def test_a_crash_while_the_book_is_made_leaves_no_half_book(tmp_path, monkeypatch):
    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(key_file, "write", crash)
        with pytest.raises(KeyboardInterrupt):
            BudgetBook.open(tmp_path / "book", create=True)
    refused("LEDGER_BOOK", BudgetBook.open, tmp_path / "book")
    Home(BudgetBook.open(tmp_path / "book", create=True), tmp_path / "home").enter(people(1))


def test_leftovers_of_a_crash_are_no_entries(book, homes):
    homes("lung").enter(people(1))
    (book.folder / "ledgers" / f"{'4' * 64}.json.tmp").write_bytes(b"half")
    homes("heart").enter(people(2))


def test_a_book_that_cannot_be_written(book, homes):
    home = homes("lung")
    (book.folder / "ledgers").rmdir()
    (book.folder / "ledgers").write_text("")
    refused("LEDGER_WRITE", home.enter, people(1))


# ---- several processes


def test_another_process_is_waited_for_and_then_given_up(book, homes, monkeypatch):
    monkeypatch.setattr(budget_book, "LOCK_SECONDS", 0.1)
    home = homes("lung")
    file = os.open(book.folder / "book.lock", os.O_RDWR)
    fcntl.flock(file, fcntl.LOCK_EX)
    for act in (
        lambda: home.enter(people(1)),
        lambda: book.others(home.id, people(1)),
        lambda: book.locked().__enter__(),
    ):
        refused("LEDGER_LOCKED", act)
    os.close(file)
    home.enter(people(1))


def test_the_lock_may_be_nested_and_is_given_back(book, homes, monkeypatch):
    monkeypatch.setattr(budget_book, "LOCK_SECONDS", 0.1)
    other = BudgetBook.open(book.folder)
    home = homes("lung")
    with book.locked():
        home.enter(people(1))
        with pytest.raises(ZeroDivisionError), book.locked():
            raise ZeroDivisionError
        refused("LEDGER_LOCKED", other.others, home.id, people(2))
    other.others(home.id, people(2))


ENTER = """
import sys
from pathlib import Path
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fedmedgan.client.budget_book import BudgetBook
from fedmedgan.shared.errors import PrivacyError
from fedmedgan.shared.privacy.ledger import Ledger
folder, process = Path(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
sys.stdin.read()  # both begin at once
book = BudgetBook.open(folder / "book", create=True)
for number in range(12):
    home = folder / f"{process}-{number}"
    home.mkdir()
    with Ledger(home / "ledger.jsonl", "clinic-a", signing=Ed25519PrivateKey.generate(), book=book.id) as ledger:
        own, common = f"{ord(process) * 1000 + number:032x}", f"{number:032x}"
        try:
            book.enter(ledger.history, ledger.path, [own, common])
            print("in", number)
        except PrivacyError as error:
            print(error.code, number)
"""


def test_of_two_processes_that_enter_the_same_patients_one_is_let_in(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(ENTER), str(tmp_path)]
    started = [
        subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for name in "ab"
    ]
    for process in started:
        assert process.stdout.readline() == "ready\n"
    for process in started:
        process.stdin.close()
    said = [process.stdout.read().splitlines() for process in started]
    for process in started:
        process.stdout.close()
        process.wait(100)
    assert all(process.returncode == 0 for process in started)
    for number in range(12):
        assert sorted(lines[number] for lines in said) == [f"LEDGER_SAME_PATIENTS {number}", f"in {number}"]
    entries = BudgetBook.open(tmp_path / "book")._entries()
    assert len(entries) == 12


def test_two_homes_do_not_spend_the_same_rest(book, homes):
    """What the lock is for: counted and reserved under it, the second home sees the first one's reservation."""
    one, two = side_by_side(homes, people(1), people(1))
    other = BudgetBook.open(book.folder)
    with book.locked():
        assert book.spent_elsewhere(one.id) == []
        one.train(ROUND, settle=False)
    assert other.spent_elsewhere(two.id) == [ROUND]


def test_what_the_book_raises_is_never_about_a_patient(book, homes):
    home = homes("lung")
    error = refused("LEDGER_BOOK", home.enter, ["Doe^Jane"])
    assert isinstance(error, PrivacyError)
    assert "Doe" not in error.line()
