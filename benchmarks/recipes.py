"""Every recipe as a user trains it: `fedmedgan simulate`, three hospitals of phantoms, encrypted and private.

    python benchmarks/recipes.py --only cdcgan pix2pix-denoise

Each study takes minutes: ten rounds or fewer at 32 pixels, so that all recipes can be seen to work, not to shine. The
command's own comparison arms say what the training is worth: each hospital alone, and all of them without privacy. How
good images get with more time and more patients stands on the other pages of docs/results/.

Rows are kept in benchmarks/results/recipes.json: a row of the same case replaces the earlier one, and
docs/results/recipes.md is written anew from all of them. All images, also the training images, are drawn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _quality import DOCS, kept_rows, to_toml
from _results import machine, write
from PIL import Image

from fedmedgan.client.release import pictures
from fedmedgan.shared.study import from_dict

PATIENTS = (300, 260, 220)
EPSILON, DELTA = 8.0, 1e-4
SYNTHESIS = {
    "gan": {"norm": "none", "generator_norm": "batch"},
    "training": {"discriminator_lr": 2e-3, "generator_lr": 1e-3, "discriminator_steps": 4},
}
ONE_CLASS = {"images": {"classes": ["clear"]}}
PAIRS = {
    "gan": {"recipe": "pix2pix", "private": "both", "generator_norm": "none", "norm": "none"},
    "training": {"rounds": 6, "discriminator_steps": 1, "generator_lr": 3e-3, "discriminator_lr": 5e-4},
}
CASES: dict[str, list[dict[str, dict]]] = {
    "cdcgan": [SYNTHESIS],
    "acgan": [SYNTHESIS, {"gan": {"recipe": "acgan"}}],
    "wgan": [SYNTHESIS, {"gan": {"recipe": "wgan"}}],
    "wgan_gp": [SYNTHESIS, {"gan": {"recipe": "wgan_gp", "generator_norm": "group"}}],
    "dcgan": [SYNTHESIS, ONE_CLASS, {"gan": {"recipe": "dcgan"}}],
    "vanilla": [SYNTHESIS, ONE_CLASS, {"gan": {"recipe": "vanilla", "generator_norm": "group"}}],
    **{
        f"pix2pix-{task}": [PAIRS, {"gan": {"task": task}}]
        for task in ("denoise", "super-resolution-2", "super-resolution-4", "k-space")
    },
    "pix2pix-paired": [PAIRS, {"gan": {"task": "paired"}, "images": {"paired": True}}],
    "cyclegan": [PAIRS, {"gan": {"recipe": "cyclegan"}}],
}
"""What each study says beside the common part, the later over the earlier."""


@dataclass(frozen=True)
class Row:
    """One run of the command."""

    case: str
    recipe: str
    method: str
    epsilon: float
    """The largest of all hospitals."""
    private_steps: int
    """Of each hospital, over all rounds, of all networks that read patients."""
    bytes_up: int
    """Encrypted, of one hospital in one round."""
    outside_training: float
    """Share of all computing: encryption, sums, updates."""
    minutes: float
    """Of the whole command: phantoms, keys, rounds, five arms and the report."""
    scores: dict[str, dict[str, float | None]]
    """Measure -> arm -> number; "alone" is the mean of three arms."""


def study_values(case: str) -> dict[str, Any]:
    """The study file of a case."""
    values: dict[str, Any] = {
        "name": case.replace("_", "-"),
        "sites": [{"name": name, "patients": n} for name, n in zip(("north", "south", "west"), PATIENTS, strict=True)],
        "images": {"size": 32},
        "gan": {"ema": 0.8},
        "training": {"rounds": 10, "local_steps": 20, "patients_per_step": 48},
        "privacy": {"epsilon": EPSILON, "delta": DELTA},
    }
    for sections in CASES[case]:
        for name, section in sections.items():
            values[name] = values.get(name, {}) | section
    return values


def run(case: str, folder: Path) -> Row:
    """Simulate, and draw what came out."""
    values = study_values(case)
    study, file, out = from_dict(values), folder / f"{case}.toml", folder / case
    file.write_text(to_toml(values), encoding="utf-8")
    command = [str(Path(sys.executable).with_name("fedmedgan")), "simulate", str(file), "--arms", "--device", "cpu"]
    began = time.perf_counter()
    subprocess.run([*command, "--out", str(out)], check=True)
    minutes = (time.perf_counter() - began) / 60
    found = json.loads((out / "report.json").read_text(encoding="utf-8"))
    _draw(case, found, out)
    arms = {arm["name"]: numbers(arm) for arm in found["arms"]}
    alone = [of for name, of in arms.items() if name.startswith("alone-")]
    last = found["rounds"][-1]
    return Row(
        case=case,
        recipe=study.gan.recipe,
        method=found["hospitals"][0]["method"],
        epsilon=found["privacy"]["epsilon"],
        private_steps=found["hospitals"][0]["steps"],
        bytes_up=max(last["bytes_up"].values()),
        outside_training=found["computing"]["share_outside_training"],
        minutes=minutes,
        scores={
            name: {
                "alone": statistics.fmean(of[name] for of in alone),
                "federated": value,
                "no-privacy": arms["no-privacy"][name],
            }
            for name, value in arms["federated"].items()
        },
    )


def numbers(arm: dict[str, Any]) -> dict[str, float]:
    """The scores of one arm, by name, for what the recipe is judged by."""
    if arm["similarity"]:
        names = ("psnr_input", "psnr", "ssim_input", "ssim", "dice")
        return {name: arm["similarity"][name] for name in names if name in arm["similarity"]}
    if arm["translation"]:
        return {
            f"kid of {way['source']} {when} to {way['target']}": _values(way[place])["kid"]
            for way in arm["translation"]
            for when, place in (("as it is", "before"), ("translated", "after"))
        }
    found = _values(arm["quality"])
    tstr = {"tstr auc": arm["tstr"]["auc"]["mean"]} if arm["tstr"] else {}
    return {**tstr, **{name: found[name] for name in ("fid", "coverage", "ms_ssim")}}


def _values(evaluation: dict[str, Any]) -> dict[str, float]:
    return {name: value for m in evaluation["measurements"] for name, value in m["values"].items()}


def _draw(case: str, found: dict[str, Any], out: Path) -> None:
    shown = {arm["name"]: arm for arm in found["arms"]}
    frames = [(shown[name]["label"], Image.open(out / shown[name]["picture"])) for name in ("federated", "no-privacy")]
    (DOCS / "recipes").mkdir(parents=True, exist_ok=True)
    (DOCS / "recipes" / f"{case}.png").write_bytes(pictures.png(pictures.film_strip(frames)))


# ---- the page

MEASURES = {
    "tstr auc": "TSTR, AUC",
    "fid": "FID",
    "coverage": "coverage",
    "ms_ssim": "MS-SSIM of pairs of images: less is more various",
    "psnr_input": "PSNR of the input (dB)",
    "psnr": "PSNR (dB)",
    "ssim_input": "SSIM of the input",
    "ssim": "SSIM",
    "dice": "Dice",
}


def page(rows: Sequence[dict[str, Any]]) -> str:
    """docs/results/recipes.md, from every row that is kept."""
    table = [
        "| study | gradients by | epsilon | private steps | up, a round and hospital | outside training | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    table += [
        f"| [`{r['case']}`](#{r['case']}) | {r['method']} | {r['epsilon']:.2f} | {r['private_steps']} "
        f"| {r['bytes_up'] / 1e3:,.0f} kB | {r['outside_training']:.1%} | {r['minutes']:.1f} |"
        for r in rows
    ]
    hardware = machine()
    return f"""\
# Every recipe, as the command trains it

`fedmedgan simulate`: three hospitals of {", ".join(map(str, PATIENTS))} phantom patients, 32 x 32 pixels, every update
encrypted, epsilon at most {EPSILON:g} at delta {DELTA:g} for each patient. Minutes are those of the whole command on
{hardware["cores"]} cores of {hardware["cpu"]} that were also busy with other work: drawing phantoms, keys, rounds, the
five arms that the scores below come from, and the report. "Outside training" is the share of all computing
that goes into encryption, sums and updates.

{chr(10).join(table)}

These runs show that each recipe trains, federated, encrypted and private, and what its report says. They are short and
their hospitals small; the other pages of [docs/results](README.md) show what longer runs on real images reach. FID, KID
and coverage use features trained on phantoms: compare them within this page only.

{(chr(10) * 2).join(_block(r) for r in rows)}
"""


def _block(row: dict[str, Any]) -> str:
    lines = [
        "| | one hospital alone, private (mean of three) | federated, private | federated, WITHOUT privacy |",
        "|---|---|---|---|",
    ]
    for name, of in row["scores"].items():
        cells = (f"{of[arm]:.3f}" for arm in ("alone", "federated", "no-privacy"))
        lines.append(f"| {MEASURES.get(name, name)} | {' | '.join(cells)} |")
    return (
        f"## {row['case']}\n\n{chr(10).join(lines)}\n\n![Images of the two federated arms](recipes/{row['case']}.png)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for case in settings.only:
            row = run(case, Path(folder))
            print(json.dumps(asdict(row)), flush=True)
            rows = kept_rows("recipes", asdict(row), ("case",))
            _keep(sorted(rows, key=lambda r: list(CASES).index(r["case"])))


def _keep(rows: list[dict[str, Any]]) -> None:
    write(
        "recipes",
        command="python benchmarks/recipes.py",
        packages=("torch", "opacus", "tenseal", "flwr"),
        rows=rows,
        figures={f"{r['case']}_minutes": r["minutes"] for r in rows},
        notes=["scores are those of the command's own comparison arms, on phantoms whom no hospital holds"],
    )
    (DOCS / "recipes.md").write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
