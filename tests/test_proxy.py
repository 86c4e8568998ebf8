"""The proxy of the network faults, in front of a TLS server: each fault does what it says, and TLS notices."""

from __future__ import annotations

import importlib
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from real_flower import make_kits

from fedmedgan.simulations.ports import free_port

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MESSAGE = b"x" * 40_000


@pytest.fixture(scope="module")
def proxy():
    """The benchmark is a folder beside the package, not in it."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("faults.proxy")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def kit(tmp_path_factory) -> Path:
    return make_kits(tmp_path_factory.mktemp("kits"), port=1024, superlink_port=1024)


@pytest.fixture(scope="module")
def echo(kit) -> Iterator[int]:
    """Port of a TLS server that sends each message back, as a whole, as a server of HTTP does."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(kit / "server.crt", kit / "server.key")
    with serving(lambda raw: context.wrap_socket(raw, server_side=True)) as port:
        yield port


@contextmanager
def serving(wrap: Callable[[socket.socket], socket.socket]) -> Iterator[int]:
    listener = socket.create_server(("127.0.0.1", 0))

    def answer(raw: socket.socket) -> None:
        try:
            with raw, wrap(raw) as stream:
                while True:
                    stream.sendall(receive(stream, len(MESSAGE)))
        except OSError:  # ends, resets, and what TLS does not accept
            pass

    def serve() -> None:
        while True:
            try:
                raw, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(raw,), daemon=True).start()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


def receive(stream: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        data = stream.recv(1 << 16)
        if not data:
            raise ConnectionError("the connection was closed")
        received += data
    return received


@contextmanager
def connected(kit: Path, port: int) -> Iterator[ssl.SSLSocket]:
    context = ssl.create_default_context(cafile=str(kit / "ca.crt"))
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as raw,
        context.wrap_socket(raw, server_hostname="127.0.0.1", suppress_ragged_eofs=False) as tls,
    ):
        yield tls


def ask(stream: socket.socket) -> bytes:
    stream.sendall(MESSAGE)
    return receive(stream, len(MESSAGE))


def ask_twice(kit: Path, port: int) -> bytes:
    """A chunk that came twice is noticed when the next answer is read."""
    with connected(kit, port) as tls:
        return ask(tls) and ask(tls)


def test_without_a_fault_every_byte_arrives(proxy, kit, echo):
    with proxy.Proxy(free_port(), echo, lambda number: "") as between:
        assert ask_twice(kit, between.port) == MESSAGE
    assert between.connections == 1
    assert not between.faults


def test_a_delay_is_paid_in_each_direction(proxy, kit, echo):
    with proxy.Proxy(free_port(), echo, lambda number: "", delay=0.1) as between, connected(kit, between.port) as tls:
        for _ in range(2):
            began = time.monotonic()
            ask(tls)
            assert 0.2 <= time.monotonic() - began < 5


def test_a_cut_resets_the_connection_and_leaves_the_next_one_alone(proxy, kit, echo):
    with proxy.Proxy(free_port(), echo, lambda number: "cut" if number == 1 else "") as between:
        with pytest.raises(OSError):
            ask_twice(kit, between.port)
        assert ask_twice(kit, between.port) == MESSAGE
    assert [(fault.kind, fault.connection) for fault in between.faults] == [("cut", 1)]


@pytest.mark.parametrize("kind", ["corrupt", "replay"])
def test_tls_refuses_a_changed_byte_and_a_chunk_that_comes_twice(proxy, kit, echo, kind):
    connections = 6  # spoiled in either direction, by chance
    with proxy.Proxy(free_port(), echo, lambda number: kind) as between:
        for _ in range(connections):
            with pytest.raises(OSError):
                ask_twice(kit, between.port)
    assert [fault.kind for fault in between.faults] == [kind] * connections
    assert not [fault for fault in between.faults if fault.accepted]


def test_without_tls_a_spoiled_chunk_is_accepted_and_the_proxy_says_so(proxy):
    with serving(lambda raw: raw) as port, proxy.Proxy(free_port(), port, lambda number: "corrupt") as between:
        for _ in range(4):
            with socket.create_connection(("127.0.0.1", between.port), timeout=10) as raw:
                for _ in range(3):
                    ask(raw)
    assert [fault.accepted for fault in between.faults] == [True] * 4


def test_a_partition_lets_nothing_through_and_loses_nothing(proxy, kit, echo):
    with proxy.Proxy(free_port(), echo, lambda number: "") as between:
        with connected(kit, between.port) as tls:
            between.partition(0.6)
            began = time.monotonic()
            assert ask(tls) == MESSAGE
            assert 0.6 <= time.monotonic() - began < 5
        between.partition(0.4)
        began = time.monotonic()
        with connected(kit, between.port):  # a new connection is not answered either
            assert time.monotonic() - began >= 0.4
    assert [fault.kind for fault in between.faults] == ["partition", "partition"]


# ---- the study behind the proxy: what is made of its logs and times


@pytest.fixture(scope="module")
def network(proxy):
    return importlib.import_module("faults.network")


def test_every_third_connection_is_cut_and_few_others_are_spoiled(network):
    kinds = [network.fault_of(number) for number in range(1, 181)]
    assert [kind == "cut" for kind in kinds] == [number % 3 == 0 for number in range(1, 181)]
    assert kinds.count("corrupt") == kinds.count("replay") == 180 // network.SPOIL_EVERY


def test_a_recovery_lasts_from_a_fault_to_the_next_round(network, proxy):
    faults = [proxy.Fault("cut", at, 1) for at in (1.0, 5.0, 9.0, 50.0)]
    assert network.recovery(faults, [3.0, 10.0, 12.0]) == [2.0, 5.0, 1.0]  # nothing was completed after the last


def test_errors_of_an_unknown_kind_are_told_from_those_that_the_faults_cause(network):
    log = """INFO :      Received successfully
\x1b[91mERROR \x1b[0m:     SSL/TLS handshake error detected.
ERROR :     Exit Code: 305

Failed to initialize the connection to the SuperLink.
[SSL: DECRYPTION_FAILED_OR_BAD_RECORD_MAC] decryption failed or bad record mac (_ssl.c:2580)
ERROR :     database is locked
Traceback (most recent call last):
  File "x.py", line 1, in <module>
ZeroDivisionError: division by zero
error[LEDGER_FORK]: the ledger is another one
"""
    assert [line for line in network.complaints(log) if not network.expected(line)] == [
        "ERROR :     database is locked",
        "ZeroDivisionError: division by zero",
        "error[LEDGER_FORK]: the ledger is another one",
    ]
