"""R9: 32 hospitals of 100,000 values on one server. R10: 10 million values, and payloads over the cap.

Hospitals and server are separate processes here, and the server is the real one: the same messages, `RoundSum`, and
SEAL in its worker. Its memory is that of its process and of its worker together, each at its own peak.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from faults.cohort import Cohort
from faults.figures import Figure, at_least
from fedmedgan.shared.errors import CryptoError, MessageError
from fedmedgan.shared.messages import Envelope, RoundOpen
from fedmedgan.shared.secure_sum import cipher

NAME = "load"
NOTES = [
    "R9: hospitals one after the other on one core, then the server, then every hospital opens the sum.",
    "R10: 4 hospitals of 10M values at 8 bits. The design reckoned with an update of 221 MB; 442 MB is twice that.",
    "R10_rss_over_payload: beside the packed and seeded 20 MB that really arrive. More than 2: the server holds",
    "R10_rss_over_payload: the update, its ciphertexts expanded to twice their size, the sum, and SEAL's pools.",
]
MANY, MANY_VALUES = 32, 100_000
FEW, LARGE_VALUES = 4, 10_000_000
SERVER = (sys.executable, str(Path(__file__).with_name("load_server.py")))
MIB = 1 << 20


def measure(size: float) -> list[Figure]:
    round = one_round(at_least(size, MANY, 3), at_least(size, MANY_VALUES, 10))
    large = one_round(at_least(size, FEW, 3), at_least(size, LARGE_VALUES, 10))
    return [
        Figure("R9_hospitals", round.hospitals, ">= 32"),
        Figure("R9_values", round.values, ">= 100000"),
        Figure("R9_seconds", round.seconds, "<= 120"),
        Figure("R9_server_seconds", round.server_seconds),
        Figure("R9_server_rss_mib", round.peak_mib, "<= 2048"),
        Figure("R9_wrong_values", round.wrong, "== 0"),
        Figure("R10_values", large.values, ">= 10000000"),
        Figure("R10_payload_mib", large.payload_mib),
        Figure("R10_rss_growth_mib", large.growth_mib, "<= 442"),
        Figure("R10_rss_over_payload", large.growth_mib / large.payload_mib),
        Figure("R10_rss_last_over_second", large.last_over_second, "<= 1.1"),
        Figure("R10_wrong_values", large.wrong, "== 0"),
        *over_the_cap(),
    ]


@dataclass(frozen=True)
class Round:
    """What one round took."""

    hospitals: int
    values: int
    seconds: float
    """All hospitals' work, the server's, and every hospital's opening of the sum, on one core."""
    server_seconds: float
    peak_mib: float
    """Server and worker together."""
    growth_mib: float
    """Peak over what both needed before the first update."""
    last_over_second: float
    """Peak after the last update over that after the second: 1 where memory does not grow with the hospitals."""
    payload_mib: float
    """One update."""
    wrong: int


def one_round(n_sites: int, n_values: int) -> Round:
    """Every hospital sends, the server adds, every hospital opens."""
    rng, cohort = np.random.default_rng([9, n_values]), Cohort([1] * n_sites, n_values, 8)
    opened, expected = cohort.open_round(), np.zeros(n_values, dtype=np.int64)
    with tempfile.TemporaryDirectory() as name:
        folder, seconds, payload = Path(name), 0.0, 0
        for site in range(n_sites):
            levels = cohort.levels(rng)
            expected += levels
            began = time.perf_counter()
            update = cohort.update(site, levels, opened)
            seconds += time.perf_counter() - began
            payload = len(update.payload)
            (folder / f"{site:03d}.update").write_bytes(update.to_bytes())
        told = serve(cohort, opened, folder)
        seconds += told["seconds"]
        blobs = (folder / "sum").read_bytes()
    began, wrong = time.perf_counter(), 0
    for _ in range(n_sites):
        wrong = int(np.count_nonzero(cohort.open_sum(cohort_sum(cohort, told, blobs)) != expected))
    seconds += time.perf_counter() - began
    peaks = told["peak_mib"]
    return Round(
        n_sites,
        n_values,
        seconds,
        told["seconds"],
        max(peaks),
        max(peaks) - peaks[0],
        peaks[-2] / peaks[2],
        payload / MIB,
        wrong,
    )


def serve(cohort: Cohort, opened: RoundOpen, folder: Path) -> dict:
    """Let a server process add the updates of a folder. Returns what it measured."""
    (folder / "study.json").write_bytes(cohort.study.canonical())
    (folder / "opened.json").write_bytes(opened.canonical())
    (folder / "parameters").write_text(str(cohort.plan.n_values))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*SERVER, str(folder)], capture_output=True, check=True, env=environment)
    return json.loads(run.stdout)


def cohort_sum(cohort: Cohort, told: dict, payload: bytes) -> Envelope:
    """The server's certificate, signed by the coordinator, whose key this process has and the server's has not."""
    return cohort.signed_certificate(told["certificate"].encode(), payload)


# ---- over the cap


def over_the_cap() -> list[Figure]:
    """Payloads that are too large, at the transport and, with a hospital's own signature, at the sum."""
    cohort = Cohort([1, 1, 1], 5000, 8)
    opened, cap = cohort.open_round(), cohort.max_payload()
    sizes = [cap + 1, cap + 4096, 2 * cap, 10 * cap, 100 * cap]
    taken = parsed = 0
    for size in sizes:
        envelope = cohort.signed_payload(0, bytes(size), opened)
        try:
            Envelope.from_record(envelope.to_record(), cap)
            taken += 1
        except MessageError as error:
            taken += error.code != "MSG_TOO_LARGE"
        adder = Counting(cohort.n_blobs)
        try:
            cohort.server(opened, adder).add(envelope)
            taken += 1
        except CryptoError:
            pass
        parsed += adder.asked
    return [
        Figure("R10_over_cap", 2 * len(sizes)),
        Figure("R10_over_cap_accepted", taken, "== 0"),
        Figure("R10_over_cap_parsed", parsed, "== 0"),
    ]


class Counting(cipher.AddOnly):
    """Counts how often SEAL was given anything."""

    asked = 0

    def add(self, blobs: list[bytes]) -> None:  # type: ignore[override]
        self.asked += 1
        super().add(blobs)
