"""Studies that are disturbed: processes that die at each crash point, at random moments, hospitals that drop out.

Real hospitals, real training, real ciphertexts, real journal; a process a message, forked instead of started by Flower
(figures over Flower's own processes: network.py). Noise is seeded here, so that an undisturbed run has one outcome.

R2  each crash point of a hospital, three times: invariants I1 to I8 (invariants.py), and the study ends
R3  each crash point of the coordinator, three times: the study goes on and ends with the undisturbed run's model
R6  5 hospitals, 30 rounds, each absent with a chance of 0.2: every sum equals the sum of the plaintext integers
R8  20 times SIGKILL for the coordinator at a random moment
"""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from flwr.app import Message

from faults.figures import Figure, at_least
from faults.invariants import violations
from faults.process_grid import ProcessGrid, random_drops
from fedmedgan.client import checkpoint
from fedmedgan.client.cycle import Hospital
from fedmedgan.client.training.accountant import ENFORCED
from fedmedgan.server import app as server
from fedmedgan.server.journal import Journal
from fedmedgan.shared import crash
from fedmedgan.shared.messages import Certificate, Envelope, parse
from fedmedgan.shared.privacy.events import TrainingSteps
from fedmedgan.shared.privacy.history import read as read_ledger
from fedmedgan.shared.secure_sum import keys
from fedmedgan.shared.study import MIN_SITES, Study, from_dict
from fedmedgan.simulations import consortium

NAME = "protocol"
NOTES = [
    "real hospitals and coordinator, a forked process a message, one machine; seeded noise",
    "R8_resume_s: from the start of the new coordinator to its first event of a round",
]
SEED = 7
REPEATS = 3
CLIENT = tuple(name for name in crash.CRASH_POINTS if name.startswith("client."))
SERVER = tuple(name for name in crash.CRASH_POINTS if name.startswith("server."))


def measure(size: float) -> list[Figure]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        return [
            *crash_points(Path(scratch) / "crash", at_least(size, REPEATS)),
            *dropouts(Path(scratch) / "drop", rounds=at_least(size, 30, 2)),
            *kills(Path(scratch) / "kills", at_least(size, 20)),
        ]


def tiny(sites: int, rounds: int) -> Study:
    """A study whose round takes a second: little data, and noise at which accounting is quick."""
    return from_dict(
        {
            "name": "faults",
            "round_timeout": 60.0,
            "sites": [{"name": f"site-{i}", "patients": 24, "weight": 1 + i % 2} for i in range(sites)],
            "images": {"size": 28},
            "gan": {"generator_width": 4, "discriminator_width": 4, "latent": 8},
            "training": {"rounds": rounds, "local_steps": 1, "patients_per_step": 6, "discriminator_steps": 1},
            "privacy": {"delta": 0.01, "epsilon": 0.8 * rounds**0.5},
            "secure_sum": {"rotate_every": 2},
        }
    )


class Prepared:
    """A prepared consortium, of which each run gets a copy."""

    def __init__(self, folder: Path, study: Study) -> None:
        self.folder = folder
        self.study = consortium.prepare(study, folder / "prepared", {})
        consortium.read_data(folder / "prepared", self.study)
        self.runs = 0
        self._warm()

    def _warm(self) -> None:
        """What a hospital imports and works out when it trains, here once instead of in each forked process."""
        for name in ("opacus.optimizers", "opacus.grad_sample", "torch._dynamo"):
            importlib.import_module(name)
        hospital = Hospital(consortium.homes(self.folder / "prepared", self.study)[0])
        rate = self.study.sampling_rate(hospital.site)
        for steps in range(1, self.study.total_steps + 3):
            for accountant in ENFORCED.values():
                accountant([TrainingSteps(hospital.sigma, rate, steps)], self.study.privacy.delta)

    def copy(self) -> Path:
        self.runs += 1
        return Path(shutil.copytree(self.folder / "prepared", self.folder / f"run-{self.runs}"))


@contextmanager
def coordinator(
    run: Path,
    study: Study,
    *,
    crash_at: tuple[int, str] | None = None,
    server_crash: str = "",
    drops: Collection[tuple[int, int]] = (),
) -> Iterator[int]:
    """The coordinator in a process of its own; yields its process id, and ends it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setpgid(0, 0)
            sys.stderr = (run / "stderr.log").open("a")
            os.environ.pop(crash.VARIABLE, None)
            if server_crash:
                os.environ[crash.VARIABLE] = server_crash
            homes = consortium.homes(run, study)
            grid = ProcessGrid(homes, run / "trace.jsonl", crash_at=crash_at, drops=drops, insecure_seed=SEED)
            server.run(grid, run)
            code = 0 if not crash_at or grid.crashes else 3  # 3: the point was never reached
        except BaseException as error:
            print(error, file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    try:
        yield child
    finally:
        try:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def run_to_end(run: Path, study: Study, **faults: object) -> int:
    """Exit code of the coordinator's process."""
    with coordinator(run, study, **faults) as child:  # type: ignore[arg-type]
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def events(run: Path) -> list[dict]:
    path = run / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def ended(run: Path, study: Study) -> bool:
    said = events(run)
    return bool(said) and said[-1]["event"] == "run_closed" and said[-1]["rounds"] == study.training.rounds


def secrets_of(run: Path, study: Study) -> set[bytes]:
    epochs = [keys.HospitalKeys.load(home / "keys").epoch for home in consortium.homes(run, study)]
    return {secret for epoch in epochs if epoch for secret in (epoch.he_secret, epoch.mac_root)}


# ---- R2, R3


def crash_points(folder: Path, repeats: int) -> list[Figure]:
    prepared = Prepared(folder, tiny(4, 3))
    study = prepared.study
    undisturbed = prepared.copy()
    if run_to_end(undisturbed, study):
        raise RuntimeError((undisturbed / "stderr.log").read_text())
    expected = events(undisturbed)[-1]["model_hash"]
    client = [_client_crash(prepared, name, node % 4) for name in CLIENT for node in range(repeats)]
    coordinator_ = [_server_crash(prepared, name, expected) for name in SERVER for _ in range(repeats)]
    return [
        Figure("R2_points", len(CLIENT), f"== {len(CLIENT)}"),
        Figure("R2_runs", len(client), f">= {len(CLIENT) * repeats}"),
        Figure("R2_failed", sum(map(bool, client)), "== 0"),
        Figure("R3_points", len(SERVER), f"== {len(SERVER)}"),
        Figure("R3_runs", len(coordinator_), f">= {len(SERVER) * repeats}"),
        Figure("R3_failed", sum(map(bool, coordinator_)), "== 0"),
    ]


def _client_crash(prepared: Prepared, point: str, node: int) -> list[str]:
    run, study = prepared.copy(), prepared.study
    code = run_to_end(run, study, crash_at=(node, point))
    problems = violations(run, study, run / "trace.jsonl", secrets_of(run, study))
    if code:
        problems.append(f"ended with {code}")
    if not ended(run, study):
        problems.append("the study did not end")
    return _told(run, point, problems)


def _server_crash(prepared: Prepared, point: str, expected: str) -> list[str]:
    run, study = prepared.copy(), prepared.study
    problems = []
    if run_to_end(run, study, server_crash=point) != crash.EXIT_CODE:
        problems.append("the point was never reached")
    if run_to_end(run, study):
        problems.append("it did not go on")
    problems += violations(run, study, run / "trace.jsonl", secrets_of(run, study))
    if not ended(run, study) or events(run)[-1]["model_hash"] != expected:
        problems.append("another model than that of the undisturbed run")
    if _charges(run, study) != {study.training.rounds}:
        problems.append("a round was charged twice")
    return _told(run, point, problems)


def _charges(run: Path, study: Study) -> set[int]:
    """Reservations of the hospitals."""
    ledgers = [read_ledger(home / "ledger.jsonl") for home in consortium.homes(run, study)]
    return {sum(record.kind == "reserve" for record in ledger.records) for ledger in ledgers}


def _told(run: Path, point: str, problems: list[str]) -> list[str]:
    if problems:
        print(f"{point}: {'; '.join(problems)}")
        log = run / "stderr.log"
        print(log.read_text()[-2000:] if log.exists() else "")
    shutil.rmtree(run)
    return problems


# ---- R6


class CheckedGrid(ProcessGrid):
    """Compares each sum that hospitals apply with the sum of the plaintext integers that they stored."""

    wrong = 0
    checked = 0

    def call(self, node: int, message: Message) -> Message:
        envelope = Envelope.from_record(message.content, 1 << 30)
        if envelope.kind != Certificate.__name__:
            return super().call(node, message)
        home = self.homes[node]
        certificate = parse(envelope.header, Certificate)
        expected, before = self._expected(certificate), Hospital(home)
        answer = super().call(node, message)
        after = Hospital(home)
        if expected is not None and after.applied_round == certificate.round:
            moved = checkpoint.unflatten(checkpoint.flatten(before.model) + expected, like=before.model)
            type(self).checked += 1
            type(self).wrong += checkpoint.content_hash(moved) != after.model_hash
        return answer

    def _expected(self, certificate: Certificate) -> np.ndarray | None:
        """Mean of the stored levels of the cohort; kept, because hospitals remove theirs once it is applied."""
        if not hasattr(self, "_sums"):
            self._sums: dict[int, np.ndarray] = {}
        if certificate.round not in self._sums:
            members = [h for h in map(Hospital, self.homes.values()) if h.site.name in certificate.cohort]
            total = np.zeros(members[0].plan.n_values, dtype=np.int64)
            for h in members:
                total += h.site.weight * checkpoint.read(h.home / "update.safetensors")[0]["levels"].astype(np.int64)
            weight = sum(h.site.weight for h in members)
            self._sums[certificate.round] = members[0].plan.mean(total, weight)
        return self._sums[certificate.round]


def dropouts(folder: Path, rounds: int) -> list[Figure]:
    study = tiny(5, rounds)
    drops = random_drops(5, rounds, 0.2, seed=1)
    enough = [r for r in range(1, rounds + 1) if 5 - sum(d[1] == r for d in drops) >= MIN_SITES]
    drops = {d for d in drops if d[1] in enough}  # a round with fewer than three stops the study, as it should
    prepared = Prepared(folder, study)
    run = prepared.copy()
    homes = consortium.homes(run, prepared.study)
    grid = CheckedGrid(homes, run / "trace.jsonl", drops=drops, insecure_seed=SEED)
    server.run(grid, run)
    reserves = [
        [r.body["round"] for r in read_ledger(home / "ledger.jsonl").records if r.kind == "reserve"] for home in homes
    ]
    problems = violations(run, prepared.study, run / "trace.jsonl", secrets_of(run, prepared.study))
    return [
        Figure("R6_rounds", events(run)[-1]["rounds"], f"== {rounds}"),
        Figure("R6_dropped", len(drops)),
        Figure("R6_sums_checked", CheckedGrid.checked),
        Figure("R6_wrong_sums", CheckedGrid.wrong, "== 0"),
        Figure("R6_charged_twice", sum(len(r) - len(set(r)) for r in reserves), "== 0"),
        Figure("R6_violations", len(problems), "== 0"),
    ]


# ---- R8


def kills(folder: Path, count: int) -> list[Figure]:
    prepared = Prepared(folder, tiny(4, max(4, count // 2)))
    study = prepared.study
    undisturbed, run = prepared.copy(), prepared.copy()
    run_to_end(undisturbed, study)
    chance, done, resumed = random.Random(SEED), 0, []
    while not ended(run, study):
        known, began = len(events(run)), time.perf_counter()
        with coordinator(run, study) as child:
            while os.waitpid(child, os.WNOHANG) == (0, 0):
                fresh = events(run)[known:]
                if any(e["event"] in ("round_opened", "round_applied") for e in fresh):
                    break
                time.sleep(0.01)
            else:
                continue
            if known:
                resumed.append(time.perf_counter() - began)
            if done >= count:
                os.waitpid(child, 0)
                continue
            time.sleep(chance.uniform(0, 2))
            done += not ended(run, study)
    problems = violations(run, study, run / "trace.jsonl", secrets_of(run, study))
    with Journal(run, study.hash) as journal:
        stored = [journal.certificate(number) for number in range(1, study.training.rounds + 1)]
    attempts = [pair[0].attempt for pair in stored if pair]
    return [
        Figure("R8_kills", done, f">= {count}"),
        Figure("R8_resume_s", max(resumed, default=0.0), "<= 60"),
        Figure("R8_repeated_attempts", max(attempts) - 1, "<= 1"),
        Figure("R8_extra_charges", max(_charges(run, study)) - study.training.rounds, "== 0"),
        Figure("R8_other_model", int(events(run)[-1]["model_hash"] != events(undisturbed)[-1]["model_hash"]), "== 0"),
        Figure("R8_violations", len(problems), "== 0"),
    ]
