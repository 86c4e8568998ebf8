"""The process in which ciphertexts are parsed and added: ``python -m fedmedgan.server.worker N_BLOBS``.

SEAL is C++, and hospitals feed it what they like. So it runs here: a crash or a hang takes the sum of one attempt with
it, which the journal's stored updates give back, and never the coordinator; and all memory that SEAL does not return
goes with the attempt. The child is `cipher.AddOnly` and holds no key, no socket and no file.

A message over the pipes is a kind (1 byte), a count, and that many byte strings with their lengths:

    parent -> child   A  ciphertexts of one update     R  (none)
    child -> parent   A  (none): added                 R  ciphertexts of the sum      E  code and text of an error
"""

from __future__ import annotations

import os
import resource
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import IO

from fedmedgan.shared.errors import HINTS, CryptoError
from fedmedgan.shared.secure_sum import cipher

_ADD, _RESULT, _ERROR = b"A", b"R", b"E"
_COUNT = struct.Struct("<cI")
_LENGTH = struct.Struct("<I")
_LONGEST_ANSWER = 1 << 17
"""Of one byte string that the child sends; a ciphertext of a sum is 66 kB."""
_UNLIMITED = 1 << 32
"""What the parent sends is believed, and has been checked."""
SECONDS = 600.0
"""Longest time that one message may take; 20 MB are added in less than a second."""
# -P: a file called numpy.py in the working folder must not become our numpy.
_PROGRAM = ("-P", "-m", "fedmedgan.server.worker")


class WorkerSum:
    """`cipher.AddOnly` in a process of its own; close it, or use it as a context manager.

    Memory of this process does not grow with the number of updates. The child starts while the first update is waited
    for.

    | case | what happens |
    |---|---|
    | whatever `AddOnly` refuses | its error, with its code; the sum is what it was |
    | the child dies, hangs or talks nonsense | HE_WORKER, now and until `restart`; the sum is lost |
    | this process dies | the child reads the end of its input, and ends |

    Args:
        n_blobs: ciphertexts of one update.
        seconds: the child is ended when one message takes longer.

    Raises:
        CryptoError: HE_SHAPE, less than one ciphertext; HE_WORKER, the child cannot be started.
    """

    def __init__(self, n_blobs: int, seconds: float = SECONDS) -> None:
        if n_blobs < 1:
            raise CryptoError("HE_SHAPE", "a sum needs at least one ciphertext")
        self.n_blobs, self._seconds = n_blobs, seconds
        self._process: subprocess.Popen[bytes] | None = None
        self.restart()

    def restart(self) -> None:
        """End the child, if it still runs, and start one with an empty sum. Raises CryptoError HE_WORKER."""
        self.close()
        self.count = 0
        """Updates added so far."""
        try:
            self._process = subprocess.Popen(
                [sys.executable, *_PROGRAM, str(self.n_blobs)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
        except OSError as error:
            raise CryptoError("HE_WORKER", f"the process cannot be started ({error.strerror})") from None

    @property
    def pid(self) -> int | None:
        """Process id of the child, None where there is none."""
        return self._process.pid if self._process else None

    def add(self, blobs: Sequence[bytes]) -> None:
        """Add one update. Raises CryptoError: the codes of `AddOnly.add`, HE_WORKER."""
        self._ask(_ADD, blobs, 0)
        self.count += 1

    def result(self) -> list[bytes]:
        """The sum so far. Raises CryptoError: HE_CT_EMPTY, HE_WORKER."""
        return self._ask(_RESULT, (), self.n_blobs)

    def close(self) -> None:
        """End the child."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):  # what was not yet written cannot be written any more
                if pipe:
                    pipe.close()

    def __enter__(self) -> WorkerSum:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, kind: bytes, blobs: Sequence[bytes], expected: int) -> list[bytes]:
        """Send a message and read the answer, which holds `expected` byte strings."""
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise CryptoError("HE_WORKER", "the process that adds ciphertexts does not run")
        watchdog = threading.Timer(self._seconds, process.kill)
        watchdog.start()
        try:
            _send(process.stdin, kind, blobs)
            answer, parts = _receive(process.stdout, max(expected, 2), _LONGEST_ANSWER)
            if answer == _ERROR:
                error = _error(parts)
            elif answer == kind and len(parts) == expected:
                return parts
            else:
                raise ValueError("it answers what was not asked")
        except (OSError, EOFError, ValueError) as problem:
            self.close()
            why = f"exit code {process.returncode}" if isinstance(problem, OSError | EOFError) else str(problem)
            raise CryptoError("HE_WORKER", f"the process that adds ciphertexts failed ({why})") from None
        finally:
            watchdog.cancel()
        raise error


def _error(parts: list[bytes]) -> CryptoError:
    """The child's CryptoError. Raises ValueError where it is none."""
    try:
        code, what = (part.decode() for part in parts)
    except ValueError:
        code = what = ""
    if code not in HINTS or not code.startswith(("HE_", "ROUND_")):
        raise ValueError("its error is none of the sum's")
    return CryptoError(code, what[:200])


def _send(pipe: IO[bytes], kind: bytes, parts: Sequence[bytes]) -> None:
    pipe.write(_COUNT.pack(kind, len(parts)))
    for part in parts:
        pipe.write(_LENGTH.pack(len(part)))
        pipe.write(part)
    pipe.flush()


def _receive(pipe: IO[bytes], most: int, longest: int) -> tuple[bytes, list[bytes]]:
    """One message. Raises EOFError, the other side is gone; ValueError, it is larger than allowed."""
    kind, count = _COUNT.unpack(_exactly(pipe, _COUNT.size))
    if count > most:
        raise ValueError("its message has too many parts")
    parts = []
    for _ in range(count):
        (length,) = _LENGTH.unpack(_exactly(pipe, _LENGTH.size))
        if length > longest:
            raise ValueError("a part of its message is too long")
        parts.append(_exactly(pipe, length))
    return kind, parts


def _exactly(pipe: IO[bytes], size: int) -> bytes:
    data = pipe.read(size)
    if len(data) < size:
        raise EOFError
    return data


def serve(requests: IO[bytes], answers: IO[bytes], n_blobs: int) -> None:
    """The child: answer one message after the other. Raises EOFError when the parent is gone."""
    total = cipher.AddOnly(n_blobs)
    while True:
        kind, blobs = _receive(requests, _UNLIMITED, _UNLIMITED)
        try:
            if kind == _ADD:
                total.add(blobs)
                answer: list[bytes] = []
            else:
                answer = total.result()
        except CryptoError as error:
            kind, answer = _ERROR, [error.code.encode(), error.what.encode()]
        _send(answers, kind, answer)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its child itself
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what a library prints is not an answer
    with suppress(EOFError, BrokenPipeError):
        serve(sys.stdin.buffer, answers, int(sys.argv[1]))


if __name__ == "__main__":
    main()
