"""Comparison arms: what the same data and the same budget give in other ways.

    federated      the run itself
    alone-<site>   each hospital by itself: same steps, same sigma, so the same epsilon, spent once more
    fedavg         federated, private, plain averaging of both networks: where the study aggregates in another way
    no-privacy     federated without clipping, noise or encryption: simulation only, never for real patients

Each arm is trained by the very code of the hospitals (fedmedgan.client.training). Generated images are judged by
training a small classifier on them and testing it on real images of other patients (TSTR), and by the measures of
`quality`. A simulation may do that freely because its test patients are nobody's.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedmedgan.client import pretrained
from fedmedgan.client.cycle import Hospital
from fedmedgan.client.data.patients import PatientImages, load_patients
from fedmedgan.client.gans import recipe as recipes
from fedmedgan.client.home import SAMPLE_COLUMNS
from fedmedgan.client.release import pictures
from fedmedgan.client.release.duplicates import drop_duplicates
from fedmedgan.client.release.evaluate import train_on_synthetic_test_on_real
from fedmedgan.client.release.features import load_extractor
from fedmedgan.client.release.generate import generate
from fedmedgan.client.training.accountant import ENFORCED
from fedmedgan.client.training.local_round import LocalTrainer, PatientSampler
from fedmedgan.client.training.randomness import InsecureRandom, RandomSource, SystemRandom
from fedmedgan.shared.errors import DataError
from fedmedgan.shared.privacy.budget import preview
from fedmedgan.shared.privacy.events import TrainingSteps
from fedmedgan.shared.privacy.history import read as read_ledger
from fedmedgan.shared.study import Aggregation, Study
from fedmedgan.simulations import consortium, in_the_clear, quality

SYNTHETIC_IMAGES = 2000
EXTRACTOR = "arms/extractor.safetensors"
GIVEN = "those that were given to test on, by the word of whoever ran this"
DRAWN = "phantoms whom no hospital holds"


@dataclass(frozen=True)
class _Test:
    """What arms are tested on."""

    folders: tuple[Path, ...]
    whose: str


@dataclass(frozen=True)
class _Arm:
    name: str
    label: str
    private: bool
    sites: tuple[str, ...]
    aggregation: Aggregation | None = None
    """In place of the study's."""


def refuse_training_images(run_folder: Path, study: Study, test_folders: Sequence[Path]) -> None:
    """Raises DataError DATA_DUPLICATE where a test image is a hospital's training image: it would flatter every arm."""
    sets = [Hospital(home).load_patients() for home in consortium.homes(run_folder, study)]
    if shared := _pixels(sets) & _pixels(_test_sets(study, test_folders)):
        what = f"{len(shared)} test images are training images of a hospital"
        raise DataError("DATA_DUPLICATE", what, "--test", hint="test on images of other patients")


def run(
    run_folder: Path,
    study: Study,
    *,
    test_folders: Sequence[Path],
    whose: str = GIVEN,
    insecure_seed: int | None = None,
) -> Path:
    """Train and judge all arms, two at a time, and write ``arms.json``.

    Args:
        test_folders: labelled DICOM images of other patients, to test on; without, arms are only shown.
        whose: whom they show, in words.
    """
    everybody, promise = tuple(site.name for site in study.sites), "private" if study.is_private else "WITHOUT privacy"
    arms = [_Arm("federated", f"federated, {promise}", study.is_private, everybody)]
    arms += [_Arm(f"alone-{name}", f"{name} alone, {promise}", study.is_private, (name,)) for name in everybody]
    if study.aggregation != Aggregation():
        arms += [_Arm("fedavg", f"plain averaging, {promise}", study.is_private, everybody, Aggregation())]
    if study.is_private:
        arms += [_Arm("no-privacy", "federated, WITHOUT privacy", False, everybody)]
    (run_folder / "arms").mkdir()
    recipe, test = recipes.load(study), _Test(tuple(test_folders), whose)
    if test.folders and recipe.judged in ("images", "domains"):
        quality.extractor(study.images.size).save(run_folder / EXTRACTOR)
    workers = min(len(arms), os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        # the longest first
        order = sorted(arms, key=lambda arm: (arm.name != "no-privacy", arm.name == "federated"))
        jobs = {a.name: pool.submit(_run_arm, run_folder, study, a, test, insecure_seed) for a in order}
        compared = test.folders and recipe.judged == "images"
        reference = pool.submit(_real_baseline, run_folder, study, test) if compared else None
        rows = [jobs[arm.name].result() for arm in arms]
        real = reference.result() if reference else None
    path = run_folder / "arms.json"
    path.write_text(json.dumps({"arms": rows} | ({"real": real} if real else {}), indent=1), encoding="utf-8")
    return path


def _run_arm(run_folder: Path, study: Study, arm: _Arm, test: _Test, insecure_seed: int | None) -> dict[str, Any]:
    began = time.perf_counter()
    homes = [consortium.home_of(run_folder, name) for name in arm.sites]
    random: RandomSource = SystemRandom() if insecure_seed is None else InsecureRandom(insecure_seed)
    if arm.name == "federated":
        generator: nn.Module = Hospital(homes[0]).released_generator()
    else:
        changed = study.model_copy(update={"aggregation": arm.aggregation}) if arm.aggregation else study
        generator = _train(changed, homes, private=arm.private, random=random)
    seconds = time.perf_counter() - began
    return {
        "name": arm.name,
        "label": arm.label,
        "private": arm.private,
        "epsilon": max(_epsilon(study, home, arm) for home in homes) if arm.private else None,
        "delta": study.privacy.delta if arm.private else None,
        "picture": f"arms/{arm.name}.png",
        "seconds": seconds,
        **_judged(run_folder, study, arm, generator, test),
    }


def _judged(run_folder: Path, study: Study, arm: _Arm, generator: nn.Module, test: _Test) -> dict[str, Any]:
    """A picture of what the generator makes, and how good it is, which depends on what it is for."""
    recipe, classes = recipes.load(study), len(study.images.classes)
    path = run_folder / "arms" / f"{arm.name}.png"
    sets = _test_sets(study, test.folders)
    if recipe.judged != "images":
        sheet = pictures.grid(recipe.samples(generator, classes, SAMPLE_COLUMNS, study.gan.init_seed), SAMPLE_COLUMNS)
        path.write_bytes(pictures.png(sheet))
        if not sets or not recipe.judged:
            return {}
        if recipe.judged == "pairs":
            targets = [s.images_N1HW if s.targets_N1HW is None else s.targets_N1HW for s in sets]
            wanted = np.concatenate(targets).astype(np.float32)
            return {"similarity": quality.of_pairs(recipe, generator, *_pooled(sets), wanted, test.whose)}
        features, names = load_extractor(run_folder / EXTRACTOR), study.images.classes
        return {"translation": quality.of_translation(features, generator, *_pooled(sets), names, test.whose)}
    images, labels = generate(generator, study, SYNTHETIC_IMAGES, seed=study.gan.init_seed)
    path.write_bytes(pictures.png(pictures.by_class(images, labels, classes, SAMPLE_COLUMNS)))
    kept = drop_duplicates(images)
    as_bytes = np.round((images[kept] + 1) * 127.5).astype(np.uint8)
    np.savez_compressed(run_folder / "arms" / f"{arm.name}.npz", images_N1HW=as_bytes, labels_N=labels[kept])
    written = {"images": f"arms/{arm.name}.npz", "images_kept": len(kept), "images_dropped": len(images) - len(kept)}
    if not sets:
        return written
    features = load_extractor(run_folder / EXTRACTOR)
    found = {"quality": quality.of_images(features, images, labels, _pooled(sets)[0], test.whose)}
    judged = _is_classified(study)
    return {**written, **found, "tstr": _tstr(study, images, labels, sets) if judged else None}


def _is_classified(study: Study) -> bool:
    """Whether a classifier can judge the images: they are made from labels, of more than one class."""
    return recipes.load(study).judged == "images" and len(study.images.classes) > 1


def _epsilon(study: Study, home: Path, arm: _Arm) -> float:
    """What the arm cost this hospital's patients: by the ledger, or by the steps that the arm trained by itself."""
    hospital = Hospital(home)
    steps = [TrainingSteps(hospital.sigma, study.sampling_rate(hospital.site), study.total_steps)]
    events = read_ledger(home / "ledger.jsonl").spent(study.hash) if arm.name == "federated" else steps
    return preview([], events, delta=study.privacy.delta, ceiling=0.0, accountants=ENFORCED).after_epsilon


def _train(study: Study, homes: list[Path], *, private: bool, random: RandomSource) -> nn.Module:
    """Federated averaging in the clear over these hospitals; with one of them, plain local training."""
    hospitals, recipe = [Hospital(home) for home in homes], recipes.load(study)
    trainers = [
        LocalTrainer(
            study,
            *pretrained.networks(recipe, h.home),
            PatientSampler(h.load_patients(), study.sampling_rate(h.site), random),
            noise_multiplier=h.sigma if private else None,
            random=random,
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        )
        for h in hospitals
    ]
    start = pretrained.networks(recipe, homes[0])
    model = in_the_clear.train(study, trainers, [h.site.weight for h in hospitals], start)
    return in_the_clear.generator_of(model, start[0])


def _pooled(sets: Sequence[PatientImages]) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of several folders together."""
    images = np.concatenate([s.images_N1HW for s in sets]).astype(np.float32)
    return images, np.concatenate([s.labels_N for s in sets])


def _tstr(study: Study, images: np.ndarray, labels: np.ndarray, test: list[PatientImages]) -> dict[str, Any]:
    found = train_on_synthetic_test_on_real(images, labels, *_pooled(test))
    return {
        "accuracy": {"mean": found.accuracy, "std": found.accuracy_deviation},
        "auc": {"mean": found.auc, "std": found.auc_deviation},
        "chance": found.chance,
        "tested_on": found.tested_on,
    }


def _real_baseline(run_folder: Path, study: Study, test: _Test) -> dict[str, Any]:
    """The same of the hospitals' own images together: a ceiling for synthetic ones."""
    images, labels = _pooled([Hospital(home).load_patients() for home in consortium.homes(run_folder, study)])
    sets, features = _test_sets(study, test.folders), load_extractor(run_folder / EXTRACTOR)
    some = np.random.default_rng(0).permutation(len(labels))[:SYNTHETIC_IMAGES]
    held_out = _pooled(sets)[0]
    found = quality.of_images(features, images[some], labels[some], held_out, test.whose, are_real=True)
    judged = _is_classified(study)
    return {"label": "train on real", "quality": found, "tstr": _tstr(study, images, labels, sets) if judged else None}


def _test_sets(study: Study, folders: Sequence[Path]) -> list[PatientImages]:
    return [load_patients(folder, study.images, pseudonym_key=os.urandom(32)) for folder in folders]


def _pixels(sets: Sequence[PatientImages]) -> set[str]:
    """Hashes of the native pixels of all files that are used."""
    return {file.pixel_sha256 for s in sets for file in s.report.files if file.used}
