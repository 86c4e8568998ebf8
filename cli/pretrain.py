"""``fedmedgan pretrain``: initial weights from public images, which cost no privacy."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedmedgan.cli import output
from fedmedgan.shared.errors import RunError
from fedmedgan.shared.study import Study, load

if TYPE_CHECKING:
    import torch

    from fedmedgan.client.data.patients import PatientImages
    from fedmedgan.client.training.local_round import Losses


def pretrain(
    study_file: Annotated[Path, typer.Argument(metavar="STUDY", help="Study whose networks are trained.")],
    out: Annotated[Path, typer.Option(help="File of weights to write; must not exist.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of PUBLIC labelled DICOM, no patient of any hospital; without one, phantoms."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, max=10_000_000, help="Discriminator steps.")] = 1000,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Train a study's networks WITHOUT privacy on public images, for hospitals to start from.

    Prints the lines that belong into the study. Each hospital is given the file: `fedmedgan study sign --weights FILE`.
    """
    study = load(study_file)
    output.refuse_existing(out)
    # Imports of seconds (torch), so that `fedmedgan --help` answers at once.
    from fedmedgan.client import checkpoint, pretraining
    from fedmedgan.client.gans import recipe

    recipe.load(study)
    where = _device(device)
    public, words = _public_images(study, data)
    console = Console(stderr=True, highlight=False)
    console.print(f"{len(public.labels_N)} public images, {steps} steps WITHOUT privacy on {where}", soft_wrap=True)

    def tell(done: int, losses: Losses) -> None:
        console.print(f"step {done} of {steps}: generator's loss {losses.generator:.3f}", soft_wrap=True)

    arrays = pretraining.pretrain(study, public, steps=steps, device=where, tell=tell)
    try:
        digest = checkpoint.write(out, arrays, recipe=study.gan.recipe, steps=steps, images=words)
    except OSError as error:
        raise RunError("RUN_PATH", f"cannot be written ({error.strerror})", str(out)) from None
    lines = ["[gan]", f'pretrained = "{digest}"', f"pretrained_on = {json.dumps(words)}"]

    def human(console: Console) -> None:
        console.print(f"wrote {out}, SHA-256 of the weights {digest}", markup=False, soft_wrap=True)
        console.print("put this into the study, and give the file to every hospital:", soft_wrap=True)
        for line in lines:
            console.print(f"  {line}", markup=False, soft_wrap=True)

    output.emit({"weights": str(out), "sha256": digest, "pretrained_on": words, "steps": steps, "study": lines}, human)


def _public_images(study: Study, folder: Path | None) -> tuple[PatientImages, str]:
    """The images, and which they are in words."""
    from fedmedgan.client.data.patients import load_patients
    from fedmedgan.simulations import public_phantoms

    if folder is None:
        found = public_phantoms.draw(study)
        return found, f"{len(found.labels_N)} drawn phantoms of fedmedgan"
    found = load_patients(folder, study.images, pseudonym_key=os.urandom(32))
    return found, f"{len(found.labels_N)} public images of the folder {folder.resolve().name[:100]}"


def _device(wanted: str) -> torch.device:
    import torch

    if wanted not in ("auto", "cpu", "cuda"):
        raise RunError("RUN_DEVICE", f"{wanted!r} is not auto, cpu or cuda", "--device")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise RunError("RUN_DEVICE", "no CUDA device is available", "--device")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")
