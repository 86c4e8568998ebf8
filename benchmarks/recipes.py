"""Every recipe as a user trains it: `fedmedgan simulate`, three hospitals of phantoms, encrypted and private.

    python benchmarks/recipes.py --only cdcgan pix2pix-denoise

Each study takes minutes: small hospitals, a few rounds at 28 pixels, so that all recipes can be seen to work, not to
shine. How good images get with more time and more patients stands on the other pages of docs/results/.

Rows are kept in benchmarks/results/recipes.json: a row of the same case replaces the earlier one, and
docs/results/recipes.md is written anew from all of them. All images, also the training images, are drawn.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _quality import DOCS, kept_rows, settings_of, to_toml
from _results import machine, write
from PIL import Image

from fedmedgan.client.release import pictures
from fedmedgan.shared.study import Study, from_dict

SITES = {"north": 160, "south": 140, "west": 120}
"""Patients of each."""
EPSILON, DELTA = 8.0, 1e-4
SYNTHESIS = {
    "gan": {"norm": "none", "generator_norm": "batch"},
    "training": {"rounds": 10, "discriminator_lr": 2e-3, "generator_lr": 1e-3, "discriminator_steps": 4},
}
ONE_CLASS = {"images": {"classes": ["chest"]}}
PAIRS = {
    "gan": {"recipe": "pix2pix", "private": "both", "generator_norm": "none", "norm": "none"},
    "training": {"rounds": 5, "discriminator_steps": 1, "generator_lr": 3e-3, "discriminator_lr": 5e-4},
}
CASES: dict[str, list[dict[str, dict]]] = {
    "cdcgan": [SYNTHESIS],
    "acgan": [SYNTHESIS, {"gan": {"recipe": "acgan"}}],
    "wgan": [SYNTHESIS, {"gan": {"recipe": "wgan"}}],
    "wgan_gp": [SYNTHESIS, {"gan": {"recipe": "wgan_gp", "generator_norm": "group"}}],
    "dcgan": [SYNTHESIS, ONE_CLASS, {"gan": {"recipe": "dcgan"}}],
    "vanilla": [SYNTHESIS, ONE_CLASS, {"gan": {"recipe": "vanilla", "norm": "group", "generator_norm": "group"}}],
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
    method: str
    epsilon: float
    """The largest of all hospitals."""
    rounds: int
    private_steps: int
    """Of each hospital, over all rounds, of all networks that read patients."""
    bytes_up: int
    """Encrypted, of one hospital in one round."""
    outside_training: float
    """Share of all computing: encryption, sums, updates."""
    minutes: float
    """Of the whole command: phantoms, keys, rounds and the report."""
    settings: dict[str, Any]


def study_of(case: str) -> tuple[Study, str]:
    """The study of a case, and its file."""
    values: dict[str, Any] = {
        "name": case.replace("_", "-"),
        "sites": [{"name": name, "patients": n} for name, n in SITES.items()],
        "images": {"size": 28},
        "gan": {"ema": 0.8},
        "training": {"local_steps": 20, "patients_per_step": 32},
        "privacy": {"epsilon": EPSILON, "delta": DELTA},
    }
    for sections in CASES[case]:
        for name, section in sections.items():
            values[name] = values[name] | section
    return from_dict(values), to_toml(values)


def run(case: str, folder: Path) -> Row:
    """Simulate, and draw what came out."""
    (study, text), file, out = study_of(case), folder / f"{case}.toml", folder / case
    file.write_text(text, encoding="utf-8")
    command = [str(Path(sys.executable).with_name("fedmedgan")), "simulate", str(file), "--no-arms", "--device", "cpu"]
    began = time.perf_counter()
    subprocess.run([*command, "--out", str(out)], check=True)
    minutes = (time.perf_counter() - began) / 60
    found = json.loads((out / "report.json").read_text(encoding="utf-8"))
    _draw(case, out / "hospitals" / study.sites[0].name / "samples", found["rounds_done"])
    return Row(
        case=case,
        method=found["hospitals"][0]["method"],
        epsilon=found["privacy"]["epsilon"],
        rounds=found["rounds_done"],
        private_steps=found["hospitals"][0]["steps"],
        bytes_up=max(found["rounds"][-1]["bytes_up"].values()),
        outside_training=found["computing"]["share_outside_training"],
        minutes=minutes,
        settings={k: v for k, v in settings_of(study).items() if k != "threads"},  # hospitals have their own
    )


def _draw(case: str, samples: Path, rounds: int) -> None:
    """What a hospital saw before the first round, halfway, and after the last."""
    frames = [(f"after round {n}", Image.open(samples / f"round-{n:04d}.png")) for n in (0, rounds // 2, rounds)]
    (DOCS / "recipes").mkdir(parents=True, exist_ok=True)
    (DOCS / "recipes" / f"{case}.png").write_bytes(pictures.png(pictures.film_strip(frames)))


def page(rows: Sequence[dict[str, Any]]) -> str:
    """docs/results/recipes.md, from every row that is kept."""
    table = [
        "| study | gradients by | epsilon | rounds | private steps | up, a round | outside training | minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    table += [
        f"| [`{r['case']}`](#{r['case']}) | {r['method']} | {r['epsilon']:.2f} | {r['rounds']} | {r['private_steps']} "
        f"| {r['bytes_up'] / 1e3:,.0f} kB | {r['outside_training']:.1%} | {r['minutes']:.1f} |"
        for r in rows
    ]
    shown = [f"## {r['case']}\n\n![Samples before, halfway, and at the end](recipes/{r['case']}.png)" for r in rows]
    hardware = machine()
    return f"""\
# Every recipe, as the command trains it

`fedmedgan simulate`: three hospitals of {", ".join(map(str, SITES.values()))} phantom patients, 28 x 28 pixels, every
update encrypted, epsilon at most {EPSILON:g} at delta {DELTA:g} for each patient. Minutes are those of the whole
command on {hardware["cores"]} cores of {hardware["cpu"]} that were also busy with other work: drawing phantoms, keys,
rounds and the report. "Outside training" is the share of all computing that goes into encryption, sums and updates; of
so short a training it is more than of a real one. "Up" is of one hospital. Private steps of `pix2pix` and `cyclegan`
are those of both networks.

{chr(10).join(table)}

These runs show that each recipe trains federated, encrypted and private through the command. They are short and their
hospitals small: the other pages of [docs/results](README.md) show what longer runs on real images reach.

Rows of a picture are classes, or what the recipe makes of drawn ellipses: of `pix2pix` input and output (of `paired` a
mask: it learned lungs, which are dark), of `cyclegan` the input, then as each domain.

{(chr(10) * 2).join(shown)}
"""


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
        notes=["minutes of the whole command, on a machine that was also busy with other work"],
    )
    (DOCS / "recipes.md").write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
