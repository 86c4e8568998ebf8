"""A TCP proxy that misbehaves: delays, cuts, changes a byte, sends a chunk twice, or lets nothing through for a while.

It runs in a thread of its own and sees only what a network sees. Its faults are written down with their times. Of a
chunk that it spoiled it also notes what the receiver still sent on that connection: more than an alert means that TLS
took it.

fault     what happens to the connection
cut       reset on both sides after some bytes
corrupt   one bit of the last byte of a chunk is flipped, once, after the handshake
replay    a chunk is sent twice, once, after the handshake
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

CHUNK = 1 << 16
HANDSHAKE_BYTES = 1500
"""A direction that has carried so many is past the handshake, of which TLS ignores a few bytes (record versions)."""
ALERT_BYTES = 1000
"""An alert is smaller, even with the session tickets that a server sends after the handshake: 510 bytes."""
Late = asyncio.Queue[tuple[float, bytes]]
"""Chunks with the time when they are due; an empty one is the end of the stream."""
CUT_BYTES = 20_000
"""A connection is cut somewhere before."""


@dataclass
class Fault:
    """What was done, when, and to which connection."""

    kind: str
    at: float
    """Unix time."""
    connection: int
    further: bool = False
    """Whether another chunk followed the spoiled one. Before, the receiver may be answering what came whole."""
    answered: int = 0
    """Bytes that the receiver of a spoiled chunk sent after that."""

    @property
    def accepted(self) -> bool:
        """Whether the receiver went on as if nothing had happened."""
        return self.kind in ("corrupt", "replay") and self.answered > ALERT_BYTES


class _Connection:
    """Both directions of one connection, and the one fault that it gets."""

    def __init__(self, number: int, kind: str, chance: random.Random) -> None:
        self.number, self.kind, self.carried = number, kind, 0
        self.cut_after = chance.randrange(1, CUT_BYTES)
        self.upwards = chance.random() < 0.5  # the direction that is spoiled
        self.fault: Fault | None = None
        self.writers: list[asyncio.StreamWriter] = []

    def reset(self) -> None:
        """Neither side gets an end of the stream: both get a reset, as from a firewall that forgot the connection."""
        for writer in self.writers:
            raw = writer.get_extra_info("socket")
            if raw is not None and raw.fileno() >= 0:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()


class Proxy:
    """A proxy on loopback: ``with Proxy(port, target_port, fault_of=...) as proxy: ...``.

    Args:
        port: where it listens. target_port: where it connects to.
        fault_of: number of a connection, from 1 -> ``cut``, ``corrupt``, ``replay`` or "".
        delay: seconds by which each direction is late.
    """

    def __init__(self, port: int, target_port: int, fault_of: Callable[[int], str], delay: float = 0.0) -> None:
        self.port, self.target_port, self.fault_of, self.delay = port, target_port, fault_of, delay
        self.connections, self.faults = 0, list[Fault]()
        self._chance, self._shut_until = random.Random(1), 0.0
        self._serving = set[asyncio.Task[None] | None]()  # asyncio itself holds a half-closed connection only weakly
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        starting = asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self._server = asyncio.run_coroutine_threadsafe(starting, self._loop).result(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def partition(self, seconds: float) -> None:
        """From now on not a byte passes, for so long; what was sent meanwhile comes late, as TCP would have it."""
        self._shut_until = time.monotonic() + seconds
        self.faults.append(Fault("partition", time.time(), 0))

    async def _stop(self) -> None:
        self._server.close()
        await asyncio.sleep(0)  # what was accepted in this turn of the loop is a task in the next
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
        await asyncio.sleep(0)  # transports close in the next turn of the loop

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        connection = _Connection(self.connections, self.fault_of(self.connections), self._chance)
        connection.writers.append(writer)
        self._serving.add(asyncio.current_task())
        try:
            target_reader, target_writer = await asyncio.open_connection("127.0.0.1", self.target_port)
            connection.writers.append(target_writer)
            async with asyncio.TaskGroup() as tasks:
                for source, sink, upwards in ((reader, target_writer, True), (target_reader, writer, False)):
                    late: Late = asyncio.Queue(maxsize=64)
                    tasks.create_task(self._read(connection, source, late, upwards))
                    tasks.create_task(self._write(connection, late, sink, upwards))
        except* OSError:
            connection.reset()
        except* asyncio.CancelledError:  # the proxy is being stopped
            connection.reset()
        finally:
            for end in connection.writers:
                end.close()
            self._serving.discard(asyncio.current_task())

    async def _read(self, connection: _Connection, source: asyncio.StreamReader, late: Late, upwards: bool) -> None:
        """Chunks are read at once, and are written when their time has come."""
        chunk = b"first"
        while chunk:
            chunk = await source.read(CHUNK)
            if connection.fault and connection.fault.further and upwards != connection.upwards:
                connection.fault.answered += len(chunk)
            await late.put((time.monotonic() + self.delay, chunk))

    async def _write(self, connection: _Connection, late: Late, sink: asyncio.StreamWriter, upwards: bool) -> None:
        passed = 0
        while True:
            due, chunk = await late.get()
            while (wait := max(due, self._shut_until) - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            if not chunk:
                sink.write_eof()
                return
            passed, connection.carried = passed + len(chunk), connection.carried + len(chunk)
            if connection.kind == "cut" and connection.carried > connection.cut_after:
                if not connection.fault:  # the other direction may have got here in the same turn of the loop
                    self._note(connection)
                raise ConnectionResetError
            if upwards == connection.upwards and passed > HANDSHAKE_BYTES:
                chunk = self._spoil(connection, chunk)
            sink.write(chunk)
            await sink.drain()

    def _spoil(self, connection: _Connection, chunk: bytes) -> bytes:
        if connection.kind not in ("corrupt", "replay"):
            return chunk
        if connection.fault:
            connection.fault.further = True
            return chunk
        self._note(connection)
        return chunk + chunk if connection.kind == "replay" else chunk[:-1] + bytes([chunk[-1] ^ 1])

    def _note(self, connection: _Connection) -> None:
        connection.fault = Fault(connection.kind, time.time(), connection.number)
        self.faults.append(connection.fault)
