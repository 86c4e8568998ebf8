"""PneumoniaMNIST under differential privacy: what are synthetic radiographs worth to a classifier, at which epsilon?

    python benchmarks/pneumonia.py --work DIR

One site trains in this process. Five sites go through ``fedmedgan simulate`` like anybody's: a process, a ledger and
keys for each, updates encrypted, several local steps a round. Each run has a generator seed of its own. A classifier is
trained on 4,096 synthetic images and tested on the 624 real test images (TSTR); beside it the same classifier, trained
on the real images.

Runs are kept in benchmarks/results/pneumonia.json one by one: a run of the same arm, epsilon and seed replaces the
earlier one, and docs/results/pneumonia.md is written anew from all of them. Real images become DICOM files in the work
folder, which must lie outside this repository; pictures are synthetic.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _quality import DOCS, ROOT, Set, kept_rows, pneumonia, settings_of, study_values, to_toml, train
from _results import machine, write
from matplotlib.figure import Figure
from pydicom.uid import ExplicitVRLittleEndian
from torch import nn

from fedmedgan.client.cycle import Hospital
from fedmedgan.client.release import pictures
from fedmedgan.client.release.classifiers import Utility, train_on_synthetic_test_on_real
from fedmedgan.client.release.generate import generate
from fedmedgan.shared.errors import RunError
from fedmedgan.shared.study import Study, from_dict
from fedmedgan.simulations import record
from fedmedgan.simulations.partitions import Partition, split
from fedmedgan.simulations.phantoms import Vendor, to_dicom

DELTA = 1e-5
SITES = 5
LOCAL_STEPS = 20
IMAGES = 4096
EPSILONS = (None, 10.0, 3.0, 1.0)
ARMS = {
    "one": "one site with all images",
    "five": "five sites, encrypted",
    "three": "three of the five sites",
    "alone": "one of the five sites alone",
}
"""The last two show what a further hospital is worth; they are trained in the clear in this process, one seed each."""
SHOWN = ("one", "five")
"""Arms with pictures on the page."""
GOALS: dict[tuple[str, float | None], float] = {
    ("one", 10.0): 0.92,
    ("five", 10.0): 0.91,
    ("one", 3.0): 0.91,
    ("one", 1.0): 0.88,
}
VENDOR = Vendor(
    name="medmnist",
    manufacturer="as published",
    model="PNG",
    modality="DX",
    transfer_syntax=ExplicitVRLittleEndian,
    photometric="MONOCHROME2",
    bits_stored=12,
    window=True,
)
"""With a window, so that a file is read as the values that were published, to a 3,600th."""
ATTRIBUTION = """\
PneumoniaMNIST, 28 x 28: MedMNIST v2, J. Yang et al., Scientific Data 10 (2023), CC BY 4.0, after D. Kermany et al.,
Cell 172 (2018). Radiographs of children; each image is taken as a patient of its own, since the set names none."""


@dataclass(frozen=True)
class Setting:
    """What training takes; found on this set, which is public. On patients the search would cost budget."""

    steps: int
    patients_per_step: int
    discriminator_width: int = 16
    generator_lr: float = 1e-3


ONE_SITE = {
    None: Setting(1000, 256),
    10.0: Setting(1000, 256),
    3.0: Setting(600, 256, discriminator_width=8),
    1.0: Setting(400, 256, discriminator_width=8),
}
OF_FIVE = {
    None: Setting(400, 188),
    10.0: Setting(600, 188, discriminator_width=8, generator_lr=2e-3),
    3.0: Setting(400, 188, discriminator_width=8, generator_lr=2e-3),
    1.0: Setting(300, 188, discriminator_width=8, generator_lr=2e-3),
}
"""Each site adds noise for its own patients, so a step is noisier than one site's. Where noise is high a narrower
discriminator does better: fewer weights carry less of it."""


@dataclass(frozen=True)
class Row:
    """One run."""

    arm: str
    epsilon_budget: float | None
    seed: int
    auc: float
    accuracy: float
    """Both means over three seeds of the classifier."""
    epsilon: float | None
    """The largest of all sites."""
    steps: int
    patients_per_step: int
    minutes: float
    """Of training; of five sites the whole simulation, keys and encryption and all."""
    settings: dict[str, Any]


def values_of(data: Set, arm: str, epsilon: float | None, seed: int) -> dict[str, Any]:
    """The study file of a run."""
    sites, setting = (1, ONE_SITE[epsilon]) if arm == "one" else (SITES, OF_FIVE[epsilon])
    return study_values(
        data,
        [len(data.labels) // sites] * sites,
        epsilon=epsilon,
        delta=DELTA,
        gan={
            "recipe": "acgan",
            "latent": 32,
            "generator_width": 16,
            "discriminator_width": setting.discriminator_width,
            "norm": "none",
            "generator_norm": "batch",
            "ema": 0.95,
            "init_seed": seed,
        },
        training={
            "rounds": setting.steps // LOCAL_STEPS,
            "local_steps": LOCAL_STEPS,
            "patients_per_step": setting.patients_per_step,
            "discriminator_steps": 4,
            "discriminator_lr": 2e-3,
            "generator_lr": setting.generator_lr,
            "real_label": 0.9,
        },
    )


def run(data: Set, arm: str, epsilon: float | None, seed: int, work: Path) -> Row:
    values = values_of(data, arm, epsilon, seed)
    study = from_dict(values)
    if arm == "five":
        began = time.perf_counter()
        folder = simulate(values, work, f"{_word(epsilon)}-{seed}")
        seconds = time.perf_counter() - began
        generator, spent = released(folder, study)
    else:
        parts = [np.arange(len(data.labels))]
        if arm != "one":
            parts = split(data.labels, SITES, Partition.parse("iid"), seed=0)[: {"three": 3, "alone": 1}[arm]]
        sizes = [site.patients for site in study.sites]
        done = train(study, [data.of_patients(p[:n]) for p, n in zip(parts, sizes, strict=False)])
        generator, spent, seconds = done.generator, done.epsilon, done.seconds
    images, labels = generate(generator, study, IMAGES, seed=seed)
    found = train_on_synthetic_test_on_real(images, labels, data.test_images, data.test_labels)
    if seed == 1 and arm in SHOWN:
        (DOCS / "pneumonia").mkdir(parents=True, exist_ok=True)
        sheet = pictures.by_class(images, labels, len(data.classes), 12)
        (DOCS / "pneumonia" / f"{arm}-{_word(epsilon)}.png").write_bytes(pictures.png(sheet))
    return Row(
        arm=arm,
        epsilon_budget=epsilon,
        seed=seed,
        auc=found.auc,
        accuracy=found.accuracy,
        epsilon=spent,
        steps=study.total_steps,
        patients_per_step=study.training.patients_per_step,
        minutes=seconds / 60,
        settings=settings_of(study),
    )


def simulate(values: dict[str, Any], work: Path, name: str) -> Path:
    """A whole consortium on the pooled set. Returns its run folder."""
    file = work / f"{name}.toml"
    file.write_text(to_toml(values), encoding="utf-8")
    out = work / f"run-{name}-{int(time.time())}"
    command = [str(Path(sys.executable).with_name("fedmedgan")), "simulate", str(file), "--no-arms", "--device", "cpu"]
    subprocess.run([*command, "--data-pool", str(work / "pool"), "--out", str(out)], check=True)
    return out


def released(folder: Path, study: Study) -> tuple[nn.Module, float | None]:
    """The generator that the hospitals hold after the last round, and the largest epsilon of them."""
    spent = record.load(folder).final_epsilon
    generator = Hospital(folder / "hospitals" / study.sites[0].name).released_generator()
    return generator, max(spent.values()) if spent else None


def write_pool(data: Set, work: Path) -> None:
    """``pool/<class>/*.dcm``: every training image as a file of a patient of its own."""
    if work.resolve().is_relative_to(ROOT):
        raise RunError("RUN_PATH", "real radiographs are not written into the repository", str(work))
    if (work / "pool").exists():
        return
    part = work / "converting"  # renamed at the end: a half-written folder is never taken for a whole one
    for name in data.classes:
        (part / name).mkdir(parents=True, exist_ok=True)
    for number, (image, label) in enumerate(zip(data.images[:, 0], data.labels, strict=True)):
        patient, origin = f"{number:05d}", ["fedmedgan benchmark", data.name, str(number)]
        dataset = to_dicom(image / 2 + 0.5, VENDOR, patient_id=patient, study=1, origin=origin, synthetic=False)
        dataset.save_as(part / data.classes[label] / f"{patient}.dcm", enforce_file_format=True)
    part.rename(work / "pool")


# ---- the page


def page(rows: Sequence[dict[str, Any]], real: Utility) -> str:
    """docs/results/pneumonia.md, from every run that is kept."""
    table = [
        "| trained on | epsilon | AUC | accuracy | goal, AUC | seeds | D steps | in a step | minutes a run |",
        "|---|---|---|---|---|---|---|---|---|",
        f"| the real images | no privacy | {real.auc:.3f} ± {real.auc_deviation:.3f} | {real.accuracy:.3f} | | | | | |",
    ]
    for arm, epsilon, found in _groups(rows):
        aucs, first = [row["auc"] for row in found], found[0]
        goal = GOALS.get((arm, epsilon))
        spread = f" ± {statistics.stdev(aucs):.3f}" if len(aucs) > 1 else ""
        reached = "" if goal is None else f"{goal:g}: {'reached' if statistics.fmean(aucs) >= goal else 'not reached'}"
        cells = [
            ARMS[arm],
            "no privacy" if epsilon is None else f"{max(row['epsilon'] for row in found):.2f}",
            f"{statistics.fmean(aucs):.3f}{spread}",
            f"{statistics.fmean(row['accuracy'] for row in found):.3f}",
            reached,
            str(len(found)),
            f"{first['steps']:,}",
            str(first["patients_per_step"]),
            f"{statistics.fmean(row['minutes'] for row in found):.1f}",
        ]
        table.append(f"| {' | '.join(cells)} |")
    shown = "\n\n".join(
        f"### {ARMS[arm]}, {'without privacy' if epsilon is None else f'epsilon {epsilon:g}'}\n\n"
        f"![Synthetic radiographs, upper row normal, lower row pneumonia](pneumonia/{arm}-{_word(epsilon)}.png)"
        for arm, epsilon, _ in _groups(rows)
        if arm in SHOWN
    )
    return f"""\
# PneumoniaMNIST: what synthetic radiographs are worth at which epsilon

4,708 training images. A generator is trained, a small classifier learns from {IMAGES:,} of its images and is tested on
the 624 real test images. delta is {DELTA:g}, add/remove, Poisson sampling; epsilon is the larger of PRV's and PLD's.
± is the deviation over generator seeds (for the real images: over seeds of the classifier).

{chr(10).join(table)}

"In a step": patients expected, at each site. "Five sites, encrypted" are whole simulations: five processes with keys
and ledgers of their own, {LOCAL_STEPS} local steps a round; epsilon is each site's for its own patients. The other
arms of several sites are trained in the clear in one process. Minutes are those of a machine that was also busy with
other work: {machine()["cores"]} cores of {machine()["cpu"]}, no GPU.

![AUC against epsilon, a line for each arm](pneumonia/curve.png)

The settings (recipe, widths, steps, batch) were searched on this set with its own test images, in about eighty short
runs: on public data that is allowed, and it flatters every private row; by how much was not measured. On patients the
search would cost budget. "Reached" compares means: with this spread a difference of 0.005 is within chance.
{_of_earlier(rows)}

{shown}

## Data

{ATTRIBUTION}
All pictures on this page are synthetic.
"""


def _of_earlier(rows: Sequence[dict[str, Any]]) -> str:
    """Which runs are of an earlier generator: their rows do not say how they were made."""
    named = [
        f"{ARMS[arm]}, {'no privacy' if epsilon is None else f'epsilon {epsilon:g}'} (seeds {', '.join(seeds)})"
        for arm, epsilon, found in _groups(rows)
        if (seeds := [str(row["seed"]) for row in found if not row.get("settings")])
    ]
    return "" if not named else f"\nWith an earlier generator, coarser at the finest grid: {'; '.join(named)}.\n"


def _groups(rows: Sequence[dict[str, Any]]) -> list[tuple[str, float | None, list[dict[str, Any]]]]:
    keys = [(arm, epsilon) for arm in ARMS for epsilon in EPSILONS]
    found = [(*key, [r for r in rows if (r["arm"], r["epsilon_budget"]) == key]) for key in keys]
    return [group for group in found if group[2]]


def curve(rows: Sequence[dict[str, Any]], real: Utility) -> Figure:
    """AUC against epsilon: a line an arm."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    places = {epsilon: place for place, epsilon in enumerate(reversed(EPSILONS))}
    for arm, label in ARMS.items():
        found = [(places[e], [r["auc"] for r in runs]) for a, e, runs in _groups(rows) if a == arm]
        if found:
            found.sort()
            means = [statistics.fmean(aucs) for _, aucs in found]
            spreads = [statistics.stdev(aucs) if len(aucs) > 1 else 0.0 for _, aucs in found]
            axes.errorbar([x for x, _ in found], means, spreads, marker="o", capsize=3, label=label)
    axes.axhline(real.auc, color="black", linewidth=1, linestyle="--", label="the real images")
    axes.set_xticks(list(places.values()), ["no privacy" if e is None else f"epsilon {e:g}" for e in places])
    axes.set_ylabel("AUC on real test images")
    axes.grid(axis="y", linewidth=0.5)
    axes.legend(loc="lower right", frameon=False)
    return figure


def _word(epsilon: float | None) -> str:
    return "none" if epsilon is None else f"{epsilon:g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder outside the repository; keeps the DICOM files")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--epsilons", nargs="+", default=["none", "10", "3", "1"], choices=["none", "10", "3", "1"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=2)
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    data = pneumonia()
    settings.work.mkdir(parents=True, exist_ok=True)
    write_pool(data, settings.work)
    for arm in settings.arms:
        for word in settings.epsilons:
            for seed in settings.seeds if arm in ("one", "five") else settings.seeds[:1]:
                row = run(data, arm, None if word == "none" else float(word), seed, settings.work)
                print(json.dumps(asdict(row)), flush=True)
                _keep(row, data)


def _keep(row: Row, data: Set) -> None:
    rows = kept_rows("pneumonia", asdict(row), ("arm", "epsilon_budget", "seed"))
    rows.sort(key=lambda r: (list(ARMS).index(r["arm"]), EPSILONS.index(r["epsilon_budget"]), r["seed"]))
    real = train_on_synthetic_test_on_real(data.images, data.labels, data.test_images, data.test_labels)
    means = {f"{a}_{_word(e)}": statistics.fmean(r["auc"] for r in found) for a, e, found in _groups(rows)}
    write(
        "pneumonia",
        command="python benchmarks/pneumonia.py",
        packages=("torch", "opacus", "tenseal", "flwr"),
        rows=rows,
        figures={**means, "real": real.auc},
        notes=["AUC of a classifier trained on synthetic images, on the real test set; figures are means over seeds"],
    )
    curve(rows, real).savefig(DOCS / "pneumonia" / "curve.png", dpi=110)
    (DOCS / "pneumonia.md").write_text(page(rows, real), encoding="utf-8")


if __name__ == "__main__":
    main()
