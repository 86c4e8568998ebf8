"""``fedmedgan study``: write, check and show the agreement."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedmedgan.cli import output
from fedmedgan.shared.errors import RunError
from fedmedgan.shared.privacy.accounting import calibrate_noise, epsilon_after_rounds
from fedmedgan.shared.privacy.events import TrainingSteps
from fedmedgan.shared.secure_sum.cipher import max_frame_bytes
from fedmedgan.shared.secure_sum.proof import update_blobs
from fedmedgan.shared.study import Study, load
from fedmedgan.simulations import DEFAULT_STUDY

CURVE_POINTS = 50
"""Rounds for which epsilon is worked out, at most."""

app = typer.Typer(help="The agreement: write, check, show.", no_args_is_help=True)


def read_study(path: Path | None) -> Study:
    """A study from a file, or the example."""
    return load(path or DEFAULT_STUDY)


@app.command()
def new(path: Annotated[Path, typer.Argument(help="File to write; must not exist.")] = Path("study.toml")) -> None:
    """Write a commented example."""
    if path.exists():
        raise RunError("RUN_PATH", "the file exists already", str(path), hint="choose another name")
    try:
        shutil.copyfile(DEFAULT_STUDY, path)
    except OSError as error:
        raise RunError("RUN_PATH", f"cannot be written ({error.strerror})", str(path)) from None
    output.emit({"path": str(path)}, lambda console: console.print(f"wrote {path}", soft_wrap=True))


@app.command()
def show(path: Annotated[Path, typer.Argument(help="Study file.")]) -> None:
    """Print the study with every default filled in, and its hash."""
    study = load(path)

    def human(console: Console) -> None:
        console.print_json(study.canonical().decode())
        console.print(f"hash {study.hash}", soft_wrap=True)

    output.emit({"hash": study.hash, "study": study.model_dump(mode="json")}, human)


@app.command()
def check(path: Annotated[Path, typer.Argument(help="Study file.")]) -> None:
    """Validate a study, and print what it will cost: epsilon per site and round, bytes, time."""
    study = load(path)
    found = cost(study)
    output.emit({"hash": study.hash, **found}, lambda console: draw_cost(console, study, found))


def draw_cost(console: Console, study: Study, found: dict) -> None:
    """What `cost` found, for people."""
    console.print(f"study {study.name}  hash {study.hash}", soft_wrap=True)
    console.print(
        f"unit: one patient with all images and labels; adjacency: add/remove; delta {study.privacy.delta:g};"
        f" {study.training.rounds} rounds of {study.steps_per_round} private steps",
        soft_wrap=True,
    )
    table = Table("site", "patients", "weight", "rate q", "noise sigma", "epsilon, round 1", "epsilon, all")
    for row in found["sites"]:
        table.add_row(
            row["name"],
            str(row["patients"]),
            str(row["weight"]),
            f"{row['sampling_rate']:.4f}",
            f"{row['noise_multiplier']:.3f}",
            f"{row['epsilon_by_round'][0]:.2f}",
            f"{row['epsilon_by_round'][-1]:.2f} of {study.privacy.epsilon:g}",
        )
    console.print(table)
    if "parameters" not in found:
        console.print("bytes and time need the networks: pip install 'fedmedgan[hospital]'")
        return
    up, down, plain = (found[f"bytes_{way}"] / 1e6 for way in ("up", "down", "float32"))
    console.print(
        f"model: {found['parameters']:,} parameters; a round sends {up:.2f} MB up and {down:.2f} MB down per"
        f" hospital (plaintext float32: {plain:.2f} MB each way)",
        soft_wrap=True,
    )
    minutes = found["seconds_training"] / 60
    console.print(f"training: about {minutes:.1f} minutes per hospital on one core of this machine", soft_wrap=True)


def cost(study: Study) -> dict:
    """Privacy by the accountant; bytes and time by the networks, where they are installed."""
    last = study.training.rounds
    rounds = sorted({1 + i * (last - 1) // (CURVE_POINTS - 1) for i in range(CURVE_POINTS)})
    sites = []
    for site in study.sites:
        rate = study.sampling_rate(site)
        sigma = calibrate_noise(
            epsilon=study.privacy.epsilon, delta=study.privacy.delta, sampling_rate=rate, steps=study.total_steps
        )
        one_round = TrainingSteps(sigma, rate, study.steps_per_round)
        curve = [epsilon for _, epsilon in epsilon_after_rounds(one_round, rounds, study.privacy.delta)]
        sites.append(
            {
                "name": site.name,
                "patients": site.patients,
                "weight": site.weight,
                "sampling_rate": rate,
                "noise_multiplier": sigma,
                "epsilon_by_round": curve,
            }
        )
    return {"rounds": rounds, "sites": sites, **_size(study)}


def _size(study: Study) -> dict:
    """Bytes and seconds; nothing in a coordinator's install, which has no torch."""
    try:
        from fedmedgan.client.training.estimate import parameters, step_seconds
    except ModuleNotFoundError:
        return {}
    n = parameters(study)
    blobs = update_blobs(study, n)
    return {
        "parameters": n,
        "bytes_up": max_frame_bytes(blobs, "update"),
        "bytes_down": max_frame_bytes(blobs, "sum"),
        "bytes_float32": 4 * n,
        "seconds_training": step_seconds(study) * study.training.rounds * study.training.local_steps,
    }
