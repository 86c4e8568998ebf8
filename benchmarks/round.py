"""What a round costs beside training, and whether the server's memory grows with the number of hospitals.

    make bench-round

`outside_training_share`: quantise, prove, mask, encrypt, add, decrypt, check and update, over the whole round, at
the built-in study, from the events that hospitals and coordinator write. `server_rss_40_over_4`: peak resident
memory of the process that runs server and engine, 40 hospitals over 4, same model. Both on the real engine.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import psutil
from _results import write
from rich.console import Console
from rich.table import Table

from fedmedgan.cli.study import read_study
from fedmedgan.shared.study import Study, from_dict
from fedmedgan.simulations import consortium, flower_app, record

ROUNDS = 4
SAMPLE_SECONDS = 0.02


def main() -> None:
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as scratch:
        study = _with(read_study(None), training={"rounds": ROUNDS})
        rows += _shares(study, Path(scratch) / "shares")
    memory = [_in_own_process(n) for n in (4, 40)]
    rows += memory
    up = sum(r["bytes_up"] + r["bytes_down"] for r in rows if r["what"] == "round")
    plain = sum(2 * r["float32_bytes"] for r in rows if r["what"] == "round")
    figures = {
        "outside_training_share": sum(r["outside_s"] for r in rows if r["what"] == "round")
        / sum(r["outside_s"] + r["training_s"] for r in rows if r["what"] == "round"),
        "server_rss_40_over_4": memory[1]["peak_mb"] / memory[0]["peak_mb"],
        "bytes_over_float32": up / plain,
    }
    table = Table("round", "training s", "outside s", "share", "up MB", "down MB")
    for row in (r for r in rows if r["what"] == "round"):
        share = row["outside_s"] / (row["outside_s"] + row["training_s"])
        sizes = (f"{row['bytes_up'] / 1e6:.2f}", f"{row['bytes_down'] / 1e6:.2f}")
        table.add_row(str(row["round"]), f"{row['training_s']:.2f}", f"{row['outside_s']:.3f}", f"{share:.1%}", *sizes)
    console = Console()
    console.print(table)
    for row in memory:
        peak, growth = row["peak_mb"], row["growth_mb"]
        console.print(f"{row['hospitals']} hospitals: peak {peak:.0f} MB, {growth:.0f} MB of it in the run")
    console.print(figures)
    write(
        "round",
        command="make bench-round",
        packages=("fedmedgan", "flwr", "torch", "opacus", "tenseal", "ray"),
        rows=rows,
        figures=figures,
        notes=[
            "round rows: built-in study, three hospitals sharing the machine; seconds are means over hospitals",
            "bytes_over_float32: up and down together, over plaintext float32 up and down",
            "memory rows: peak resident memory of the process that runs server and engine",
        ],
    )


def _with(study: Study, **sections: dict) -> Study:
    values = study.model_dump()
    for name, section in sections.items():
        values[name] = {**values[name], **section} if isinstance(section, dict) else section
    return from_dict(values)


def _shares(study: Study, folder: Path) -> list[dict]:
    """Per round: mean seconds of a hospital in and outside training, and bytes of one hospital."""
    study = consortium.prepare(study, folder, {})
    consortium.read_data(folder, study)
    flower_app.run(folder, study)
    run = record.load(folder)
    rows = []
    for number in range(1, ROUNDS + 1):
        training, outside = [], []
        for site in study.sites:
            events = [
                json.loads(e) for e in (consortium.home_of(folder, site.name) / "events.jsonl").read_text().splitlines()
            ]
            mine = {e["event"]: e for e in events if e.get("round") == number}
            training.append(mine["trained"]["seconds"])
            parts = [*mine["encrypted"]["seconds"].values(), *mine["updated"]["seconds"].values()]
            outside.append(mine["trained"]["quantize_seconds"] + sum(parts))
        events = [json.loads(e) for e in (folder / "events.jsonl").read_text().splitlines()]
        added = next(e for e in events if e["event"] == "round_aggregated" and e["round"] == number)
        update = next(e for e in events if e["event"] == "update_accepted" and e["round"] == number)
        rows.append(
            {
                "what": "round",
                "round": number,
                "hospitals": len(study.sites),
                "training_s": sum(training) / len(training),
                "outside_s": sum(outside) / len(outside) + added["seconds"]["aggregation"],
                "bytes_up": update["bytes_up"],
                "bytes_down": added["bytes_down"],
                "float32_bytes": run.opened.float32_bytes,
            }
        )
    return rows


def _in_own_process(hospitals: int) -> dict:
    command = [sys.executable, __file__, "--memory", str(hospitals)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def _memory(hospitals: int) -> dict:
    """Peak memory of this process, which holds server and engine; hospitals are Ray's processes."""
    sites = [{"name": f"site-{i}", "patients": 20} for i in range(hospitals)]
    training = {"rounds": 2, "local_steps": 2, "patients_per_step": 4}
    study = _with(read_study(None), sites=sites, training=training, privacy={"epsilon": 50.0, "delta": 0.01})
    process, peak, done = psutil.Process(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(SAMPLE_SECONDS):
            peak = max(peak, process.memory_info().rss)

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        study = consortium.prepare(study, folder, {})
        consortium.read_data(folder, study)
        before = process.memory_info().rss
        watcher = threading.Thread(target=watch)
        watcher.start()
        flower_app.run(folder, study)
        done.set()
        watcher.join()
    return {
        "what": "memory",
        "hospitals": hospitals,
        "before_mb": before / 1e6,
        "peak_mb": peak / 1e6,
        "growth_mb": (peak - before) / 1e6,
    }


if __name__ == "__main__":
    if "--memory" in sys.argv:
        print(json.dumps(_memory(int(sys.argv[2]))))
    else:
        main()
