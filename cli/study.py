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
from fedmedgan.simulations import DEFAULT_STUDY, recipe_words

CURVE_POINTS = 50
"""Rounds for which epsilon is worked out, at most."""
NO_PRIVACY = (
    "WITHOUT privacy: nothing is promised to any patient, so there is no epsilon; for public images in `fedmedgan"
    " simulate`, and no hospital grants it"
)

app = typer.Typer(help="The agreement: write, check, show.", no_args_is_help=True)


def read_study(path: Path | None) -> Study:
    """A study from a file, or the example."""
    return load(path or DEFAULT_STUDY)


@app.command()
def new(path: Annotated[Path, typer.Argument(help="File to write; must not exist.")] = Path("study.toml")) -> None:
    """Write a commented example."""
    output.refuse_existing(path)
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
        if not study.is_private:
            console.print(NO_PRIVACY, soft_wrap=True)
            console.print("epsilon, delta and clip_norm above are defaults that nothing uses", soft_wrap=True)
        console.print(f"hash {study.hash}", soft_wrap=True)

    output.emit({"hash": study.hash, "study": study.model_dump(mode="json")}, human)


@app.command()
def check(path: Annotated[Path, typer.Argument(help="Study file.")]) -> None:
    """Validate a study, try its recipe, and print what it will cost: epsilon per site and round, bytes, time."""
    study = load(path)
    _probe(study)
    found = cost(study)
    output.emit({"hash": study.hash, **found}, lambda console: draw_cost(console, study, found))


def _probe(study: Study) -> None:
    """Does the recipe fit the study, and does it leave records apart? Not asked in an install without torch."""
    try:
        from fedmedgan.client.training.estimate import refuse_mixing
    except ModuleNotFoundError:
        return
    refuse_mixing(study)


def draw_cost(console: Console, study: Study, found: dict) -> None:
    """What `cost` found, for people."""
    recipe, rounds = found["recipe"], study.training.rounds
    console.print(f"study {study.name}  hash {study.hash}", soft_wrap=True)
    if study.is_private:
        console.print(
            f"unit: one patient with all images and labels; adjacency: add/remove; delta {study.privacy.delta:g};"
            f" {rounds} rounds of {recipe_words.steps_in_words(study)}",
            soft_wrap=True,
        )
    else:
        console.print(NO_PRIVACY, soft_wrap=True)
        console.print(f"{rounds} rounds of {recipe_words.steps_in_words(study)}", soft_wrap=True)
    task = f", {recipe['task_in_words']}" if recipe["task"] else ""
    readers = " and ".join(recipe["reads_patients"])
    console.print(f"recipe: {recipe['name']}{task}; reads patients: {readers}", soft_wrap=True)
    if recipe["stabilisers"]:
        console.print(f"stabilisers: {', '.join(recipe['stabilisers'])}", markup=False, soft_wrap=True)
    if recipe["pretrained"]:
        said = (
            f"starts from weights {recipe['pretrained'][:16]}, trained on {study.gan.pretrained_on}:"
            " to be given with --weights"
        )
        console.print(said, markup=False, soft_wrap=True)
    columns = ["site", "patients", "weight", "rate q"]
    table = Table(*columns, *(["noise sigma", "epsilon, round 1", "epsilon, all"] if study.is_private else []))
    for row in found["sites"]:
        cells = [row["name"], str(row["patients"]), str(row["weight"]), f"{row['sampling_rate']:.4f}"]
        if study.is_private:
            curve = row["epsilon_by_round"]
            cells += [
                f"{row['noise_multiplier']:.3f}",
                f"{curve[0]:.2f}",
                f"{curve[-1]:.2f} of {study.privacy.epsilon:g}",
            ]
        table.add_row(*cells)
    console.print(table)
    if "parameters" not in found:
        console.print("bytes and time need the networks: pip install 'fedmedgan[hospital]'")
        return
    console.print(f"a private record: {found['record']}", soft_wrap=True)
    up, down, plain = (found[f"bytes_{way}"] / 1e6 for way in ("up", "down", "float32"))
    console.print(
        f"shared: {recipe_words.shared_in_words(study)}, {found['parameters']:,} parameters; a round sends {up:.2f} MB"
        f" up and {down:.2f} MB down per hospital (plaintext float32: {plain:.2f} MB each way);"
        f" aggregation: {recipe['aggregation']}",
        soft_wrap=True,
    )
    minutes = found["seconds_training"] / 60
    console.print(f"training: about {minutes:.1f} minutes per hospital on one core of this machine", soft_wrap=True)


def cost(study: Study) -> dict:
    """Privacy by the accountant; bytes and time by the networks, where they are installed.

    In a study without privacy ``noise_multiplier`` and ``epsilon_by_round`` of a site are None.
    """
    last = study.training.rounds
    rounds = sorted({1 + i * (last - 1) // (CURVE_POINTS - 1) for i in range(CURVE_POINTS)})
    sites = []
    for site in study.sites:
        rate, sigma, curve = study.sampling_rate(site), None, None
        if study.is_private:
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
    promised = {"private": study.is_private, "recipe": recipe_words.facts(study)}
    return {"rounds": rounds, **promised, "sites": sites, **_size(study)}


def _size(study: Study) -> dict:
    """Bytes and seconds; nothing in a coordinator's install, which has no torch."""
    try:
        from fedmedgan.client.training.estimate import parameters, record, step_seconds
    except ModuleNotFoundError:
        return {}
    n = parameters(study)
    blobs = update_blobs(study, n)
    return {
        "record": record(study),
        "parameters": n,
        "bytes_up": max_frame_bytes(blobs, "update"),
        "bytes_down": max_frame_bytes(blobs, "sum"),
        "bytes_float32": 4 * n,
        "seconds_training": step_seconds(study) * study.training.rounds * study.training.local_steps,
    }
