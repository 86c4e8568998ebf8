"""Initial weights that were trained on public images: the study names their hash, every hospital holds the file.

Of all cures for poor private images this one helps most (DPImageBench, Gong et al. 2025), and it costs no privacy as
long as the public images are public in fact: none of them may be a patient of any hospital of the study.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from fedmedgan.client import checkpoint
from fedmedgan.client.gans import recipe as recipes
from fedmedgan.client.gans.recipe import Recipe
from fedmedgan.shared.errors import ModelError
from fedmedgan.shared.study import Study

WEIGHTS = "initial.safetensors"


def networks(recipe: Recipe, home: Path) -> tuple[nn.Module, nn.Module]:
    """Both networks with the study's initial weights, from the home's file where the study names some.

    Raises:
        ModelError: MODEL_HASH, MODEL_MISMATCH.
    """
    made = recipe.networks()
    if recipe.gan.pretrained:
        checkpoint.load_networks(_read(home / WEIGHTS, recipe.study), *made)
    return made


def check(study: Study, weights: Path | None) -> bytes:
    """Is this the file that the study names, and does it fit its networks?

    Returns:
        The file's content; nothing where the study names none.

    Raises:
        ModelError: MODEL_HASH, another file, or none; MODEL_MISMATCH.
    """
    if not study.gan.pretrained:
        return b""
    if weights is None:
        hint = "give the file: `fedmedgan study sign --weights FILE`"
        raise ModelError("MODEL_HASH", "the study starts from weights that were not given", "--weights", hint=hint)
    checkpoint.load_networks(_read(weights, study), *recipes.load(study).networks())
    return weights.read_bytes()


def keep(home: Path, content: bytes) -> None:
    """Put what `check` gave into the home."""
    if content:
        checkpoint.write_bytes(home / WEIGHTS, content)


def _read(path: Path, study: Study) -> checkpoint.Arrays:
    arrays, _ = checkpoint.read(path)
    if checkpoint.content_hash(arrays) != study.gan.pretrained:
        raise ModelError("MODEL_HASH", "these are not the initial weights that the study names", path.name)
    return arrays
