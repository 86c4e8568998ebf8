"""R5: ledgers put back, shortened or removed, after two rounds of three: does the hospital, server or a peer notice?"""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from faults.figures import Figure
from faults.protocol import Prepared, coordinator, events, run_to_end, tiny
from fedmedgan.simulations import consortium

NAME = "rollback"
NOTES = ["each of four hospitals in turn; the ledger alone, the whole home, and with a server that hides what it saw"]


def measure(size: float) -> list[Figure]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        return rollbacks(Path(scratch))


def rollbacks(folder: Path) -> list[Figure]:
    """Ledgers that were put back, after two rounds of three."""
    prepared = Prepared(folder, tiny(4, 3))
    study, base = prepared.study, prepared.copy()
    old = folder / "old"
    with coordinator(base, study) as child:
        while not any(e["event"] == "round_applied" and e["round"] == 1 for e in events(base)):
            time.sleep(0.01)
        os.kill(child, signal.SIGSTOP)
        for name in ("hospitals", "budget-books"):
            shutil.copytree(base / name, old / name)
        os.kill(child, signal.SIGCONT)
        while not any(e["event"] == "round_applied" and e["round"] == 2 for e in events(base)):
            time.sleep(0.01)
    time.sleep(2)  # a hospital's process may outlive the coordinator
    cases: dict[str, Callable[[Path, Path, Path], None]] = {
        "shorter by one record": lambda run, home, earlier: _cut(home / "ledger.jsonl", 1),
        "shorter by three records": lambda run, home, earlier: _cut(home / "ledger.jsonl", 3),
        "an older copy": lambda run, home, earlier: shutil.copy(earlier / "ledger.jsonl", home),  # type: ignore[func-returns-value,return-value]
        "removed": lambda run, home, earlier: (home / "ledger.jsonl").unlink(),
        "the whole home put back": lambda run, home, earlier: _whole(home, earlier),
        "the whole home put back, the server hides what it saw": lambda run, home, earlier: (
            _whole(home, earlier),  # type: ignore[func-returns-value]
            _forget(run),
        )[1],
    }
    tried = noticed = 0
    for name, damage in cases.items():
        for site in study.sites:
            run = Path(shutil.copytree(base, folder / "case"))
            damage(run, consortium.home_of(run, site.name), old / "hospitals" / site.name)
            run_to_end(run, study)
            said = [*events(run), *(e for home in consortium.homes(run, study) for e in events(home))]
            found = any("LEDGER_" in str(e.get("reason", "")) + str(e.get("error", "")) for e in said)
            tried, noticed = tried + 1, noticed + found
            if not found:
                print(f"not noticed: {name}, {site.name}")
            shutil.rmtree(run)
    return [Figure("R5_rollbacks", tried, ">= 20"), Figure("R5_noticed", noticed, f"== {tried}")]


def _cut(path: Path, records: int) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-records]))


def _whole(home: Path, earlier: Path) -> None:
    """With the hospital's budget book, which would notice by itself."""
    events_file = (home / "events.jsonl").read_bytes()
    books = [folder.parents[1] / "budget-books" / folder.name for folder in (home, earlier)]
    for now, then in ((home, earlier), books):
        shutil.rmtree(now)
        shutil.copytree(then, now)
    (home / "events.jsonl").write_bytes(events_file)


def _forget(run: Path) -> None:
    """A server that helps: it shows no anchors, and compares none."""
    with sqlite3.connect(run / "journal.db") as database:
        database.execute("DELETE FROM updates")
