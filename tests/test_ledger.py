"""The ledger: what was acknowledged is never lost, and nobody edits it unseen."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import resource
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from ledgers import BOOK, PROOF, SIGNING, ledger_at, rewritten, terms

from fedmedgan.shared.errors import PrivacyError
from fedmedgan.shared.privacy.events import TrainingSteps, merge
from fedmedgan.shared.privacy.history import NOTHING, read
from fedmedgan.shared.privacy.ledger import Ledger
from fedmedgan.shared.privacy.records import _KINDS, DOMAIN

STUDY, OTHER = "a" * 64, "b" * 64
TESTS = str(Path(__file__).parent)
EVENT = TrainingSteps(1.1, 0.05, 30)


def refused(expected: str, act, /, *args, **options) -> PrivacyError:
    with pytest.raises(PrivacyError) as caught:
        act(*args, **options)
    assert caught.value.code == expected, caught.value
    return caught.value


def opened(path: Path) -> Ledger:
    ledger = ledger_at(path)
    ledger.open_study(STUDY, terms())
    return ledger


def fill(path: Path, records: int) -> bytes:
    """A ledger of `records` records; of every kind that a process writes where there are 30."""
    with ledger_at(path) as ledger:
        ledger.open_study(OTHER, terms(delta=1e-5, ceiling=2.0))
        ledger.void(ledger.reserve(OTHER, 0, [EVENT]), "the folder could not be read")
        ledger.close_study(OTHER)
        ledger.open_study(STUDY, terms())
        number = 0
        while ledger.history.seq + (6 if number else 2) <= records:
            number += 1
            seq = ledger.reserve(STUDY, number, [EVENT, TrainingSteps(2.0, 0.1, number)])
            ledger.charge(seq, 30, number - 1, **PROOF)
            if ledger.history.seq + 4 <= records:
                ledger.rotate(STUDY, epoch=number, key_id="a" * 32, members=["clinic-a", "clinic-b"])
                ledger.release(STUDY, round=number, attempt=1, sha256="f" * 64, size=1000)
                ledger.anchor(STUDY, round=number, certificate="b" * 64, heads={"9" * 64: (number, "8" * 64)})
        while ledger.history.seq < records:
            ledger.reserve(STUDY, 99, [EVENT])
        assert ledger.history.seq == records
    return path.read_bytes()


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "ledger.jsonl"


# What is written


def test_every_line_is_canonical_json_signed_and_names_the_line_before(path):
    raw = fill(path, 30)
    previous = NOTHING
    for number, line in enumerate(raw.splitlines(keepends=True), start=1):
        record = json.loads(line)
        assert rfc8785.dumps(record) + b"\n" == line, "RFC 8785, by a library"
        assert set(record) == {"body", "signature"}
        SIGNING.public_key().verify(bytes.fromhex(record["signature"]), DOMAIN + rfc8785.dumps(record["body"]))
        assert (record["body"]["seq"], record["body"]["prev"]) == (number, previous)
        assert record["body"]["hospital"] == "clinic-a"
        previous = hashlib.sha256(line).hexdigest()
    history = read(path)
    assert (history.seq, history.head, history.hospital, history.torn_bytes) == (30, previous, "clinic-a", 0)


def test_the_first_record_names_ledger_key_and_book(path):
    with opened(path) as ledger:
        body = ledger.records[0].body
    assert (body["kind"], body["study"], body["book"]) == ("begin", None, BOOK)
    assert body["signing_key"] == SIGNING.public_key().public_bytes_raw().hex()
    with opened(path.with_name("another.jsonl")) as other:
        assert other.history.ledger_id != body["ledger"], "two ledgers are never taken for one"


def test_a_study_is_opened_with_its_terms_and_versions(path):
    with opened(path) as ledger:
        body = ledger.records[1].body
        assert ledger.history.terms(STUDY) == terms()
    assert (body["kind"], body["unit"], body["delta"], body["ceiling"]) == ("open", "patient", "0.0001", "8.0")
    assert {"python", "fedmedgan", "dp-accounting"} <= set(body["versions"])


def test_a_ledger_of_another_book_or_key_is_refused(path):
    raw = fill(path, 8)
    refused("LEDGER_BOOK", Ledger, path, "clinic-a", signing=SIGNING, book="0" * 64)
    refused("LEDGER_OWNER", ledger_at, path, signing=Ed25519PrivateKey.generate())
    assert path.read_bytes() == raw


def test_only_the_ledgers_own_key_can_continue_it(path):
    lines = fill(path, 30).splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:-1], rewritten(lines[-1], Ed25519PrivateKey.generate())]))
    refused("LEDGER_SIGNATURE", read, path)
    refused("LEDGER_SIGNATURE", ledger_at, path)


def test_a_ledger_begins_once(path):
    lines = fill(path, 8).splitlines(keepends=True)
    path.write_bytes(rewritten(lines[1], seq=1, prev=NOTHING))
    refused("LEDGER_SIGNATURE", read, path)  # nothing says whose key it should be
    again = rewritten(lines[0], seq=2, prev=hashlib.sha256(lines[0]).hexdigest())
    path.write_bytes(lines[0] + again)
    refused("LEDGER_STATE", read, path)


def test_a_release_needs_to_be_paid_and_a_key_epoch_a_later_one(path):
    with opened(path) as ledger:
        ledger.void(ledger.reserve(STUDY, 1, [EVENT]), "nothing was touched")
        update = {"attempt": 1, "sha256": "f" * 64, "size": 9}
        refused("LEDGER_STATE", ledger.release, STUDY, round=1, **update)
        seq = ledger.reserve(STUDY, 1, [EVENT])
        ledger.release(STUDY, round=1, **update)  # after a crash the reservation is spent in full
        refused("LEDGER_STATE", ledger.void, seq, "what was released cannot be taken back")
        ledger.charge(seq, 30, **PROOF)
        ledger.release(STUDY, round=1, **update)
        refused("LEDGER_STATE", ledger.release, STUDY, round=2, **update)
        ledger.rotate(STUDY, epoch=2, key_id="a" * 32, members=["clinic-a"])
        before = ledger.history.seq
        ledger.rotate(STUDY, epoch=2, key_id="a" * 32, members=["clinic-a"])
        assert ledger.history.seq == before, "the same epoch is on record already"
        refused("LEDGER_STATE", ledger.rotate, STUDY, epoch=1, key_id="b" * 32, members=["clinic-a"])


def test_after_a_failed_test_the_study_must_be_opened_again(path):
    failed = {**PROOF, "checks": {**PROOF["checks"], "noise": "failed"}}
    with opened(path) as ledger:
        ledger.charge(ledger.reserve(STUDY, 1, [EVENT]), 30, **failed)
        assert ledger.history.proof_failed(STUDY)
        assert ledger.spent() == [EVENT], "it was done all the same"
    assert read(path).proof_failed(STUDY)
    with opened(path) as ledger:  # `opened` opens the study again, as signing it does
        assert not ledger.history.proof_failed(STUDY)


@pytest.mark.parametrize("checks", [{}, {"noise": "passed"}, {**PROOF["checks"], "noise": "fine"}, [], None])
def test_a_charge_says_what_each_test_said(path, checks):
    with opened(path) as ledger:
        seq = ledger.reserve(STUDY, 1, [EVENT])
        with pytest.raises((PrivacyError, TypeError)):
            ledger.charge(seq, 30, **{**PROOF, "checks": checks})
        assert ledger.spent() == [EVENT]


def test_peers_heads_are_kept(path):
    with opened(path) as ledger:
        for round, head in ((1, "1" * 64), (2, "2" * 64)):
            ledger.anchor(STUDY, round=round, certificate="b" * 64, heads={"9" * 64: (round, head)})
    assert read(path).peers == {"9" * 64: (2, "2" * 64)}


def test_every_kind_of_record_is_in_the_sample(path):
    raw = fill(path, 30)
    with ledger_at(path) as ledger:
        ledger.override(ledgers=["1" * 64], reason="board", owner_key="2" * 64, owner_signature="3" * 128)
    path.write_bytes(path.read_bytes() + b"{")
    ledger_at(path).close_file()
    assert {record.kind for record in read(path).records} == set(_KINDS)
    assert path.read_bytes().startswith(raw)


def test_the_file_is_for_its_owner_alone(path):
    opened(path).close_file()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    opened(path).close_file()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_opening_a_study_again_writes_only_what_changed(path):
    with opened(path) as ledger:
        ledger.open_study(STUDY, terms())
        assert ledger.history.seq == 2
        ledger.open_study(STUDY, terms(ceiling=9.0))
        assert ledger.history.seq == 3
        refused("LEDGER_STATE", ledger.open_study, STUDY, terms(delta=1e-5))
        refused("PRIVACY_RANGE", terms, delta=2.0)
    with opened(path) as ledger:
        assert ledger.history.seq == 4, "the ceiling went back to 8, and that is on record"


def test_a_record_is_on_the_disk_before_it_is_acknowledged(path, monkeypatch):
    """And so is the name of a new file, which is the folder's business."""
    synced, real_fsync = [], os.fsync

    def fsync(file: int) -> None:
        real_fsync(file)
        status = os.fstat(file)
        synced.append("folder" if stat.S_ISDIR(status.st_mode) else status.st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    with ledger_at(path) as ledger:
        assert "folder" in synced
        ledger.open_study(STUDY, terms())
        assert synced[-1] == path.stat().st_size > 0
        seq = ledger.reserve(STUDY, 1, [EVENT])
        assert synced[-1] == path.stat().st_size
        ledger.charge(seq, 30, **PROOF)
        assert synced[-1] == path.stat().st_size


# What counts as spent


def test_charged_steps_and_unsettled_reservations_are_spent(path):
    with opened(path) as ledger:
        assert ledger.spent() == []
        ledger.charge(ledger.reserve(STUDY, 1, [EVENT]), 30, **PROOF)
        ledger.charge(ledger.reserve(STUDY, 2, [EVENT]), 10, **PROOF)
        ledger.void(ledger.reserve(STUDY, 3, [EVENT]), "no data was touched")
        ledger.reserve(STUDY, 3, [EVENT])
        assert ledger.spent() == [EVENT.with_steps(70)]
    assert read(path).spent() == [EVENT.with_steps(70)]


def test_all_studies_are_paid_from_the_same_patients(path):
    other = TrainingSteps(2.0, 0.1, 5)
    with opened(path) as ledger:
        ledger.open_study(OTHER, terms())
        ledger.charge(ledger.reserve(STUDY, 1, [EVENT]), 30, **PROOF)
        ledger.reserve(OTHER, 1, [other])
        ledger.close_study(OTHER)
        assert ledger.spent(STUDY) == [EVENT]
        assert ledger.spent(OTHER) == [other]
        assert ledger.spent() == [EVENT, other]


def test_a_second_reservation_of_a_round_costs_again(path):
    with opened(path) as ledger:
        first = ledger.reserve(STUDY, 1, [EVENT])
        second = ledger.reserve(STUDY, 1, [EVENT])
        ledger.charge(second, 30, **PROOF)
        assert first != second
        assert ledger.spent() == [EVENT.with_steps(60)]


# What is refused


def test_records_that_do_not_follow_each_other_are_refused(path):
    with opened(path) as ledger:
        refused("LEDGER_STATE", ledger.reserve, OTHER, 1, [EVENT])
        refused("LEDGER_STATE", ledger.close_study, OTHER)
        seq = ledger.reserve(STUDY, 1, [EVENT])
        refused("LEDGER_STATE", ledger.charge, seq, 31, **PROOF)
        refused("LEDGER_STATE", ledger.charge, seq, -1, **PROOF)
        refused("LEDGER_STATE", ledger.charge, seq, True, **PROOF)
        refused("LEDGER_STATE", ledger.charge, seq, 30, 30, **PROOF)
        refused("LEDGER_STATE", ledger.charge, seq, **PROOF)
        refused("LEDGER_STATE", ledger.charge, seq + 1, 30, **PROOF)
        ledger.charge(seq, 30, **PROOF)
        refused("LEDGER_STATE", ledger.charge, seq, 30, **PROOF)
        refused("LEDGER_STATE", ledger.void, seq, "twice")
        ledger.close_study(STUDY)
        refused("LEDGER_STATE", ledger.reserve, STUDY, 2, [EVENT])
        refused("LEDGER_STATE", ledger.open_study, STUDY, terms())
        assert ledger.history.seq == 5
    assert read(path).seq == 5


@pytest.mark.parametrize(
    ("round", "events"),
    [(-1, [EVENT]), (True, [EVENT]), (1.0, [EVENT]), (2**60, [EVENT]), (1, []), (1, [EVENT.with_steps(0)])],
)
def test_a_reservation_of_nothing_is_refused(path, round, events):
    with opened(path) as ledger:
        refused("LEDGER_STATE", ledger.reserve, STUDY, round, events)
        assert ledger.history.seq == 2


@pytest.mark.parametrize("reason", ["", "two\nlines", "x" * 201, None])
def test_a_reason_is_one_short_line(path, reason):
    with opened(path) as ledger:
        refused("LEDGER_STATE", ledger.void, ledger.reserve(STUDY, 1, [EVENT]), reason)


def test_a_process_cannot_take_back_what_an_earlier_one_reserved(path):
    with opened(path) as ledger:
        seq = ledger.reserve(STUDY, 1, [EVENT])
    with opened(path) as ledger:
        refused("LEDGER_STATE", ledger.void, seq, "nothing happened, honestly")
        refused("LEDGER_STATE", ledger.charge, seq, 1, **PROOF)
        assert ledger.spent() == [EVENT]


def test_another_hospitals_ledger_is_refused(path):
    raw = fill(path, 8)
    refused("LEDGER_OWNER", ledger_at, path, "clinic-b")
    refused("LEDGER_OWNER", ledger_at, path, "Clinic A")
    assert path.read_bytes() == raw
    lines = raw.splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:7], rewritten(lines[7], hospital="clinic-b")]))
    refused("LEDGER_OWNER", read, path)


def test_two_processes_cannot_write_one_ledger(path):
    code = f"""
        import sys
        from pathlib import Path
        from fedmedgan.shared.errors import PrivacyError
        sys.path.insert(0, {TESTS!r})
        from ledgers import ledger_at
        try:
            ledger_at(Path({str(path)!r}))
        except PrivacyError as error:
            print(error.code)
    """
    with opened(path) as ledger:
        child = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
        assert child.stdout.strip() == "LEDGER_LOCKED", child.stderr
        refused("LEDGER_LOCKED", ledger_at, path)
        assert read(path).seq == 2, "reading needs no lock"
        ledger.reserve(STUDY, 1, [EVENT])
    opened(path).close_file()


def test_after_it_was_closed_nothing_is_written(path):
    with opened(path) as ledger:
        seq = ledger.reserve(STUDY, 1, [EVENT])
    refused("LEDGER_WRITE", ledger.charge, seq, 30, **PROOF)


# Damage


def unseen_flips(raw: bytes, flips: Iterable[int], copy: Path) -> list[int]:
    """Which of these bits can be flipped without being noticed."""
    unseen = []
    for flip in flips:
        damaged = bytearray(raw)
        damaged[flip // 8] ^= 1 << flip % 8
        copy.write_bytes(damaged)
        try:
            read(copy)
        except PrivacyError as error:
            assert error.code in ("LEDGER_CORRUPT", "LEDGER_SIGNATURE", "LEDGER_STATE", "LEDGER_OWNER"), error
        else:
            unseen.append(flip)
    return unseen


def test_no_flipped_bit_goes_unseen(path, tmp_path):
    raw, chance = fill(path, 30), random.Random(1)
    flips = [chance.randrange(len(raw) * 8) for _ in range(3000)]
    assert unseen_flips(raw, flips, tmp_path / "copy.jsonl") == []


def test_no_flipped_bit_of_the_last_line_goes_unseen(path, tmp_path):
    """No later line holds its hash, so every single bit is tried, the newline's among them."""
    raw = fill(path, 8)
    start = raw.rindex(b"\n", 0, -1) + 1
    assert unseen_flips(raw, range(start * 8, len(raw) * 8), tmp_path / "copy.jsonl") == []


@pytest.mark.parametrize(
    "edit",
    [
        lambda lines: [*lines[:8], *lines[9:]],
        lambda lines: lines[1:],
        lambda lines: [*lines[:5], lines[6], lines[5], *lines[7:]],
        lambda lines: [*lines[:6], lines[5], *lines[6:]],
        lambda lines: [*lines, lines[-1]],
        lambda lines: [*lines[:9], rewritten(lines[9], round=77), *lines[10:]],
        lambda lines: [*lines[:-1], rewritten(lines[-1], v=1)],
        lambda lines: [*lines[:-1], rewritten(lines[-1], v=True)],
        lambda lines: [*lines[:-1], rewritten(lines[-1], seq=31)],
        lambda lines: [*lines[:-1], rewritten(lines[-1], more=1)],
        lambda lines: [*lines[:-1], rewritten(lines[-1], kind="refund")],
        lambda lines: [*lines[:-1], rewritten(lines[-1], kind=["open"])],
        lambda lines: [*lines, b"\n"],
        lambda lines: [b"\n", *lines],
        lambda lines: [*lines[:-1], lines[-1].replace(b'"signature":"', b'"signature":"A')],
        lambda lines: [*lines[:-1], lines[-1].replace(b",", b", ", 1)],
        lambda lines: [*lines[:-1], lines[-1].replace(b'"v":2', b'"v":2,"v":2')],
        lambda lines: [*lines[:-1], lines[-1].replace(b'"round":99', b'"round":NaN')],
        lambda lines: [*lines[:-1], lines[-1].replace(b'"round":99', b'"round":1e999')],
        lambda lines: [*lines[:-1], lines[-1].replace(b'"round":99', b'"round":99.0')],
        lambda lines: [*lines[:-1], lines[-1].replace(b'"round":99', b'"round":' + b"[" * 100_000)],
        lambda lines: [*lines[:-1], lines[-1].upper()],
        lambda lines: [*lines[:-1], lines[-1].decode().encode("utf-16")],
        lambda lines: [*lines, b"\xff\xfe\n"],
        lambda lines: [*lines[:-1], lines[-1][:-1] + b"}"],
    ],
)
def test_every_edit_is_seen_and_nothing_is_repaired(path, edit):
    raw = fill(path, 30)
    edited = b"".join(edit(raw.splitlines(keepends=True)))
    assert edited != raw
    path.write_bytes(edited)
    for act in (read, ledger_at):
        with pytest.raises(PrivacyError) as caught:
            act(path)
        assert caught.value.code in ("LEDGER_CORRUPT", "LEDGER_STATE")
    assert path.read_bytes() == edited


@pytest.mark.parametrize("text", [b"PK\x03\x04 some other file", b"{}", b"\x89PNG", b'{"body":{"' + b"x" * (1 << 21)])
def test_a_file_that_is_no_ledger_is_left_alone(path, text):
    path.write_bytes(text)
    refused("LEDGER_CORRUPT", ledger_at, path)
    assert path.read_bytes() == text


def test_well_formed_records_that_do_not_follow_each_other_are_refused(path):
    lines = fill(path, 30).splitlines(keepends=True)
    at = max(i for i, line in enumerate(lines) if json.loads(line)["body"]["kind"] == "charge")
    path.write_bytes(b"".join([*lines[:at], rewritten(lines[at], steps=[31, 0])]))
    refused("LEDGER_STATE", read, path)


def test_a_charge_cannot_settle_the_reservation_of_another_study(path):
    with opened(path) as ledger:
        ledger.open_study(OTHER, terms())
        ledger.charge(ledger.reserve(STUDY, 1, [EVENT]), 30, **PROOF)
    *lines, charge = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines, rewritten(charge, study=OTHER)]))
    refused("LEDGER_STATE", read, path)


def test_a_torn_last_line_is_cut_off_and_that_is_on_record(path):
    raw = fill(path, 8)
    for tail in (b"{", b'{"body":{"hospi', raw.splitlines()[-1], b'{"body":{"h' + b"\0" * 500, b"\0\0\0"):
        path.write_bytes(raw + tail)
        history = read(path)
        assert (history.seq, history.torn_bytes) == (8, len(tail))
        assert path.read_bytes() == raw + tail, "reading repairs nothing"
        with ledger_at(path) as ledger:
            body = ledger.records[-1].body
            assert (body["kind"], body["removed_bytes"]) == ("tail_repaired", len(tail))
            assert body["removed_sha256"] == hashlib.sha256(tail).hexdigest()
        assert path.read_bytes().startswith(raw)
        assert read(path).seq == 9


def test_a_roll_back_verifies_alone_so_heads_must_be_kept_elsewhere(path):
    """A limit, written down as a test: whoever keeps (seq, head) sees it, the ledger alone does not."""
    raw = fill(path, 12)
    before = read(path)
    path.write_bytes(b"".join(raw.splitlines(keepends=True)[:8]))
    after = read(path)
    assert (after.seq, after.head) != (before.seq, before.head)


# Faults


def test_a_file_changed_while_it_is_open_is_noticed(path):
    with opened(path) as ledger:
        path.write_bytes(path.read_bytes() + b"{")
        refused("LEDGER_CORRUPT", ledger.reserve, STUDY, 1, [EVENT])
    path.write_bytes(path.read_bytes()[:-1])
    with opened(path) as ledger:
        path.rename(path.with_suffix(".moved"))
        refused("LEDGER_WRITE", ledger.reserve, STUDY, 1, [EVENT])
        shutil.copy(path.with_suffix(".moved"), path)
        refused("LEDGER_CORRUPT", ledger.reserve, STUDY, 1, [EVENT])


@pytest.mark.parametrize("name", ["write", "fsync"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_after_a_failed_write_the_file_still_verifies_and_nothing_more_is_written(path, monkeypatch, name, number):
    """The disk's own failures cannot be made on demand, so the system call is made to fail."""
    with opened(path) as ledger:
        seq = ledger.reserve(STUDY, 1, [EVENT])
        raw, real_write = path.read_bytes(), os.write

        def fail(file: int, *data: bytes) -> None:
            for piece in data:
                real_write(file, piece[:7])
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, name, fail)
        error = refused("LEDGER_WRITE", ledger.reserve, STUDY, 2, [EVENT])
        assert os.strerror(number) in error.what
        monkeypatch.undo()
        if name == "write":  # a failing fsync fails again after cutting back, which is all the same
            assert path.read_bytes() == raw
        refused("LEDGER_WRITE", ledger.charge, seq, 1, **PROOF)
    history = read(path)
    assert history.spent()[0].steps >= 30, "what was acknowledged is spent"
    opened(path).close_file()


FILL = """
    import sys
    from pathlib import Path
    from fedmedgan.shared.errors import PrivacyError
    from fedmedgan.shared.privacy.events import TrainingSteps
    from fedmedgan.shared.privacy.history import read
    sys.path.insert(0, {tests!r})
    from ledgers import ledger_at, terms
    path = Path(sys.argv[1])
    acknowledged = 0
    try:
        with ledger_at(path) as ledger:
            ledger.open_study("a" * 64, terms())
            for number in range(1000):
                ledger.reserve("a" * 64, number, [TrainingSteps(1.1, 0.05, 30)])
                acknowledged += 30
    except PrivacyError as error:
        print(error.code, error.what)
    spent = sum(event.steps for event in read(path).spent())
    print(acknowledged, spent, read(path).torn_bytes)
"""


def script(text: str) -> str:
    return textwrap.dedent(text.replace("{tests!r}", repr(TESTS)))


def run_fill(path: Path, *, shell: str = "", **options) -> list[str]:
    child = [sys.executable, "-c", script(FILL), str(path)]
    if shell:
        child = ["unshare", "-rm", "sh", "-c", shell.format(shlex.join(child))]
    done = subprocess.run(child, capture_output=True, text=True, timeout=60, **options)
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip("this machine lets nobody mount: " + done.stderr.strip()[:100])
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_full_disk_refuses_the_round_and_loses_nothing(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    lines = run_fill(folder / "ledger.jsonl", shell=f"mount -t tmpfs -o size=20k none {folder} && {{}}")
    assert lines[0].startswith("LEDGER_WRITE No space left")
    acknowledged, spent, torn = map(int, lines[1].split())
    assert 0 < acknowledged == spent
    assert torn == 0


def test_a_file_size_limit_refuses_the_round_and_loses_nothing(path):
    lines = run_fill(path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)))
    assert lines[0].startswith("LEDGER_WRITE File too large")
    acknowledged, spent, torn = map(int, lines[1].split())
    assert 0 < acknowledged == spent
    assert torn == 0


def test_a_read_only_disk_refuses_the_round(tmp_path):
    folder = tmp_path / "fixed"
    folder.mkdir()
    fill(folder / "ledger.jsonl", 8)
    remount = f"mount --bind {folder} {folder} && mount -o remount,bind,ro {folder} && {{}}"
    lines = run_fill(folder / "ledger.jsonl", shell=remount)
    assert lines[0].startswith("LEDGER_WRITE Read-only file system")
    assert lines[1].split()[0] == "0"


def test_a_place_where_no_file_can_be_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for place in (tmp_path / "absent" / "ledger", tmp_path, tmp_path / "pipe", tmp_path / "link"):
        refused("LEDGER_WRITE", ledger_at, place)
    assert "regular" in refused("LEDGER_WRITE", ledger_at, tmp_path / "pipe").what
    refused("LEDGER_WRITE", read, tmp_path / "absent")
    assert not (tmp_path / "elsewhere").exists()


CHARGE = """
    import sys
    from pathlib import Path
    from fedmedgan.shared.privacy.events import TrainingSteps
    sys.path.insert(0, {tests!r})
    from ledgers import PROOF, ledger_at, terms
    with ledger_at(Path(sys.argv[1])) as ledger:
        ledger.open_study("a" * 64, terms())
        while True:
            seq = ledger.reserve("a" * 64, 1, [TrainingSteps(1.1, 0.05, 2)])
            print("reserved", ledger.history.seq, ledger.history.head, flush=True)
            ledger.charge(seq, 1, **PROOF)
            print("charged", ledger.history.seq, ledger.history.head, flush=True)
"""


def test_a_killed_process_loses_nothing_that_was_acknowledged(path):
    """SIGKILL at any moment. This tests the death of a process; a power loss is fsync's business."""
    chance, acknowledged = random.Random(2), []
    for _ in range(20):
        child = subprocess.Popen(
            [sys.executable, "-c", script(CHARGE), str(path)],
            stdout=subprocess.PIPE,
            text=True,
        )
        seen = [child.stdout.readline()]
        time.sleep(chance.random() * 0.02)
        child.send_signal(signal.SIGKILL)
        seen += child.stdout.readlines()
        child.stdout.close()
        child.wait()
        acknowledged += [line.split() for line in seen if line.endswith("\n")]
    records = read(path).records
    assert len(acknowledged) > 40
    for kind, seq, head in acknowledged:
        assert records[int(seq) - 1].line_sha256 == head, (kind, seq)
    kinds = [record.kind for record in records]
    assert kinds.count("reserve") >= sum(kind == "reserved" for kind, *_ in acknowledged)
    assert read(path).spent()[0].steps == 2 * kinds.count("reserve") - kinds.count("charge")


# Everything at once


class LedgerMachine(RuleBasedStateMachine):
    """Appends, reopens, and crashes that leave any prefix of the file, against a model in plain lists."""

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "ledger.jsonl"
        self.ledger = opened(self.path)
        self.reserved: dict[int, TrainingSteps] = {}
        self.own: set[int] = set()
        self.charged: list[TrainingSteps] = []
        self.sizes = [self.path.stat().st_size]
        self.undo: list[tuple] = []

    def remember(self) -> None:
        self.undo.append((dict(self.reserved), list(self.charged)))

    def written(self) -> None:
        self.sizes.append(self.path.stat().st_size)

    @rule(round=st.integers(0, 3), steps=st.integers(1, 50), sigma=st.sampled_from([0.5, 1, 2.25]))
    def reserve(self, round: int, steps: int, sigma: float) -> None:
        self.remember()
        event = TrainingSteps(sigma, 0.1, steps)
        seq = self.ledger.reserve(STUDY, round, [event])
        self.reserved[seq] = event
        self.own.add(seq)
        self.written()

    @precondition(lambda self: self.own)
    @rule(data=st.data())
    def charge(self, data: st.DataObject) -> None:
        self.remember()
        seq = data.draw(st.sampled_from(sorted(self.own)))
        event = self.reserved.pop(seq)
        done = data.draw(st.integers(0, event.steps))
        self.ledger.charge(seq, done, **PROOF)
        self.charged.append(event.with_steps(done))
        self.own.discard(seq)
        self.written()

    @precondition(lambda self: self.own)
    @rule(data=st.data())
    def void(self, data: st.DataObject) -> None:
        self.remember()
        seq = data.draw(st.sampled_from(sorted(self.own)))
        del self.reserved[seq]
        self.ledger.void(seq, "not begun")
        self.own.discard(seq)
        self.written()

    @rule()
    def reopen(self) -> None:
        self.ledger.close_file()
        self.ledger = opened(self.path)
        self.own.clear()

    @precondition(lambda self: self.undo)
    @rule(data=st.data())
    def crash_while_the_last_record_is_written(self, data: st.DataObject) -> None:
        """Cut anywhere inside the last line: its newline is missing, so it was never acknowledged."""
        self.ledger.close_file()
        start, end = self.sizes[-2], self.sizes[-1]
        cut = data.draw(st.integers(start, end - 1))
        os.truncate(self.path, cut)
        self.reserved, self.charged = self.undo.pop()
        before = read(self.path).seq
        self.ledger = opened(self.path)
        assert self.ledger.history.seq == before + (cut > start), "a repair is on record, and only a repair"
        self.own.clear()
        self.undo.clear()
        self.sizes = [self.path.stat().st_size]

    @invariant()
    def the_ledger_knows_what_was_spent(self) -> None:
        if hasattr(self, "ledger"):
            expected = merge([*self.charged, *self.reserved.values()])
            assert self.ledger.spent() == expected
            history = read(self.path)
            assert history.spent() == expected
            assert (history.seq, history.head) == (self.ledger.history.seq, self.ledger.history.head)

    def teardown(self) -> None:
        if hasattr(self, "ledger"):
            self.ledger.close_file()
            shutil.rmtree(self.folder)


LedgerMachine.TestCase.settings = settings(deadline=None, max_examples=15, stateful_step_count=15)
TestLedgerMachine = LedgerMachine.TestCase
