"""What a study's recipe, stabilisers and aggregation are, in words: read from the study alone, so without torch.

A hospital may have recipes of its own installed, so only what the study says of one is used: its name, its task, and
which networks read patients.
"""

from __future__ import annotations

from typing import Any

from fedmedgan.shared.study import Study

TASKS = {
    "denoise": "low dose to full dose",
    "super-resolution-2": "half the resolution to all of it",
    "super-resolution-4": "a quarter of the resolution to all of it",
    "k-space": "undersampled to full acquisition",
    "paired": "an image to its target",
}
OPTIMIZERS = {"fedavg": "FedAvg", "fedavgm": "FedAvgM", "fedadam": "FedAdam"}


def is_translation(study: Study) -> bool:
    """Whether images are made of images: then the generator reads patients, and so do the fakes."""
    return study.gan.private == "both"


def facts(study: Study) -> dict[str, Any]:
    """What ran, for the report and `study check`."""
    t = study.training
    generator_steps = study.steps_per_round - t.local_steps
    return {
        "name": study.gan.recipe,
        "task": study.gan.task or None,
        "task_in_words": TASKS.get(study.gan.task, study.gan.task) or None,
        "reads_patients": ["discriminator", "generator"] if is_translation(study) else ["discriminator"],
        "shared": ["generator"] if study.aggregation.share == "generator" else ["generator", "discriminator"],
        "steps_per_round": study.steps_per_round,
        "discriminator_steps": t.local_steps,
        "generator_steps_charged": generator_steps,
        "stabilisers": stabilisers(study),
        "aggregation": aggregation(study),
        "pretrained": study.gan.pretrained or None,
        "pretrained_on": study.gan.pretrained_on or None,
    }


def steps_in_words(study: Study) -> str:
    """``20 private steps``, or of which networks where both read patients."""
    n, both = study.training.local_steps, study.steps_per_round - study.training.local_steps
    kind = "private steps" if study.is_private else "steps"
    return f"{study.steps_per_round} {kind}" + (f" ({n} of the discriminator, {both} of the generator)" if both else "")


def shared_in_words(study: Study) -> str:
    """Which networks are sent."""
    if study.aggregation.share == "generator":
        return "the generator alone; each discriminator stays at its hospital"
    return "generator and discriminator"


def aggregation(study: Study) -> str:
    """``FedAvg``, or another outer optimiser with its settings."""
    a = study.aggregation
    settings = [f"learning rate {a.learning_rate:g}"] if a.learning_rate != 1 or a.optimizer != "fedavg" else []
    settings += [f"momentum {a.momentum:g}"] if a.optimizer != "fedavg" else []
    settings += [f"beta2 {a.beta2:g}", f"adaptivity {a.adaptivity:g}"] if a.optimizer == "fedadam" else []
    return OPTIMIZERS[a.optimizer] + (f" ({', '.join(settings)})" if settings else "")


def stabilisers(study: Study) -> list[str]:
    """What the study sets beside the recipe against collapse and divergence, in the order of docs/recipes.md."""
    gan, t = study.gan, study.training
    words = {
        "adaptive ratio of steps": t.adaptive,
        f"moving average of the generator ({gan.ema:g} a round)": gan.ema > 0,
        "spectral projection": t.spectral_projection,
        "weight normalisation": gan.weight_norm,
        "self-attention": gan.attention,
        f"label smoothing ({t.real_label:g})": t.real_label < 1,
        f"{t.views} views of a record": t.views > 1,
        f"penalty on fakes ({t.fake_penalty:g})": t.fake_penalty > 0,
        f"replay of {100 * t.replay:g} % of the fakes": t.replay > 0,
        f"{_norm(gan.generator_norm)} in the generator": gan.generator_norm != "group",
        f"{_norm(gan.norm)} in the discriminator": gan.norm != "group",
        "minibatch standard deviation": gan.minibatch_stddev,
    }
    return [word for word, is_set in words.items() if is_set]


def _norm(kind: str) -> str:
    return "no norm" if kind == "none" else f"{kind} norm"


def how_judged(study: Study, judged: str, *, scored: bool, tested_on: int | None, masks: bool = False) -> str:
    """How arms are judged, or why they are not.

    Args:
        judged: `Recipe.judged`.
    """
    number = f"{tested_on} " if tested_on else ""
    if not judged:
        return "The recipe does not say what its images are to be compared with: no score."
    if judged == "domains":
        unpaired = "Images of the domains are not paired, so there is no target to compare an output with: "
        as_sets = "what is made of images that were kept apart is compared with such images of the other, as sets."
        return unpaired + (as_sets if scored else "no score.")
    if judged == "images" and len(study.images.classes) == 1:
        return "There is one class, so a classifier has nothing to tell apart: no train-on-synthetic score (TSTR)."
    if not scored:
        return "No real images of other patients were given to test on: no score."
    if judged == "pairs":
        overlap = " Targets are masks: Dice and IoU, more is better, of what is brighter than the middle."
        return (
            f"Outputs for {number}real images that were kept apart are compared with their targets: PSNR and SSIM, more"
            " is nearer, and mean absolute error (MAE), less is nearer. The inputs as they are stand beside them."
            + (overlap if masks else "")
        )
    return (
        f"A classifier is trained on each arm's synthetic images alone and tested on {number}real images that were kept"
        " apart (“train on synthetic, test on real”, TSTR)."
    )
