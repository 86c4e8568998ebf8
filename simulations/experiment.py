"""One simulated experiment from study to report: prepare, read the data, run the cycle, compare, write."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fedmedgan.shared.errors import DataError
from fedmedgan.shared.study import Study
from fedmedgan.simulations import arms as comparison
from fedmedgan.simulations import consortium, phantoms, record, report
from fedmedgan.simulations.partitions import Pool
from fedmedgan.simulations.progress import Progress

KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
"""glibc settings of the processes that train: gradients of single rows come and go in each step, and giving that memory
back to the system and faulting it in again cost a third of a step."""
TEST_PATIENTS = 120
TEST_SEED = 10_000


@dataclass(frozen=True)
class Finished:
    """What a finished experiment tells its user."""

    run: record.RunRecord
    report: Path

    def as_dict(self) -> dict[str, Any]:
        return {
            "run_folder": str(self.report.parent),
            "report": str(self.report),
            "study_hash": self.run.study.hash,
            "rounds": self.run.rounds_done,
            "private": self.run.study.is_private,
            "epsilon": self.run.final_epsilon,
        }

    def lines(self) -> list[str]:
        privacy, rounds = self.run.study.privacy, self.run.rounds_done
        if self.run.final_epsilon is None:
            said = "WITHOUT privacy: no noise, nothing is promised to any patient; for public images only"
        else:
            spent = ", ".join(f"{site} {epsilon:.2f}" for site, epsilon in self.run.final_epsilon.items())
            said = f"epsilon {spent} of {privacy.epsilon:g} at delta {privacy.delta:g}, per patient, add/remove"
        return [f"{rounds} rounds; {said}", f"report: {self.report}"]


def run(
    study: Study,
    run_folder: Path,
    data: Mapping[str, Path],
    *,
    test_folders: Sequence[Path],
    arms: bool,
    device: str,
    ray_address: str | None,
    drops: Collection[tuple[str, int]],
    insecure_seed: int | None,
    console: Console,
    pool: Pool | None = None,
    weights: Path | None = None,
) -> Finished:
    """Run one experiment; see `fedmedgan simulate --help` for the arguments.

    Raises:
        FedMedGanError: of any kind; what was written so far stays in the run folder.
    """
    from fedmedgan.simulations import flower_app

    os.environ.update(KEEP_FREED_MEMORY | {k: os.environ[k] for k in KEEP_FREED_MEMORY if k in os.environ})
    console.print(f"study {study.name} {study.hash[:12]}: {len(study.sites)} hospitals, run folder {run_folder}")
    run_folder = run_folder.resolve()
    for folder in test_folders:
        if not folder.is_dir():
            raise DataError("DATA_PATH", "the folder of test images is not there", str(folder))
    if pool and not pool.folder.is_dir():
        raise DataError("DATA_PATH", "the pooled folder is not there", str(pool.folder))
    if arms and (data or pool):
        console.print(
            "[bold]the arms train on the given images outside the ledger, one of them WITHOUT privacy:[/bold]"
        )
        console.print("[bold]for public or research data only, never for patients whom the ledger protects[/bold]")
    if not study.is_private:
        console.print("[bold]WITHOUT privacy: for public or drawn images only, never for patients[/bold]")
    study = consortium.prepare(
        study, run_folder, data, pool=pool, weights=weights, device=device, insecure_seed=insecure_seed
    )
    consortium.read_data(run_folder, study)
    if arms and test_folders:
        comparison.refuse_training_images(run_folder, study, test_folders)
    progress = Progress(run_folder, study, console)
    progress.start()
    try:
        flower_app.run(run_folder, study, ray_address=ray_address, insecure_seed=insecure_seed, drops=drops)
    finally:
        progress.stop()
    if arms:
        console.print("comparison arms")
        whose = comparison.GIVEN
        if not test_folders and not data and not pool:
            test_folders, whose = _test_phantoms(run_folder / "test", study), comparison.DRAWN
        comparison.run(run_folder, study, test_folders=test_folders, whose=whose, insecure_seed=insecure_seed)
    page = report.write(run_folder)
    return Finished(record.load(run_folder), page)


def _test_phantoms(folder: Path, study: Study) -> list[Path]:
    """Phantom patients of every hospital's look whom no hospital holds."""
    folders = []
    for number, site in enumerate(study.sites):
        patients, vendor = TEST_PATIENTS // len(study.sites), phantoms.vendor_for(number)
        place, seed, paired = folder / site.name, TEST_SEED + number, study.images.paired
        phantoms.write_hospital(place, patients=patients, seed=seed, vendor=vendor, paired=paired)
        folders.append(place)
    return folders
