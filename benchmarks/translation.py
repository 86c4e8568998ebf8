"""Image to image on real radiographs: denoising and super-resolution (pix2pix), and two hospitals' styles (cyclegan).

    python benchmarks/translation.py --parts denoise super-resolution-2 cyclegan

pix2pix on PneumoniaMNIST, split IID among three sites: PSNR and SSIM on the 624 test images, beside the input as it is,
bicubic interpolation (or a Gaussian filter), and a plain U-Net that was trained on all images without discriminator
and privacy; federated against one site alone, with privacy and without. cyclegan between the two hospitals of
chest-xray-sites: how far each hospital's radiographs are from the other's before and after.

Rows are kept in benchmarks/results/translation.json: a row of the same task and arm replaces the earlier one, and
docs/results/translation.md is written anew from all of them. Pictures show drawn phantoms, no radiograph.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from _quality import DOCS, Set, kept_rows, pneumonia, settings_of, study_for, train, two_hospitals
from _results import machine, write
from torch import Tensor, nn
from torch.nn import functional

from fedmedgan.client.gans.parts.translation import UNet, degraded
from fedmedgan.client.release import pictures
from fedmedgan.client.release.distances import mmd_of_images
from fedmedgan.client.release.similarity import psnr, ssim
from fedmedgan.client.training.randomness import InsecureRandom
from fedmedgan.shared.study import Study
from fedmedgan.simulations import phantoms
from fedmedgan.simulations.partitions import Partition, split

SITES = 3
DELTA = 1e-4
EPSILON = 8.0
TASKS = {"denoise": "denoising, simulated low dose", "super-resolution-2": "super-resolution, half to full"}
SHOWN = 8


@dataclass(frozen=True)
class Row:
    task: str
    arm: str
    epsilon: float | None
    psnr: float
    """dB, mean over test images."""
    ssim: float
    minutes: float
    settings: dict[str, Any] | None = None
    """Of what was trained as a study."""


def sections(task: str, settings: argparse.Namespace) -> dict:
    """What all arms have in common."""
    return {
        "gan": {
            "recipe": "pix2pix",
            "private": "both",
            "task": task,
            "generator_width": 8,
            "discriminator_width": 8,
            "norm": "none",
            "generator_norm": "none",
            "ema": 0.9,
        },
        "training": {
            "rounds": settings.rounds,
            "local_steps": settings.local_steps,
            "patients_per_step": settings.patients_per_step,
            "discriminator_steps": 1,
            "generator_lr": 3e-3,
            "discriminator_lr": 5e-4,
        },
    }


def phantoms_of(size: int) -> Tensor:
    """Drawn chests, for pictures: no radiograph is shown."""
    rng = np.random.default_rng(5)
    images = phantoms.radiographs(phantoms.draw_anatomy(rng, SHOWN), np.arange(SHOWN) % 2, size, rng)
    return torch.from_numpy(images[:, None].astype(np.float32) * 2 - 1)


def _twice_as_large(images: Tensor) -> Tensor:
    return images.repeat_interleave(2, 2).repeat_interleave(2, 3)


def scored(task: str, arm: str, made: Tensor, wanted: Tensor, epsilon: float | None, minutes: float) -> Row:
    """Outputs are judged as images: cut to [-1, 1]."""
    made = made.clamp(-1, 1)
    return Row(task, arm, epsilon, float(psnr(made, wanted).mean()), float(ssim(made, wanted).mean()), minutes)


def by_hand(task: str, given: Tensor, wanted: Tensor) -> list[Row]:
    """Without learning: the input as it is, and the usual filter."""
    if task.startswith("super"):  # the input is the bicubic interpolation; what it is made of, copied
        copied = functional.interpolate(functional.avg_pool2d(wanted, 2), scale_factor=2)
        methods = {"pixels copied": copied, "bicubic: the input of all below": given}
    else:
        axis = torch.exp(-(torch.arange(-2.0, 3.0) ** 2) / 2)
        kernel = (axis[:, None] * axis[None, :])[None, None]
        padded = functional.pad(given, (2, 2, 2, 2), mode="replicate")
        methods = {"the input as it is": given, "Gaussian filter": functional.conv2d(padded, kernel / kernel.sum())}
    return [scored(task, name, made, wanted, None, 0.0) for name, made in methods.items()]


def plain_unet(study: Study, task: str, images: Tensor, seconds: float) -> nn.Module:
    """No discriminator, no privacy, all images in one place: what a network of this size can do in that time."""
    torch.manual_seed(0)
    network, began, random = UNet(study.images, study.gan), time.perf_counter(), InsecureRandom(0)
    adam = torch.optim.Adam(network.parameters(), 1e-3)
    while time.perf_counter() - began < seconds:
        wanted = images[random.integers(64, len(images))]
        adam.zero_grad()
        functional.l1_loss(network(degraded(task, wanted, random)), wanted).backward()
        adam.step()
    return network


def pix2pix(task: str, data: Set, settings: argparse.Namespace) -> list[Row]:
    parts = split(data.labels, SITES, Partition.parse("iid"), seed=1)
    sites = [data.of_patients(rows) for rows in parts]
    wanted = torch.from_numpy(data.test_images)
    given = degraded(task, wanted, InsecureRandom(0))
    rows = by_hand(task, given, wanted)
    phantom = phantoms_of(data.images.shape[-1])
    blurred = degraded(task, phantom, InsecureRandom(1))
    shown = [("input", blurred), ("target", phantom)]
    for arm, used, epsilon in (
        ("federated, private", sites, EPSILON),
        ("one site alone, private", sites[:1], EPSILON),
        ("federated, WITHOUT privacy", sites, None),
        ("one site alone, WITHOUT privacy", sites[:1], None),
    ):
        sizes = [part.n_patients for part in used]
        study = study_for(data, sizes, epsilon=epsilon, delta=DELTA, **sections(task, settings))
        done = train(study, used)
        with torch.no_grad():
            row = scored(task, arm, done.generator(given), wanted, done.epsilon, done.seconds / 60)
            rows.append(dataclasses.replace(row, settings=settings_of(study)))
            shown.insert(-1, (arm, done.generator(blurred)))
        print(row, flush=True)
    longest = max(row.minutes for row in rows) * 60
    network = plain_unet(study, task, torch.from_numpy(data.images), longest)
    with torch.no_grad():
        made = network(given)
    rows.append(scored(task, "plain U-Net, all images, WITHOUT privacy", made, wanted, None, longest / 60))
    strip = [(name, pictures.grid(_twice_as_large(images[:SHOWN]), 4)) for name, images in shown]
    (DOCS / "translation").mkdir(parents=True, exist_ok=True)
    (DOCS / "translation" / f"{task}.png").write_bytes(pictures.png(pictures.film_strip(strip)))
    return rows


@dataclass(frozen=True)
class Style:
    """Squared MMD (unbiased, RBF) between the images of one hospital and of the other: 0 is the same style."""

    task: str
    arm: str
    """Which way, and with how much privacy."""
    before: float
    after: float
    kept: float
    """SSIM between an image and its translation: how much of the anatomy is still there."""
    minutes: float
    settings: dict[str, Any]


def _sites_of_one_hospital_each(data: Set) -> list[np.ndarray]:
    """Two sites of each hospital: no site has images of both styles."""
    order = np.random.default_rng(1).permutation(len(data.patient_labels))
    return [part for own in (0, 1) for part in np.array_split(order[data.patient_labels[order] == own], 2)]


def cyclegan(settings: argparse.Namespace) -> list[Style]:
    data = two_hospitals(32)
    rows = []
    for epsilon in (EPSILON, None):
        found = _sites_of_one_hospital_each(data)
        sizes = [len(part) for part in found]
        study = study_for(
            data,
            sizes,
            epsilon=epsilon,
            delta=DELTA * 5,
            gan={
                "recipe": "cyclegan",
                "private": "both",
                "generator_width": 8,
                "discriminator_width": 8,
                "norm": "none",
                "generator_norm": "none",
                "ema": 0.9,
            },
            training=sections("denoise", settings)["training"] | {"patients_per_step": 48},
        )
        done = train(study, [data.of_patients(chosen) for chosen in found])
        shown, phantom = [("phantom", phantoms_of(32))], phantoms_of(32)
        for own, other in ((0, 1), (1, 0)):
            images = torch.from_numpy(data.test_images[data.test_labels == own])
            target = torch.from_numpy(data.test_images[data.test_labels == other])
            with torch.no_grad():
                made = done.generator(images, torch.full((len(images),), other)).clamp(-1, 1)
            rows.append(
                Style(
                    "cyclegan",
                    f"{data.classes[own]} to {data.classes[other]}, {'private' if epsilon else 'WITHOUT privacy'}",
                    before=mmd_of_images(images, target),
                    after=mmd_of_images(made, target),
                    kept=float(ssim(made, images).mean()),
                    minutes=done.seconds / 60,
                    settings=settings_of(study),
                )
            )
            print(rows[-1], flush=True)
            with torch.no_grad():
                shown.append((f"as {data.classes[other]}", done.generator(phantom, torch.full((len(phantom),), other))))
        strip = [(name, pictures.grid(_twice_as_large(images[:SHOWN]), 4)) for name, images in shown]
        name = "cyclegan-none" if epsilon is None else "cyclegan-private"
        (DOCS / "translation").mkdir(parents=True, exist_ok=True)
        (DOCS / "translation" / f"{name}.png").write_bytes(pictures.png(pictures.film_strip(strip)))
    return rows


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def page(rows: Sequence[dict[str, Any]]) -> str:
    """docs/results/translation.md, from every row that is kept."""
    blocks = []
    for task, words in TASKS.items():
        found = [r for r in rows if r["task"] == task]
        lines = ["| | epsilon | PSNR (dB) | SSIM | rounds x steps | minutes |", "|---|---|---|---|---|---|"]
        lines += [
            f"| {r['arm']} | {_number(r['epsilon'])} | {r['psnr']:.2f} | {r['ssim']:.3f} | {_steps(r)} "
            f"| {r['minutes']:.1f} |"
            for r in found
        ]
        picture = f"![Drawn phantoms, what each arm makes of them, and the target](translation/{task}.png)"
        blocks += [f"## pix2pix: {words}\n\n{chr(10).join(lines)}\n\n{picture}"] if found else []
    styles = [r for r in rows if r["task"] == "cyclegan"]
    blocks += [_of_styles(styles)] if styles else []
    return f"""\
# Image to image: pix2pix and cyclegan on real radiographs

PneumoniaMNIST (28 x 28), {SITES} sites IID, epsilon at most {EPSILON:g} at delta {DELTA:g}; each image is a record of
its own. Both networks read patients, so steps of both are charged; "steps" are those of each network. Tested on the
624 test images. "Plain U-Net" is the same generator, trained on all images in one place to be near the target, for as
long as the longest arm took. One seed a row; sites are trained one after the other in one process, in the clear, on one
thread of {machine()["cpu"]} that was also busy with other work.

{(chr(10) * 2).join(blocks)}

## What this does not show

* Noise of a low dose is simulated, and half the resolution is a mean of four pixels. Real pairs would differ.

Source images: PneumoniaMNIST (MedMNIST v2, CC BY 4.0, after Kermany et al. 2018); chest-xray-sites as in
[chest-xray.md](chest-xray.md).
"""


def _of_styles(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| | MMD before | after | SSIM to its source | rounds x steps | minutes |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {r['arm']} | {r['before']:.4f} | {r['after']:.4f} | {r['kept']:.3f} | {_steps(r)} | {r['minutes']:.1f} |"
        for r in rows
    ]
    strips = "\n\n".join(
        f"![Drawn phantoms and their translations, {name}](translation/cyclegan-{name}.png)"
        for name in ("none", "private")
    )
    return f"""\
## cyclegan: the style of one hospital to that of the other

Radiographs of two hospitals (chest-xray-sites), 32 x 32, two sites of each hospital: no site has both styles. Epsilon
at most {EPSILON:g}, of each patient with all images. Patients held out. The number is the squared maximum mean
discrepancy between images of the two hospitals: before, and after one side was translated. SSIM to its source tells
how much of the anatomy is still there. The two hospitals differ in the age of their patients, not only in style: a
translation that came all the way would have to change the anatomy.

{chr(10).join(lines)}

{strips}"""


def _steps(row: dict[str, Any]) -> str:
    training = (row["settings"] or {}).get("training")
    return f"{training['rounds']} x {training['local_steps']}" if training else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=[*TASKS, "cyclegan"], choices=[*TASKS, "cyclegan"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--local-steps", type=int, default=20)
    parser.add_argument("--patients-per-step", type=int, default=96)
    parser.add_argument("--threads", type=int, default=1)
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    for part in settings.parts:
        for row in cyclegan(settings) if part == "cyclegan" else pix2pix(part, pneumonia(), settings):
            rows = kept_rows("translation", asdict(row), ("task", "arm"))
            _keep(sorted(rows, key=lambda r: [*TASKS, "cyclegan"].index(r["task"])))


def _keep(rows: list[dict[str, Any]]) -> None:
    write(
        "translation",
        command="python benchmarks/translation.py",
        packages=("torch", "opacus"),
        rows=rows,
        figures={f"{r['task']}_{r['arm']}".replace(" ", "-").replace(",", ""): r["psnr"] for r in rows if "psnr" in r},
        notes=["PSNR and SSIM on the 624 test images of PneumoniaMNIST; MMD of cyclegan on held-out patients"],
    )
    (DOCS / "translation.md").write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
