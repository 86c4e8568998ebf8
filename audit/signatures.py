"""Is every record signed? An Ed25519 signature takes a tenth of a millisecond to check, so long ledgers take two cores.

Processes of their own, started by this program with nothing but lines and a key: a pool of `multiprocessing` would
import the caller's main module again, which takes longer than checking 10,000 signatures.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedmedgan.shared.errors import RunError
from fedmedgan.shared.privacy.records import DOMAIN

FEW = 4000
"""So many lines are checked in this process."""
MAX_PROCESSES = 8
_START, _MIDDLE, _END = b'{"body":', b',"signature":"', b'"}\n'


class Signatures:
    """Signatures of the lines of one ledger, being checked; ask for the result later.

    Args:
        lines: complete lines with their newline, in their order; nothing about them is taken for granted.
        key: 64 hex digits.
    """

    def __init__(self, lines: Sequence[bytes], key: str) -> None:
        self._lines, self._key = lines, key
        self._started: list[tuple[int, subprocess.Popen[bytes]]] = []
        if len(lines) > FEW:
            share = -(-len(lines) // min(MAX_PROCESSES, os.cpu_count() or 1))
            starts = range(0, len(lines), share)
            self._started = [(start, self._start(lines[start : start + share])) for start in starts]

    def first_unsigned(self) -> int | None:
        """Number of the first record, from 1, that the key did not sign; None if it signed all of them.

        Raises:
            RunError: RUN_CRASHED, a process that checked them ended.
        """
        if not self._started:
            return _first_unsigned(self._lines, self._key)
        first = None
        for start, process in self._started:
            answer, _ = process.communicate()
            if process.returncode:
                raise RunError("RUN_CRASHED", "a process that checked signatures ended", "audit")
            if first is None and answer.strip():
                first = start + int(answer)
        return first

    def give_up(self) -> None:
        """End the processes: nobody will ask."""
        for _, process in self._started:
            process.kill()
            process.communicate()

    def _start(self, lines: Sequence[bytes]) -> subprocess.Popen[bytes]:
        with tempfile.TemporaryFile() as file:
            file.writelines(lines)
            file.seek(0)
            command = [sys.executable, "-m", "fedmedgan.audit.signatures", self._key]
            return subprocess.Popen(command, stdin=file, stdout=subprocess.PIPE)


def _first_unsigned(lines: Iterable[bytes], key: str) -> int | None:
    try:
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))
    except ValueError:
        return 1
    return next((number for number, line in enumerate(lines, start=1) if not _is_signed(line, public)), None)


def _is_signed(line: bytes, public: Ed25519PublicKey) -> bool:
    """`records.is_signed` for lines whose form nobody has checked yet, and one key for all of them."""
    body, middle, signature = line[len(_START) : -145], line[-145:-131], line[-131:-3]
    if not (line.startswith(_START) and middle == _MIDDLE and line.endswith(_END)):
        return False
    try:
        public.verify(bytes.fromhex(signature.decode()), DOMAIN + body)
    except (InvalidSignature, ValueError):
        return False
    return True


def main() -> None:
    """Lines on standard input, the key as the argument; prints the number of the first that it did not sign."""
    found = _first_unsigned(iter(sys.stdin.buffer.readline, b""), sys.argv[1])
    if found is not None:
        print(found)


if __name__ == "__main__":
    main()
