"""The measuring of faults, at a small size: its figures hold, and are wrong when a protection is taken away."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedmedgan.client import checkpoint
from fedmedgan.shared.errors import CryptoError, FedMedGanError, MessageError, ModelError
from fedmedgan.shared.messages import Envelope, Update
from fedmedgan.shared.privacy import history as history_module
from fedmedgan.shared.secure_sum import cipher, keys, proof

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def faults():
    """The benchmark is a folder beside the package, not in it."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def ledger(faults):
    return faults("faults.ledger")


@pytest.fixture
def crypto(faults):
    return faults("faults.crypto")


@pytest.fixture
def messages(faults):
    return faults("faults.messages")


def value(figures, name: str):
    return next(figure.measured for figure in figures if figure.name == name)


def all_hold(figures) -> bool:
    """Nothing was lost, accepted or wrong; how much was tried is another matter."""
    return not [f.name for f in figures if f.holds is False and not f.threshold.startswith(">=")]


# ---- a ledger's writer


def test_nothing_is_lost_by_killed_writers_and_no_change_goes_unnoticed(ledger):
    figures = ledger.measure(0.001)
    assert all_hold(figures)
    assert value(figures, "R1_kills") == 4
    assert value(figures, "R4_flips") == 12


def test_a_writer_that_acknowledges_too_early_is_found_out(ledger, tmp_path):
    liar = "import os, time; os.write(1, b'\\ncharge 1 %s\\n' % (b'a' * 64)); time.sleep(60)"
    killed = ledger.kill_writers(2, tmp_path, command=(sys.executable, "-c", liar))
    assert killed.lost == killed.acknowledged["charge"] == killed.kills == 2


def test_a_ledger_that_trusts_its_lines_is_found_out(ledger, tmp_path, monkeypatch):
    monkeypatch.setattr(history_module, "verify", lambda raw, name: history_module.History())
    figures = ledger.change_bytes(0.001, tmp_path / "ledger.jsonl")
    assert value(figures, "R4_unnoticed") == value(figures, "R4_flips")
    assert value(figures, "R4_edits_unnoticed") == value(figures, "R4_edits")


def test_a_reader_that_takes_any_form_of_a_record_is_found_out(ledger, tmp_path, monkeypatch):
    """As a ledger whose chain is over parsed records, not over raw lines."""
    path = tmp_path / "ledger.jsonl"
    spaced = ledger.sample(path)[:-1] + b" \n"
    assert ledger._taken(path, spaced) is None
    monkeypatch.setattr(history_module, "decode", lambda line, where: json.loads(line)["body"])
    monkeypatch.setattr(history_module, "is_signed", lambda line, key: True)
    assert ledger._taken(path, spaced) is not None


# ---- sums


def test_sums_are_exact_and_every_manipulation_is_noticed(crypto):
    figures = crypto.measure(0.001)
    assert all_hold(figures)
    assert value(figures, "R12_kinds") >= 12
    assert value(figures, "R11_first_wrong_repeats") > 381
    assert value(figures, "R11_noise_budget_bits_100_copies") >= 1


def test_every_manipulation_is_another_one_than_the_honest_sum(crypto):
    """A kind that changes nothing would always be noticed or never."""
    cohort = crypto.Cohort([1] * crypto.N_SITES, crypto.N_VALUES, 8)
    case = crypto.Case(cohort, np.random.default_rng(1), masked=False)
    honest = case.certified(case.sum())
    for kind, manipulate in crypto.KINDS.items():
        made = manipulate(case)
        if not isinstance(made, Envelope):
            made = case.envelope(made) if isinstance(made, bytes) else case.certified(made)
        assert made != honest, kind


def test_without_the_proof_manipulations_go_unnoticed_and_the_figure_says_so(crypto, monkeypatch):
    def unchecked(total, *, n_sites, weights, mac_key):
        return total[: total.size - proof.extra_slots(n_sites)]

    monkeypatch.setattr(proof, "open_sum", unchecked)
    figures = crypto.manipulations(1)
    assert value(figures, "R12_honest_refused") == 0
    assert value(figures, "R12_unnoticed_one_added_to_a_weight") == 2
    assert value(figures, "R12_unnoticed_replay_of_another_round") == 2
    assert value(figures, "R12_unnoticed_a_certificate_of_a_stranger") == 0, "that is the work of signatures"


def test_a_receiver_that_refuses_everything_is_found_out(crypto, monkeypatch):
    def no(*_, **__):
        raise MessageError("MSG_FORMAT", "no")

    monkeypatch.setattr(proof, "open_sum", no)
    assert value(crypto.manipulations(1), "R12_honest_refused") == 2


def test_a_sum_that_is_off_by_one_is_found_out(crypto, monkeypatch):
    assert crypto.wrong_values(3, 8, 100, 0) == 0
    exact = proof.open_sum
    monkeypatch.setattr(proof, "open_sum", lambda *a, **k: exact(*a, **k) + np.eye(1, 25, dtype=np.int64)[0])
    assert crypto.wrong_values(3, 8, 100, 0) == 1


# ---- load


def test_load_and_caps(faults):
    figures = faults("faults.load").measure(0.001)
    assert all_hold(f for f in figures if f.name != "R10_rss_last_over_second"), "a small server's memory is noise"


def test_without_the_cap_a_large_payload_is_taken_and_the_figure_says_so(faults, monkeypatch):
    load = faults("faults.load")
    monkeypatch.setattr(load.Cohort, "max_payload", lambda cohort: 10)
    too_small = load.over_the_cap()
    assert value(too_small, "R10_over_cap_accepted") == 0
    monkeypatch.setattr(Envelope, "from_record", classmethod(lambda cls, record, cap: None))
    assert value(load.over_the_cap(), "R10_over_cap_accepted") == 5


# ---- messages


def test_every_receiver_refuses_mutated_messages(messages, monkeypatch):
    for receiver in messages.RECEIVERS:
        found = messages.in_process(receiver, 4 if receiver == "key_file_sealed" else 25)
        assert all(came.startswith("refused") for came in found), (receiver, found)
    assert set(messages.MESSAGES) == set(messages.RECEIVERS), "each receiver is measured"
    assert sum(messages.MESSAGES.values()) >= 20_000
    monkeypatch.setattr(messages, "MESSAGES", {"ledger_file": 20})
    figures = messages.measure(1)
    assert all_hold(figures) and value(figures, "R14_messages") == 20


def test_a_process_that_dies_is_a_crash_of_one_message_and_the_rest_is_still_sent(messages):
    child = (
        "import os, sys\n"
        "for number in range(int(sys.argv[2]), int(sys.argv[3])):\n"
        "    if number == 3: os.kill(os.getpid(), 11)\n"
        "    print(number, 'refused MSG_FORMAT', flush=True)\n"
    )
    found = messages.send("any", 7, command=(sys.executable, "-c", child))
    assert found == {"refused MSG_FORMAT": 6, "crash with -11": 1}


def test_without_signatures_mutated_messages_are_accepted_and_the_figure_says_so(messages, monkeypatch):
    monkeypatch.setattr(keys, "verify_hex", lambda *_: None)
    found = messages.in_process("update_at_server", 80)
    assert any(came.startswith("accepted") for came in found)


def test_without_its_hash_a_damaged_checkpoint_is_accepted_and_the_figure_says_so(messages, monkeypatch):
    def unchecked(path: Path) -> None:
        if len(path.read_bytes()) < 8:
            raise ModelError("MODEL_HASH", "cut", path.name)

    monkeypatch.setattr(checkpoint, "read", unchecked)
    assert any(came.startswith("accepted") for came in messages.in_process("model_file", 40))


def test_an_exception_that_is_not_ours_is_counted(messages, monkeypatch):
    monkeypatch.setattr(keys, "verify_hex", lambda *_: 1 / 0)
    assert any(came.startswith("untyped ZeroDivisionError") for came in messages.in_process("stored_update", 30))


# ---- what the measurement found, and what mends it


@pytest.fixture
def update(faults):
    """(cohort, an honest update)."""
    cohort = faults("faults.cohort").Cohort([1, 1, 1], 50)
    return cohort, cohort.update(0, np.zeros(50, dtype=np.int64), cohort.open_round())


@pytest.mark.parametrize("spell", [str.upper, lambda s: s[:2] + " " + s[2:], lambda s: s + " ", lambda s: " " + s])
def test_a_signature_has_one_spelling(update, spell):
    """An update with a capital digit was added to the sum and broke the server's certificate afterwards."""
    cohort, good = update
    total = cohort.server(cohort.open_round())
    with pytest.raises(MessageError, match="MSG_SIGNATURE"):
        total.add(good.model_copy(update={"signature": spell(good.signature)}))
    assert total.adder.count == 0
    assert good.open(Update, cohort.study).round == 1


def test_a_record_has_one_form(update):
    from flwr.app import Array, ArrayRecord, MetricRecord

    _, good = update
    part = next(iter(good.to_record().array_records["payload"].values()))

    def changed(**records):
        record = good.to_record()
        for name, content in records.items():
            record[name] = content
        return record

    def parts(**arrays):
        return changed(payload=ArrayRecord(arrays))

    assert Envelope.from_record(parts(**{"000000": part}), 1 << 20) == good
    for record in (
        changed(another=MetricRecord({"loss": 0.5})),
        parts(a=part),
        parts(**{"000000": part, "000001": Array("bytes", (0,), part.stype, b"")}),
        parts(**{f"{i:06d}": Array("bytes", (n,), part.stype, part.data[-n:]) for i, n in enumerate((10, 20))}),
        parts(**{"000001": part}),
        parts(**{"000000": part, "zz": Array("bytes", (0,), part.stype, b"")}),
        parts(**{"000000": Array("float64", part.shape, part.stype, part.data)}),
        parts(**{"000000": Array("bytes", (10**9, 10**9), part.stype, part.data)}),
        parts(**{"000000": Array("bytes", part.shape, "numpy.ndarray", part.data)}),
    ):
        with pytest.raises(MessageError, match="MSG_FORMAT"):
            Envelope.from_record(record, 1 << 20)


def test_only_coefficients_and_seeds_reach_the_parser(monkeypatch):
    """SEAL decompresses what says that it is compressed, and ends the process over some of that."""
    hospital = cipher.HospitalCipher(cipher.new_secret())
    seeded = hospital.encrypt(np.arange(cipher.RING_DEGREE))
    total = cipher.AddOnly(1)
    total.add(seeded)
    given = []
    monkeypatch.setattr(cipher._Scratch, "load", lambda scratch, item, data: given.append(data) or 1 / 0)
    for blob in (seeded[0], total.result()[0]):
        form = [*range(123), *(range(len(blob) - 81, len(blob) - 64) if len(blob) < 40_000 else ())]
        damaged = [blob[:i] + bytes([blob[i] ^ 1 << i % 8]) + blob[i + 1 :] for i in form]
        damaged += [blob[:-1], blob + b"\0", blob[:150] + b"\0" + blob[150:], b"", blob[:5] + b"\0" + blob[6:]]
        for raw in damaged:
            with pytest.raises(CryptoError, match="HE_PARAMS_MISMATCH"):
                cipher.AddOnly(1).add([raw])
    assert given == []
    with pytest.raises(ZeroDivisionError):
        cipher.AddOnly(1).add(seeded)


def test_every_byte_of_a_checkpoint_counts(tmp_path):
    """Spaces of its header and the notes too; and nested JSON is an error of ours."""
    path = tmp_path / "a.safetensors"
    checkpoint.write(path, {"weight": np.ones(3, dtype=np.float32)}, round=3, study="1a" * 32)
    good = path.read_bytes()
    assert checkpoint.read(path)[1] == {"round": 3, "study": "1a" * 32}
    size = int.from_bytes(good[:8], "little")
    header, rest = good[8 : 8 + size], good[8 + size :]
    damaged = [header + b" " * 8, header.replace(b'":', b'": ', 1), b"[" * 100_000]
    damaged += [header.replace(b'\\"round\\": 3', b'\\"round\\": 4')]
    assert header not in damaged
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(ModelError, match="MODEL_HASH"):
            checkpoint.read(path)
    for other in damaged:
        path.write_bytes(len(other).to_bytes(8, "little") + other + rest)
        with pytest.raises(ModelError, match="MODEL_HASH"):
            checkpoint.read(path)


# ---- the file of results


def test_figures_of_one_group_do_not_touch_those_of_another(faults, tmp_path, monkeypatch):
    results = faults("_results")
    monkeypatch.setattr(results, "FOLDER", tmp_path)

    def write(group: str, name: str, measured: int) -> dict:
        row = {"group": group, "figure": name, "measured": measured}
        how = {"command": "make bench-faults", "packages": ("numpy",), "keep_other": "group"}
        path = results.write("faults", rows=[row], figures={name: measured}, notes=[f"{group}: {name}"], **how)
        return json.loads(path.read_text())

    write("ledger", "R1_lost", 1)
    write("crypto", "R12_unnoticed", 0)
    data = write("ledger", "R1_kills", 5)
    assert data["figures"] == {"R12_unnoticed": 0, "R1_kills": 5}
    assert [row["figure"] for row in data["rows"]] == ["R12_unnoticed", "R1_kills"]
    assert data["notes"] == ["crypto: R12_unnoticed", "ledger: R1_kills"]
    monkeypatch.setattr(results, "machine", lambda: {"cpu": "another"})
    assert write("load", "R9_seconds", 2)["figures"] == {"R9_seconds": 2}, "figures of two machines are not one table"


def test_a_threshold_is_beside_its_figure(faults):
    figure = faults("faults.figures").Figure
    assert [figure("a", 3, t).holds for t in ("== 3", ">= 4", "<= 3", "")] == [True, False, True, None]
    assert figure("a", 3, "<= 2").row() == {"figure": "a", "measured": 3, "threshold": "<= 2", "holds": False}


def test_groups_are_found_by_name():
    run = subprocess.run([sys.executable, str(BENCHMARKS / "faults"), "--help"], capture_output=True, text=True)
    assert run.returncode == 0
    assert all(name in run.stdout for name in ("ledger", "crypto", "load", "messages"))


def test_our_errors_are_the_only_ones_that_count_as_refused(faults):
    outcome = faults("faults.receivers").outcome

    def refuse() -> bool:
        raise FedMedGanError("MSG_FORMAT", "no")

    assert outcome(refuse, "flip") == "refused MSG_FORMAT"
    assert outcome(lambda: True, "flip") == "accepted flip"
    assert outcome(lambda: False, "flip") == "refused harmless"
    assert outcome(lambda: bool(1 / 0), "flip").startswith("untyped ZeroDivisionError")
