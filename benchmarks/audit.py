"""How fast the ledger is written and checked, what an epsilon costs, and what the proof of the noise costs.

    make bench-audit

figure                what is measured
ledger_append_ms_p50  one signed record with its fsync, in a ledger of 1,000 records, on this machine's disk
verify_100k_s         100,000 records: form, chain, order, every signature and all else that `audit verify` looks at
epsilon_500_rounds_s  the larger of PLD and PRV for one hospital after 500 rounds, in a fresh process, imports excluded
noise_test_share      the witness of a private step over the whole step, built-in study, steps in turn
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from _results import write
from faults import ledger_writer
from rich.console import Console

from fedmedgan.audit import verify as auditor
from fedmedgan.audit.evidence import gather
from fedmedgan.cli.study import read_study
from fedmedgan.client.data.outcomes import FolderReport
from fedmedgan.client.data.patients import PatientImages
from fedmedgan.client.gans import recipe
from fedmedgan.client.training.local_round import LocalTrainer, PatientSampler
from fedmedgan.client.training.randomness import SystemRandom
from fedmedgan.client.training.witness import NoWitness
from fedmedgan.shared.privacy.events import TrainingSteps
from fedmedgan.shared.study import Study, from_dict

APPENDS, RECORDS, ROUNDS, STEPS = 400, 100_000, 500, 30
EPSILON = """
import time
from fedmedgan.client.training.accountant import epsilon_prv
from fedmedgan.shared.privacy.accounting import epsilon_pld
from fedmedgan.shared.privacy.events import TrainingSteps
import opacus.accountants
events = [TrainingSteps({sigma}, {rate}, {steps})]
began = time.perf_counter()
epsilon = max(epsilon_pld(events, 1e-5), epsilon_prv(events, 1e-5))
print(time.perf_counter() - began, epsilon)
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        rows = [append(Path(scratch) / "ledger.jsonl"), verify(Path(scratch) / "long.jsonl"), epsilon()]
    study = read_study(None)
    rows += [witness("built-in", study)]
    rows += [witness(f"{size} pixels", resized(study, size, batch)) for size, batch in ((28, 64), (64, 128))]
    figures = {
        "ledger_append_ms_p50": rows[0]["p50_ms"],
        "verify_100k_s": rows[1]["seconds"],
        "epsilon_500_rounds_s": rows[2]["seconds"],
        "noise_test_share": rows[3]["share"],
        "noise_test_share_28_b64": rows[4]["share"],
        "noise_test_share_64_b128": rows[5]["share"],
    }
    console = Console()
    for row in rows:
        console.print(row)
    console.print(figures)
    write(
        "audit",
        command="make bench-audit",
        packages=("fedmedgan", "cryptography", "dp-accounting", "opacus", "torch"),
        rows=rows,
        figures=figures,
        notes=[
            "append: signed, written and fsynced, in a temporary folder on the machine's disk",
            "verify: every signature, on all cores; the ledger has all kinds of records of a long study",
            f"epsilon: PLD and PRV of {ROUNDS} rounds of 20 steps, q = 0.05, delta = 1e-5, nothing cached",
            "witness: 20th percentile of steps with and without it in turn, same process; share = 1 - without / with",
        ],
    )


def append(path: Path) -> dict:
    """Charges of one study, each timed alone."""
    seconds = []
    with ledger_writer.begin(path) as ledger:
        ledger.open_study(ledger_writer.STUDY, ledger_writer.terms(1e-4))
        while len(seconds) < APPENDS:
            reservation = ledger.reserve(ledger_writer.STUDY, 1, [TrainingSteps(1.1, 0.05, 30)])
            began = time.perf_counter()
            ledger.charge(reservation, 30, **ledger_writer.PROOF)
            seconds.append(time.perf_counter() - began)
    p50, p99 = (1000 * float(p) for p in np.percentile(seconds, (50, 99)))
    return {"what": "append", "records": APPENDS, "p50_ms": p50, "p99_ms": p99}


def verify(path: Path) -> dict:
    """A ledger of many rounds, written without fsync, and read as an auditor reads it."""
    raw = long_ledger(path)
    began = time.perf_counter()
    verdicts = {finding.check: finding.verdict for finding in auditor.verify(gather(path))}
    seconds = time.perf_counter() - began
    if (verdicts["chain"], verdicts["signatures"]) != ("passed", "passed"):
        raise RuntimeError("the long ledger does not verify")
    return {"what": "verify", "records": RECORDS, "megabytes": len(raw) / 1e6, "seconds": seconds}


def long_ledger(path: Path) -> bytes:
    """RECORDS records of one study: reserve, charge, release, anchor."""
    with patch.object(os, "fsync"), ledger_writer.begin(path) as ledger:
        study = ledger_writer.STUDY
        ledger.open_study(study, ledger_writer.terms(1e-4))
        number = 0
        heads = {f"{i:064x}": (i + 1, f"{i:064x}") for i in range(5)}
        while ledger.history.seq <= RECORDS - 4:
            number += 1
            reservation = ledger.reserve(study, number, [TrainingSteps(1.1, 0.05, 1)])
            ledger.charge(reservation, 1, **ledger_writer.PROOF)
            ledger.release(study, round=number, attempt=1, sha256="f" * 64, size=9)
            ledger.anchor(study, round=number, certificate="b" * 64, heads=heads)
        while ledger.history.seq < RECORDS:
            number += 1
            ledger.reserve(study, number, [TrainingSteps(1.1, 0.05, 1)])
    return path.read_bytes()


def epsilon() -> dict:
    """In a process of its own: both accountants remember what they were asked before."""
    code = EPSILON.format(sigma=3.0, rate=0.05, steps=ROUNDS * 20)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, value = map(float, done.stdout.split())
    return {"what": "epsilon", "rounds": ROUNDS, "steps": ROUNDS * 20, "seconds": seconds, "epsilon": value}


def witness(name: str, study: Study) -> dict:
    """Steps with and without the witness, in turn: the machine's other work meets both."""
    torch.set_num_threads(1)
    trainers = [trainer(study, watched) for watched in (True, False)]
    seconds: list[list[float]] = [[], []]
    for turn in range(STEPS + 2):
        for side, one in enumerate(trainers):
            began = time.perf_counter()
            one._discriminator_step()
            if turn >= 2:
                seconds[side].append(time.perf_counter() - began)
    watched, bare = (float(np.percentile(side, 20)) for side in seconds)
    row = {"what": "witness", "study": name, "watched_ms": watched * 1e3, "bare_ms": bare * 1e3}
    weights = sum(p.numel() for p in trainers[0].discriminator.parameters())
    row |= {"patients_per_step": study.training.patients_per_step, "weights": weights}
    return row | {"share": 1 - bare / watched}


def trainer(study: Study, watched: bool) -> LocalTrainer:
    n, size, rate = 4 * study.training.patients_per_step, study.images.size, 0.25
    images = np.random.default_rng(0).uniform(-1, 1, (n, 1, size, size)).astype(np.float16)
    names = tuple(f"{i:032x}" for i in range(n))
    patients = PatientImages(images, np.zeros(n, np.int64), np.arange(n), n, FolderReport((), n, n), names)
    random = SystemRandom()
    return LocalTrainer(
        study,
        *recipe.load(study).networks(),
        PatientSampler(patients, rate, random),
        noise_multiplier=1.0,
        random=random,
        device=torch.device("cpu"),
        witness=None if watched else NoWitness(),
    )


def resized(study: Study, size: int, batch: int) -> Study:
    values = study.model_dump()
    values["images"]["size"] = size
    values["training"]["patients_per_step"] = batch
    values["sites"] = [{**site, "patients": 10 * batch} for site in values["sites"]]
    return from_dict(values)


if __name__ == "__main__":
    main()
