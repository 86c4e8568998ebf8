"""Public sets as arrays, and one training run on them: what the benchmarks of quality share.

Runs are trained in this process, in the clear, by the hospitals' own code (simulations/in_the_clear.py); epsilon is
that of the steps, by the hospitals' own accountants. Real images are only read: pictures show synthetic and drawn ones.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _results import FOLDER
from torch import nn
from torch.nn import functional

from fedmedgan.client import checkpoint
from fedmedgan.client.data.outcomes import FolderReport
from fedmedgan.client.data.patients import PatientImages
from fedmedgan.client.gans import recipe as recipes
from fedmedgan.client.release.holdout import split_patients
from fedmedgan.client.training.accountant import ENFORCED
from fedmedgan.client.training.local_round import LocalTrainer, PatientSampler
from fedmedgan.client.training.randomness import SystemRandom
from fedmedgan.client.training.witness import NoWitness
from fedmedgan.shared.privacy.accounting import calibrate_noise
from fedmedgan.shared.privacy.budget import preview
from fedmedgan.shared.privacy.events import TrainingSteps
from fedmedgan.shared.study import MIN_SITES, Study, from_dict
from fedmedgan.simulations import in_the_clear

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs" / "results"


def shared_data() -> Path:
    """Where the public sets are."""
    return Path(os.environ.get("FEDMEDGAN_SHARED_DATA", ROOT.parent / "shared" / "data"))


@dataclass(frozen=True)
class Set:
    """Images (N, 1, S, S) float32 in [-1, 1] and labels (N,) int64, for training and for testing."""

    name: str
    images: np.ndarray
    labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: tuple[str, ...]
    patients: np.ndarray | None = None
    """(N,) int64 of the training images, 0..P-1; None: each image is a patient of its own."""

    @property
    def patient_labels(self) -> np.ndarray:
        """Class of each patient, that of the first image."""
        if self.patients is None:
            return self.labels
        return self.labels[np.unique(self.patients, return_index=True)[1]]

    def of_patients(self, chosen: np.ndarray) -> PatientImages:
        """The training images of these patients, as a hospital's."""
        patient_N = np.arange(len(self.labels)) if self.patients is None else self.patients
        rows = np.flatnonzero(np.isin(patient_N, chosen))
        _, number = np.unique(patient_N[rows], return_inverse=True)
        images, n = self.images[rows].astype(np.float16), len(chosen)
        return PatientImages(images, self.labels[rows], number, n, FolderReport((), len(rows), n), ())


def mnist(name: str) -> Set:
    """The set "mnist" or "fashion-mnist", 28 x 28."""
    folder = shared_data() / name

    def read(part: str) -> tuple[np.ndarray, np.ndarray]:
        images = gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())
        labels = gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())
        pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 1, 28, 28)
        return _scaled(pixels), np.frombuffer(labels, np.uint8, offset=8).astype(np.int64)

    return Set(name, *read("train"), *read("t10k"), tuple(f"class {digit}" for digit in range(10)))


def pneumonia() -> Set:
    """PneumoniaMNIST, 28 x 28: 4,708 radiographs of children to train on, 624 to test on."""
    found = np.load(shared_data() / "medmnist" / "pneumoniamnist.npz")
    parts = [
        part
        for name in ("train", "test")
        for part in (_scaled(found[f"{name}_images"][:, None]), found[f"{name}_labels"].ravel().astype(np.int64))
    ]
    return Set("pneumoniamnist", *parts, ("normal", "pneumonia"))


def _scaled(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float32) / 127.5 - 1


def two_hospitals(size: int) -> Set:
    """chest-xray-sites: the class is the hospital. A quarter of the patients is held out."""
    images, labels, patients = [], [], []
    for number, name in enumerate(("gwcmc", "nih-cc")):
        found = np.load(shared_data() / "chest-xray-sites" / f"{name}.npz")
        pixels = torch.from_numpy(_scaled(found["images"][:, None]))
        images.append(functional.interpolate(pixels, size=(size, size), mode="area").numpy())
        labels.append(np.full(len(pixels), number))
        patients.append(found["patient_id"])
    every, label_N = np.concatenate(images), np.concatenate(labels)
    _, patient_N = np.unique(np.concatenate(patients), return_inverse=True)
    kept, held = split_patients(patient_N, 0.25, seed=20_240)
    _, numbered = np.unique(patient_N[kept], return_inverse=True)
    return Set("two-hospitals", every[kept], label_N[kept], every[held], label_N[held], ("gwcmc", "nih"), numbered)


@dataclass(frozen=True)
class Trained:
    """What one run gave."""

    study: Study
    generator: nn.Module
    seconds: float
    sigma: float | None
    epsilon: float | None
    """The largest of all sites; None without privacy."""
    method: str


def study_for(data: Set, sizes: Sequence[int], *, epsilon: float | None, delta: float, **sections: dict) -> Study:
    """A study of that many sites. The roster needs three; one site alone is trained without the others."""
    return from_dict(study_values(data, sizes, epsilon=epsilon, delta=delta, **sections))


def study_values(
    data: Set, sizes: Sequence[int], *, epsilon: float | None, delta: float, **sections: dict
) -> dict[str, Any]:
    """What a study file of that many sites says."""
    patients = [*sizes, *[sizes[-1]] * max(0, MIN_SITES - len(sizes))]
    return {
        "name": data.name,
        "sites": [{"name": f"site-{i + 1}", "patients": n} for i, n in enumerate(patients)],
        "images": {"size": data.images.shape[-1], "classes": data.classes},
        "privacy": {"epsilon": epsilon, "delta": delta} if epsilon else "none",
        **sections,
    }


def to_toml(values: dict[str, Any]) -> str:
    """A study file."""
    plain = {key: value for key, value in values.items() if isinstance(value, str)}
    lines = [f"{key} = {json.dumps(value)}" for key, value in plain.items()]
    for site in values["sites"]:
        lines += ["", "[[sites]]", *(f"{key} = {json.dumps(value)}" for key, value in site.items())]
    for name, section in values.items():
        if isinstance(section, dict):
            lines += ["", f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in section.items())]
    return "\n".join(lines) + "\n"


def kept_rows(name: str, new: dict[str, Any], same: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of `results/<name>.json` with this one added, in place of an earlier one that is equal in `same`."""
    path = FOLDER / f"{name}.json"
    known = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    return [row for row in known if any(row[key] != new[key] for key in same)] + [new]


def settings_of(study: Study) -> dict[str, Any]:
    """What a row says of how it was made; `networks` is the hash of the untrained networks of that day."""
    weights = checkpoint.flatten(checkpoint.network_arrays(*recipes.load(study).networks()))
    return {
        "gan": study.gan.model_dump(mode="json"),
        "training": study.training.model_dump(mode="json"),
        "networks": hashlib.sha256(weights.tobytes()).hexdigest()[:16],
        "threads": torch.get_num_threads(),
    }


def train(study: Study, parts: Sequence[PatientImages], *, device: str = "cpu") -> Trained:
    """One run on these sites' images, each as many patients as the study declares."""
    recipe, random, trainers, sigmas = recipes.load(study), SystemRandom(), [], []
    for site, part in zip(study.sites, parts, strict=False):
        rate = study.sampling_rate(site)
        sigma = None
        if study.is_private:
            p = study.privacy
            sigma = calibrate_noise(epsilon=p.epsilon, delta=p.delta, sampling_rate=rate, steps=study.total_steps)
        sigmas.append(sigma)
        trainers.append(
            LocalTrainer(
                study,
                *recipe.networks(),
                PatientSampler(part, rate, random),
                noise_multiplier=sigma,
                random=random,
                device=torch.device(device),
                witness=NoWitness(),
            )
        )
    start, began = recipe.networks(), time.perf_counter()
    model = in_the_clear.train(study, trainers, [part.n_patients for part in parts], start)
    seconds = time.perf_counter() - began
    generator = in_the_clear.generator_of(model, start[0])
    return Trained(study, generator, seconds, sigmas[0], _epsilon(study, len(parts)), trainers[0].method)


def _epsilon(study: Study, sites: int) -> float | None:
    if not study.is_private:
        return None
    p, found = study.privacy, []
    for site in study.sites[:sites]:
        rate = study.sampling_rate(site)
        sigma = calibrate_noise(epsilon=p.epsilon, delta=p.delta, sampling_rate=rate, steps=study.total_steps)
        steps = [TrainingSteps(sigma, rate, study.total_steps)]
        found.append(preview([], steps, delta=p.delta, ceiling=0.0, accountants=ENFORCED).after_epsilon)
    return max(found)
