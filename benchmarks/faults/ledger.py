"""R1: a ledger's writer is killed at any moment. R4: a ledger is changed by any bit, line or cut.

R1 kills a process that writes a ledger with SIGKILL. After each kill every record that was acknowledged, since the
ledger was begun, must be in it: same number, same hash. That tests the death of a process, not a power loss.

R4 changes the bytes of a ledger. A flipped bit, a line left out, swapped or repeated must be refused. A prefix may be
an older ledger, which verifies by itself; then it must be shorter, which anchors show (R5).
"""

from __future__ import annotations

import fcntl
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from faults import ledger_writer
from faults.figures import Figure, at_least
from fedmedgan.shared.errors import PrivacyError
from fedmedgan.shared.privacy.events import TrainingSteps
from fedmedgan.shared.privacy.history import History, read

NAME = "ledger"
NOTES = [
    "R1: SIGKILL ends a process; what the disk would lose with its power is not tested.",
    "R4: a prefix that ends with a line is an older ledger and verifies alone; only its length and head tell.",
]
KILLS, MAX_SECONDS, KILLS_OF_ONE_LEDGER = 520, 0.5, 6
FLIPS, RECORDS = 12_000, 24
WRITERS = 2
WRITER = (sys.executable, str(Path(__file__).with_name("ledger_writer.py")))
_PIPE_BYTES = 1 << 20


def measure(size: float) -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        killed = kill_writers(at_least(size, KILLS, 2 * WRITERS), Path(folder))
        return [
            Figure("R1_kills", killed.kills, ">= 500"),
            Figure("R1_lost", killed.lost, "== 0"),
            Figure("R1_unverified", killed.unverified, "== 0"),
            Figure("R1_records", sum(killed.acknowledged.values())),
            Figure("R1_charges", killed.acknowledged["charge"]),
            Figure("R1_torn", killed.torn),
            *change_bytes(size, Path(folder) / "changed.jsonl"),
        ]


# ---- R1


@dataclass
class Killed:
    """What many kills did."""

    kills: int = 0
    lost: int = 0
    """Acknowledged records that were not in the ledger afterwards."""
    unverified: int = 0
    """Ledgers that did not verify after a kill."""
    torn: int = 0
    """Ledgers with an unfinished last line after a kill, which was never acknowledged."""
    acknowledged: Counter[str] = field(default_factory=Counter)
    """Acknowledged records by kind."""


def kill_writers(kills: int, folder: Path, command: Sequence[str] = WRITER) -> Killed:
    """Kill writers, two at a time on different ledgers, each 0 to 500 ms after it began."""
    found, chance, turn = Killed(), random.Random(), 0
    while found.kills < kills:
        paths = [folder / f"ledger-{turn}-{i}.jsonl" for i in range(WRITERS)]
        acknowledged: list[dict[int, str]] = [{} for _ in paths]
        for _ in range(KILLS_OF_ONE_LEDGER):
            for known, lines in zip(acknowledged, _write_until_killed(paths, command, chance), strict=True):
                for kind, seq, head in lines:
                    known[int(seq)] = head
                    found.acknowledged[kind] += 1
            for path, known in zip(paths, acknowledged, strict=True):
                _look(path, known, found)
            if found.kills >= kills:
                break
        turn += 1
    return found


def _write_until_killed(paths: list[Path], command: Sequence[str], chance: random.Random) -> list[list[list[str]]]:
    """The acknowledgements of one writer a path: kind, number and hash of each record."""
    writers = [subprocess.Popen([*command, str(path)], stdout=subprocess.PIPE, bufsize=0) for path in paths]
    deadlines = []
    for writer in writers:
        fcntl.fcntl(writer.stdout, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)  # nobody waits for us to read
        if writer.stdout.read(1) != b"\n":
            raise RuntimeError("the writer did not start")
        deadlines.append(time.monotonic() + chance.uniform(0, MAX_SECONDS))
    for deadline, writer in sorted(zip(deadlines, writers, strict=True), key=lambda pair: pair[0]):
        time.sleep(max(0.0, deadline - time.monotonic()))
        writer.kill()
    answers = []
    for writer in writers:
        said = writer.stdout.read()
        writer.stdout.close()
        if writer.wait() != -9:
            raise RuntimeError("the writer ended by itself")
        answers.append([line.decode().split() for line in said.splitlines(keepends=True) if line.endswith(b"\n")])
    return answers


def _look(path: Path, known: dict[int, str], found: Killed) -> None:
    """Is everything there that was acknowledged?"""
    found.kills += 1
    try:
        history = read(path) if path.exists() else History()
    except PrivacyError:
        found.unverified += 1
        history = History()
    found.torn += history.torn_bytes > 0
    written = {record.seq: record.line_sha256 for record in history.records}
    found.lost += sum(written.get(seq) != head for seq, head in known.items())


# ---- R4


def change_bytes(size: float, path: Path) -> list[Figure]:
    """Every way to change a ledger of all kinds of records, and what a reader says to it."""
    raw = sample(path)
    whole, chance = read(path), random.Random(4)
    places = chance.sample(range(8 * len(raw)), at_least(size, FLIPS))
    flipped = (_flip(raw, place) for place in places)
    prefixes = [raw[:cut] for cut in chance.sample(range(len(raw)), at_least(size, len(raw)))]
    older = [history for prefix in prefixes if (history := _taken(path, prefix)) is not None]
    unnoticed = sum(not is_older(history, whole) for history in older)
    edits = list(_edits(raw))
    edits = chance.sample(edits, at_least(size, len(edits)))
    return [
        Figure("R4_flips", len(places), ">= 10000"),
        Figure("R4_unnoticed", sum(_taken(path, data) is not None for data in flipped), "== 0"),
        Figure("R4_prefixes", len(prefixes)),
        Figure("R4_prefixes_unnoticed", unnoticed, "== 0"),
        Figure("R4_prefixes_left_to_anchors", len(older)),
        Figure("R4_edits", len(edits)),
        Figure("R4_edits_unnoticed", sum(_taken(path, data) is not None for data in edits), "== 0"),
    ]


def sample(path: Path) -> bytes:
    """A ledger with records of every kind."""
    first, other = "a" * 64, "b" * 64
    path.unlink(missing_ok=True)
    with ledger_writer.begin(path) as ledger:
        ledger.open_study(other, ledger_writer.terms(1e-5))
        ledger.void(ledger.reserve(other, 1, [TrainingSteps(1.3, 0.02, 5)]), "the folder could not be read")
        ledger.close_study(other)
    with path.open("ab") as file:
        file.write(b'{"body":{"')  # a torn write, so that there is a repair on record
    with ledger_writer.begin(path) as ledger:
        ledger.open_study(first, ledger_writer.terms(1e-4))
        while ledger.history.seq < RECORDS:
            seq = ledger.reserve(first, ledger.history.seq, [TrainingSteps(1.1, 0.05, 30), TrainingSteps(2.0, 0.1, 7)])
            ledger.charge(seq, 30, 7, **ledger_writer.PROOF)
            ledger.release(
                first, round=ledger.history.records[seq - 1].body["round"], attempt=1, sha256="f" * 64, size=9
            )
    return path.read_bytes()


def _taken(path: Path, data: bytes) -> History | None:
    """What a reader makes of these bytes; None if it refuses them."""
    path.write_bytes(data)
    try:
        return read(path)
    except PrivacyError:
        return None


def is_older(history: History, whole: History) -> bool:
    """Whether this is an honest beginning of the whole ledger, and shorter."""
    if history.seq >= whole.seq:
        return False
    return history.seq == 0 or history.head == whole.records[history.seq - 1].line_sha256


def _flip(raw: bytes, place: int) -> bytes:
    changed = bytearray(raw)
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


def _edits(raw: bytes) -> Iterator[bytes]:
    """Lines left out, swapped, repeated, moved. To leave out the last lines is a prefix, and not here."""
    lines = raw.splitlines(keepends=True)
    n = len(lines)
    for i in range(n):
        if i < n - 1:
            yield b"".join(lines[:i] + lines[i + 1 :])
        for j in range(i + 1, n):
            swapped = list(lines)
            swapped[i], swapped[j] = lines[j], lines[i]
            yield b"".join(swapped)
        for j in range(n + 1):
            yield b"".join([*lines[:j], lines[i], *lines[j:]])
    yield b"".join(reversed(lines))
    yield b"\n" + raw
    yield raw + b"\n"
    yield raw + raw
    yield raw.replace(b"\n", b"\r\n")
