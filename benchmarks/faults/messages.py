"""R14: 20,000 mutated messages and files, to everybody who takes any: none crashes, none is accepted."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from faults.figures import Figure, at_least
from faults.receivers import RECEIVERS, outcomes

NAME = "messages"
NOTES = [
    "R14: each receiver in a process of its own, 60 s and 8 GiB for a message; what ends the process is a crash.",
    "R14: an insider signs what it mutated. That counts as accepted only if a wrong sum comes out of it, because the",
    "R14: low bits of a ciphertext are noise, and other noise is no other number.",
    "R14_untyped: exceptions that are none of ours; they would end one answer, not the process.",
]
MESSAGES = {
    "update_at_server": 5000,
    "update_of_insider": 2000,
    "certificate_at_hospital": 4000,
    "sum_of_insider": 2000,
    "stored_update": 2000,
    "wrapped_key": 1000,
    "wrapped_key_of_insider": 500,
    "key_file_plain": 1000,
    "key_file_sealed": 200,
    "model_file": 2500,
    "ledger_file": 2000,
}
MESSAGES_OF_ONE_PROCESS = 500
"""Each process makes its own keys, and so other ciphertexts: what a parser does to damage may depend on them."""
CHILD = (sys.executable, str(Path(__file__).with_name("receivers.py")))
MAX_CRASHES = 20


def measure(size: float) -> list[Figure]:
    found: Counter[str] = Counter()
    for receiver, count in MESSAGES.items():
        came = send(receiver, at_least(size, count))
        found.update(came)
        for bad in sorted(kind for kind in came if not kind.startswith("refused")):
            print(f"{receiver}: {bad} ({came[bad]})", file=sys.stderr)
    return [
        Figure("R14_receivers", len(RECEIVERS)),
        Figure("R14_messages", found.total(), ">= 20000"),
        Figure("R14_crashes", _sum(found, "crash"), "== 0"),
        Figure("R14_accepted", _sum(found, "accepted"), "== 0"),
        Figure("R14_untyped", _sum(found, "untyped"), "== 0"),
        Figure("R14_codes", sum(kind.startswith("refused") for kind in found)),
    ]


def send(receiver: str, count: int, command: Sequence[str] = CHILD) -> Counter[str]:
    """What came of that many messages. A process that dies is a crash of the message after its last word."""
    found, start = Counter[str](), 0
    while start < count:
        stop = min(count, start + MESSAGES_OF_ONE_PROCESS)
        child = subprocess.Popen(
            [*command, receiver, str(start), str(stop)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        with child:
            for line in child.stdout or ():
                number, came = line.rstrip("\n").split(" ", 1)
                found[came] += 1
                start = int(number) + 1
        if start < stop:
            found[f"crash with {child.returncode}"] += 1
            start += 1
            if _sum(found, "crash") >= MAX_CRASHES:
                break
    return found


def in_process(receiver: str, count: int) -> Counter[str]:
    """The same without a process, to see what comes of it when a protection is taken away."""
    return Counter(came for _, came in outcomes(receiver, 0, count))


def _sum(found: Counter[str], kind: str) -> int:
    return sum(count for came, count in found.items() if came.startswith(kind))
