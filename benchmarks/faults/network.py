"""A study over a bad network: real SuperLink, SuperNodes, gate and coordinator; a proxy between them misbehaves.

R7  200 ms late in each direction, every third connection cut, now and then a byte changed or a chunk sent twice, and
    once 60 s without a byte: every sum equals the plaintext integers', nothing is lost, each error has a known cause
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil

from faults.figures import Figure, at_least
from faults.hospital_process import LEVELS
from faults.invariants import violations
from faults.protocol import events, secrets_of
from faults.proxy import Fault, Proxy
from fedmedgan.client import checkpoint
from fedmedgan.client.gans import recipe
from fedmedgan.deploy import kits, processes
from fedmedgan.deploy.environment import BIN
from fedmedgan.deploy.kit_config import Consortium
from fedmedgan.server.journal import Journal
from fedmedgan.shared.secure_sum.quantize import plan_for
from fedmedgan.shared.study import Study, from_dict
from fedmedgan.simulations import consortium
from fedmedgan.simulations.ports import free_port

NAME = "network"
ROUNDS = 100
LIMIT_SECONDS = 600.0
DELAY_SECONDS = 0.2
PARTITION_SECONDS = 60.0
CUT_EVERY, SPOIL_EVERY = 3, 60
START_SECONDS = 180.0
NOTES = [
    "three SuperNodes with supervisor and gate, a SuperLink and its run are Flower's processes with TLS and node keys",
    "a ClientApp's process is forked from one that has imported everything, and draws an update instead of training",
    f"the study is stopped after {LIMIT_SECONDS:g} s; R7_rounds then says how many rounds of {ROUNDS} it came to",
    f"{DELAY_SECONDS:g} s late in each direction, every third connection reset, 2 of {SPOIL_EVERY} spoiled",
    "a reply whose upload was cut is given up by Flower only after 180 s; the machine also ran the test suite",
    "R7_p95_recovery_s: from a fault, and from the beginning of the partition of 60 s, to the end of the round",
]


def measure(size: float) -> list[Figure]:
    with tempfile.TemporaryDirectory() as scratch:
        return disturbed(Path(scratch), at_least(size, ROUNDS, 2), size)


def fault_of(connection: int) -> str:
    """Every third connection is cut; of the others, now and then one is spoiled."""
    if connection % CUT_EVERY == 0:
        return "cut"
    return {SPOIL_EVERY // 2 - 1: "corrupt", SPOIL_EVERY - 1: "replay"}.get(connection % SPOIL_EVERY, "")


def disturbed(scratch: Path, rounds: int, size: float) -> list[Figure]:
    """One study, in a folder that may be looked at afterwards."""
    began = time.time()
    folder, port, superlink_port = scratch / "run", free_port(), free_port()
    study = prepare(scratch, folder, rounds, port, superlink_port)
    with Proxy(port, superlink_port, fault_of, DELAY_SECONDS) as proxy, parties(scratch, folder, study) as server:
        _wait(folder, server, rounds, proxy)
        ended, strange = time.time(), unexplained(folder, study)  # what is ended in the middle complains
    applied = [event["time"] for event in events(folder) if event["event"] == "round_applied"]
    recoveries = recovery(proxy.faults, applied if len(applied) == rounds else [*applied, ended])
    wrong, checked = wrong_sums(folder, study)
    for line in strange:
        print(f"unexplained: {line}")
    broken = violations(folder, study, scratch / "no-trace", secrets_of(folder, study))
    for line in broken:
        print(line)
    made = Counter(fault.kind for fault in proxy.faults)
    opened = next((event["time"] for event in events(folder) if event["event"] == "run_opened"), began)
    return [
        Figure("R7_rounds", len(applied), f">= {round(ROUNDS * size)}"),
        Figure("R7_sums_checked", checked, f"== {len(applied)}"),
        Figure("R7_wrong_sums", wrong, "== 0"),
        Figure("R7_lost", lost(folder, study), "== 0"),
        Figure("R7_unexplained", len(strange), "== 0"),
        Figure("R7_violations", len(broken), "== 0"),
        Figure("R7_spoiled_accepted_by_tls", sum(fault.accepted for fault in proxy.faults), "== 0"),
        Figure("R7_p95_recovery_s", float(np.percentile(recoveries, 95)) if recoveries else 0.0, "<= 90"),
        Figure("R7_worst_recovery_s", max(recoveries, default=0.0)),
        Figure("R7_connections", proxy.connections),
        *(Figure(f"R7_{kind}", made[kind]) for kind in ("cut", "corrupt", "replay")),
        Figure("R7_partition", made["partition"], "== 1"),
        Figure("R7_round_s", (ended - opened) / max(1, len(applied))),
    ]


# ---- the study


def prepare(scratch: Path, folder: Path, rounds: int, port: int, superlink_port: int) -> Study:
    """Three hospitals and a coordinator, all signed, with kits whose address is the proxy's."""
    plan = from_dict(
        {
            "name": "network",
            "round_timeout": 600.0,
            "sites": [{"name": f"site-{i}", "patients": 24, "weight": 1 + i % 2} for i in range(3)],
            "images": {"size": 28},
            "gan": {"generator_width": 4, "discriminator_width": 4, "latent": 8},
            "training": {"rounds": rounds, "local_steps": 1, "patients_per_step": 6, "discriminator_steps": 1},
            "secure_sum": {"rotate_every": 20},
            "privacy": {"delta": 0.01, "epsilon": 1.0},  # much noise: accounting for little of it takes seconds
        }
    )
    study = consortium.prepare(plan, folder, {})
    consortium.read_data(folder, study)
    coordinator = {"host": "127.0.0.1", "port": port, "superlink_port": superlink_port}
    hospitals = tuple({"name": site.name} for site in study.sites)
    made = scratch / "kits"
    kits.make(Consortium.model_validate({"name": "network", "coordinator": coordinator, "hospitals": hospitals}), made)
    kits.copy(made / "coordinator", folder / "kit")
    for site in study.sites:
        kits.copy(made / site.name, consortium.home_of(folder, site.name) / "kit")
    return study


@contextmanager
def parties(scratch: Path, folder: Path, study: Study) -> Iterator[subprocess.Popen[bytes]]:
    """Every party's processes, started and ended; yields the coordinator's."""
    started: list[subprocess.Popen[bytes]] = []
    script, channel = str(Path(__file__).with_name("hospital_process.py")), str(scratch / "fork")
    # Flower's executor looks for work every second by default, beside the SuperNode, which asks every 3 s.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25"}

    def start(name: str, *command: str) -> subprocess.Popen[bytes]:
        with (scratch / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        started.append(process)
        return process

    try:
        start("fork", sys.executable, script, "fork", channel)
        server = start("coordinator", str(BIN / "fedmedgan"), "server", "start", "--folder", str(folder))
        deadline = time.monotonic() + START_SECONDS
        registered = folder / "supernodes.json"
        while not (registered.exists() and len(json.loads(registered.read_text() or "{}")) == len(study.sites)):
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((scratch / "coordinator.log").read_text())
            time.sleep(0.5)
        for home in consortium.homes(folder, study):
            start(home.name, sys.executable, script, "site", str(home), channel, str(free_port()))
        yield server
    finally:
        family = [child for process in started for child in _descendants(process.pid)]
        processes.stop(*started, seconds=2 * processes.STOP_SECONDS)
        for child in family:  # Flower's ServerApp may wait for minutes for an object, and hold the journal
            with suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(family, timeout=START_SECONDS)


def _descendants(process: int) -> list[psutil.Process]:
    try:
        return psutil.Process(process).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _wait(folder: Path, server: subprocess.Popen[bytes], rounds: int, proxy: Proxy) -> None:
    """Until the study has ended, or its time is over; after a quarter of the rounds there is a partition."""
    deadline, parted = time.monotonic() + LIMIT_SECONDS, False
    while server.poll() is None and time.monotonic() < deadline:
        done = sum(event["event"] == "round_applied" for event in events(folder))
        if not parted and done >= max(1, rounds // 4):
            proxy.partition(PARTITION_SECONDS)
            parted = True
        time.sleep(0.5)


# ---- what came of it


def recovery(faults: list[Fault], applied: list[float]) -> list[float]:
    """Seconds from each fault, a partition's beginning too, to the next round that was completed.

    Args:
        applied: Unix times of the rounds; of a study that was stopped, then that of its end, so that faults from which
            it did not recover count.
    """
    after = [[at for at in applied if at > fault.at] for fault in faults]
    return [times[0] - fault.at for fault, times in zip(faults, after, strict=True) if times]


def wrong_sums(folder: Path, study: Study) -> tuple[int, int]:
    """Rounds whose model is not the one before plus the mean of the plaintext levels; and how many were compared."""
    networks = recipe.load(study).networks()
    model = checkpoint.network_arrays(*networks)
    plan = plan_for(study, checkpoint.flatten(model).size)
    reported = {e["round"]: e["model_hash"] for e in events(folder) if e["event"] == "round_applied"}
    wrong = 0
    with Journal(folder, study.hash) as journal:
        for number, model_hash in sorted(reported.items()):
            stored = journal.certificate(number)
            assert stored is not None
            members = [study.site(name) for name in stored[0].cohort]
            total_P = np.zeros(plan.n_values, dtype=np.int64)
            for site in members:
                name = f"round-{number:04d}-attempt-{stored[0].attempt:02d}.npy"
                total_P += site.weight * np.load(consortium.home_of(folder, site.name) / LEVELS / name)
            mean_P = plan.mean(total_P, sum(site.weight for site in members))
            model = checkpoint.unflatten(checkpoint.flatten(model) + mean_P, like=model)
            wrong += checkpoint.content_hash(model) != model_hash
    return wrong, len(reported)


def lost(folder: Path, study: Study) -> int:
    """Updates that were accepted, are in no certificate, and belong to an attempt that no later one replaced."""
    accepted = {(e["round"], e["attempt"], e["site"]) for e in events(folder) if e["event"] == "update_accepted"}
    newest: dict[int, int] = {}
    for event in events(folder):
        if event["event"] == "round_opened":
            newest[event["round"]] = max(newest.get(event["round"], 0), event["attempt"])
    missing = 0
    with Journal(folder, study.hash) as journal:
        for number, attempt, site in accepted:
            stored = journal.certificate(number)
            inside = stored is not None and stored[0].attempt == attempt and site in stored[0].cohort
            under_way = stored is None and journal.attempt_under_way() is not None
            missing += not (inside or under_way or attempt < newest[number])
    return missing


EXPECTED = (
    # a spoiled chunk: Flower gives up at once, the SuperNode ends, and is started again after 20 s
    r"SSL/TLS handshake error detected",
    r"ERROR\s*:\s*\[SSL: ",
    r"Exit Code: 305 .*\[SSL: ",
    # then what its ClientApp says to it is not heard or no longer wanted, and it is stopped, in a traceback too
    r"Runtime task-token authentication failed",
    r"INFO :\s+Task stopped\.",
    r"Failed to push (task output|reply message)",
    r"httpx\.(ConnectError|ReadError|RemoteProtocolError)|Connection(Refused|Reset)Error",
    # and its node counts as connected until it has missed its heartbeats: up to 60 s
    r"ApiError:2004\]",
    r"Exit Code: 305 .*\[code: 2004\]",
    # the SuperLink lost a request in the middle; a hospital lost a message, which is sent again
    r"ClientDisconnect",
    r"Failed to (send|receive) message \w+: .*(SSL|disconnected|timed out|reset)",
    # the answer to the push of an object was lost; Flower takes the repeated push for an error, and drops the reply
    r"Failed to send message \w+: .*The push session may have expired or been replaced",
)
"""Lines of Flower's and our logs that these faults have to cause."""
EXPECTED_REASONS = {"RUN_NODE", "RUN_TIMEOUT"}
"""Why the coordinator may have done without an answer: the node was gone, or its answer did not come in time."""


def unexplained(folder: Path, study: Study) -> list[str]:
    """Errors in logs and events that are not of an expected kind."""
    homes = consortium.homes(folder, study)
    logs = [folder / "superlink.log", *(home / "supernode.log" for home in homes), *folder.parent.glob("*.log")]
    found = [f"{path.name}: {line}" for path in logs for line in complaints(path.read_text(errors="replace"))]
    strange = [line for line in found if not expected(line)]
    for event in events(folder):
        failed = event["event"] in ("site_missing", "node_refused", "worker_restarted", "site_left")
        if failed and event.get("reason") not in EXPECTED_REASONS:
            strange.append(json.dumps(event))
    for home in homes:
        strange += [json.dumps(e) for e in events(home) if e["event"] in ("refused", "failed", "bundle_refused")]
    return strange


def expected(line: str) -> bool:
    """Whether these faults have to cause such an error."""
    return any(re.search(kind, line) for kind in EXPECTED)


def complaints(log: str) -> Iterator[str]:
    """Errors in a log, each in one line; of a traceback, what was raised."""
    lines = [line.rstrip() for line in processes.COLOUR.sub("", log).splitlines()]
    for number, line in enumerate(lines):
        if "Exit Code" in line:
            yield " ".join(" ".join(lines[number : number + 4]).split())
        elif line.startswith("Traceback"):
            yield next((text for text in lines[number + 1 :] if text and not text.startswith(" ")), line)
        elif re.search(r"\bERROR\b|\bCRITICAL\b|error\[", line):
            yield line
