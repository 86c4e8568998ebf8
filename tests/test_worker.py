"""SEAL in a process of its own: the same sum and the same errors, and its death is an error like any other."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest

from fedmedgan.server import worker
from fedmedgan.server.worker import WorkerSum
from fedmedgan.shared.errors import CryptoError
from fedmedgan.shared.secure_sum import cipher

N = 3


@pytest.fixture(scope="module")
def hospital():
    return cipher.HospitalCipher(cipher.new_secret())


@pytest.fixture(scope="module")
def uploads(hospital):
    rng = np.random.default_rng(0)
    return [hospital.encrypt(rng.integers(0, 1000, N * cipher.RING_DEGREE)) for _ in range(3)]


@pytest.fixture
def total():
    with WorkerSum(N) as total:
        yield total


def refused(call, *arguments) -> CryptoError:
    with pytest.raises(CryptoError) as caught:
        call(*arguments)
    return caught.value


def test_the_sum_is_that_of_add_only(total, uploads):
    plain = cipher.AddOnly(N)
    for count, upload in enumerate(uploads, 1):
        plain.add(upload)
        total.add(upload)
        assert total.count == plain.count == count
    assert total.result() == plain.result()
    assert total.n_blobs == plain.n_blobs == N


@pytest.mark.parametrize(
    "spoil",
    [
        lambda blobs: blobs[:-1],
        lambda blobs: [],
        lambda blobs: [*blobs, blobs[0]],
        lambda blobs: [*blobs[:-1], b""],
        lambda blobs: [*blobs[:-1], b"garbage" * 5000],
        lambda blobs: [*blobs[:-1], blobs[0][:-1000]],
        lambda blobs: [*blobs[:-1], b"\xff" * 100 + blobs[0][100:]],
        lambda blobs: [*blobs[:-1], cipher.new_secret()],
    ],
    ids=["fewer", "none", "more", "empty", "garbage", "cut", "header", "key"],
)
def test_refused_as_by_add_only_and_the_sum_is_what_it_was(total, uploads, spoil):
    plain = cipher.AddOnly(N)
    for adder in (plain, total):
        adder.add(uploads[0])
    bad = spoil(uploads[1])
    expected = refused(plain.add, bad)
    error = refused(total.add, bad)
    assert (error.code, error.what) == (expected.code, expected.what)
    for adder in (plain, total):
        adder.add(uploads[2])
    assert total.count == 2
    assert total.result() == plain.result()


def test_nothing_added(total):
    assert refused(total.result).code == "HE_CT_EMPTY"


@pytest.mark.parametrize("n_blobs", [0, -1])
def test_a_sum_of_nothing(n_blobs):
    assert refused(WorkerSum, n_blobs).code == "HE_SHAPE"


def test_its_death_is_an_error_until_restart(total, uploads):
    total.add(uploads[0])
    os.kill(total.pid, signal.SIGKILL)
    assert refused(total.add, uploads[1]).code == "HE_WORKER"
    assert refused(total.add, uploads[1]).code == "HE_WORKER"
    assert refused(total.result).code == "HE_WORKER"
    assert total.pid is None
    total.restart()
    assert total.count == 0
    assert refused(total.result).code == "HE_CT_EMPTY"
    total.add(uploads[1])
    plain = cipher.AddOnly(N)
    plain.add(uploads[1])
    assert total.result() == plain.result()


def test_a_crash_says_how(total, uploads):
    os.kill(total.pid, signal.SIGSEGV)
    assert "exit code -11" in refused(total.add, uploads[0]).what


def test_a_process_that_hangs_is_ended(uploads):
    with WorkerSum(N, seconds=0.5) as total:
        pid = total.pid
        os.kill(pid, signal.SIGSTOP)
        assert refused(total.add, uploads[0]).code == "HE_WORKER"
        assert not psutil.pid_exists(pid)


def answer(kind: bytes, *parts: bytes) -> bytes:
    return struct.pack("<cI", kind, len(parts)) + b"".join(struct.pack("<I", len(p)) + p for p in parts)


@pytest.mark.parametrize(
    "nonsense",
    [
        b"",
        b"A",
        b"hello, world",
        answer(b"Z"),
        answer(b"R", b"x", b"y"),
        answer(b"A", b"unasked"),
        answer(b"E", b"HE_UNHEARD_OF", b"what"),
        answer(b"E", b"BUDGET_EXHAUSTED", b"not its business"),
        answer(b"E", b"HE_SHAPE"),
        answer(b"E", b"\xff\xff", b"what"),
        struct.pack("<cI", b"A", 2**32 - 1),
        struct.pack("<cII", b"E", 1, 2**32 - 1),
    ],
)
def test_nonsense_from_the_process_is_not_believed(monkeypatch, uploads, nonsense):
    program = f"import sys; sys.stdout.buffer.write({nonsense!r}); sys.stdout.flush(); sys.stdin.buffer.read()"
    if len(nonsense) < 5:
        program = f"import sys; sys.stdout.buffer.write({nonsense!r})"
    monkeypatch.setattr(worker, "_PROGRAM", ("-IS", "-c", program))
    with WorkerSum(N, seconds=10) as total:
        error = refused(total.add, uploads[0])
        assert error.code == "HE_WORKER"
        assert ("exit code 0" in error.what) == (len(nonsense) < 5)  # it was ended for what it said, or had ended
        assert "exit code -9" not in error.what  # but not for taking too long
        assert total.pid is None


def test_a_process_that_cannot_be_started(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert refused(WorkerSum, N).code == "HE_WORKER"


def test_twenty_megabytes_and_the_memory_of_the_coordinator(hospital):
    one = hospital.encrypt(np.arange(cipher.RING_DEGREE))
    upload = one * 600
    assert sum(map(len, upload)) > 19_000_000
    me = psutil.Process()
    with WorkerSum(600) as total:
        total.add(upload)
        before = me.memory_info().rss
        for _ in range(5):
            total.add(upload)
        grown = me.memory_info().rss - before
        assert total.count == 6
        slots = hospital.decrypt(total.result()[-1:], cipher.RING_DEGREE)
    assert grown < 10_000_000
    np.testing.assert_array_equal(slots, 6 * np.arange(cipher.RING_DEGREE))


def test_nothing_is_left_behind(uploads):
    threads = threading.active_count()
    with WorkerSum(N) as total:
        total.add(uploads[0])
        pid, descriptors = total.pid, psutil.Process().num_fds()
        total.restart()
        assert psutil.Process().num_fds() == descriptors
        assert not psutil.pid_exists(pid)
        pid = total.pid
    total.close()
    assert not psutil.pid_exists(pid)
    assert refused(total.add, uploads[0]).code == "HE_WORKER"
    for _ in range(100):
        if threading.active_count() == threads:
            break
        time.sleep(0.01)
    assert threading.active_count() == threads


def test_the_process_ends_with_the_coordinator():
    program = (
        "import os; from fedmedgan.server.worker import WorkerSum;"
        "total = WorkerSum(1); print(total.pid, flush=True); os._exit(137)"
    )
    output = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=False).stdout
    pid = int(output)
    for _ in range(200):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return
        except psutil.NoSuchProcess:
            return
        time.sleep(0.05)
    pytest.fail("the process outlived the coordinator")


def test_the_process_imports_little():
    program = (
        "import sys; before = set(sys.modules); import fedmedgan.server.worker;"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    command = [sys.executable, "-P", "-c", program]
    loaded = set(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split())
    # pydantic comes with the study's limits, and is a third of the 0.4 s that a start takes
    assert {"fedmedgan", "tenseal", "numpy"} <= loaded
    assert not loaded & {"torch", "opacus", "flwr", "grpc", "cryptography", "sqlite3", "pydicom", "ray"}
