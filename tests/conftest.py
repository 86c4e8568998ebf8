"""What several tests share: the shared data folder, a tiny study, and a prepared consortium."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import pytest

os.environ.update(FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1", RAY_USAGE_STATS_ENABLED="0")

ROOT = Path(__file__).parents[1]


def tiny_study(sites: int = 4, **sections):
    """A study that trains in a second: 28 pixels, two rounds of two steps."""
    from fedmedgan.shared.study import from_dict

    values = {
        "name": "tiny",
        "round_timeout": 120.0,
        "sites": [{"name": f"site-{i}", "patients": 24, "weight": 1 + i % 2} for i in range(sites)],
        "images": {"size": 28},
        "gan": {"generator_width": 4, "discriminator_width": 4},
        "training": {"rounds": 2, "local_steps": 2, "patients_per_step": 6, "discriminator_steps": 1},
        "privacy": {"delta": 0.01, "epsilon": 20.0},
    }
    if sections.get("gan", {}).get("private") != "both":  # those make images of images: no latent vector
        values["gan"]["latent"] = 8
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return from_dict(values)


def load_benchmark(name: str) -> ModuleType:
    """benchmarks/<name>.py: a script beside the package, not in it."""
    folder, known_as = ROOT / "benchmarks", f"{name}_benchmark"
    sys.path.insert(0, str(folder))
    try:
        found = importlib.util.spec_from_file_location(known_as, folder / f"{name}.py")
        assert found
        assert found.loader
        module = importlib.util.module_from_spec(found)
        sys.modules[known_as] = module  # its dataclasses look themselves up there
        found.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


@pytest.fixture(autouse=True)
def _human_output():
    """A test that ran a command with ``--format json`` in this process leaves nothing to the next one."""
    yield
    if output := sys.modules.get("fedmedgan.cli.output"):
        output.use_format("human")


@pytest.fixture(scope="session")
def _prepared(tmp_path_factory):
    from fedmedgan.simulations import consortium

    folder = tmp_path_factory.mktemp("consortium") / "run"
    study = consortium.prepare(tiny_study(), folder, {})
    consortium.read_data(folder, study)
    return folder, study


@pytest.fixture
def prepared(_prepared, tmp_path):
    """(run folder, study) of a consortium of four tiny hospitals on phantoms, its own copy for each test."""
    folder, study = _prepared
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    return copy, study


@pytest.fixture
def keyed(prepared):
    """The same, and the hospitals hold the key of the first epoch."""
    from fedmedgan.simulations import consortium

    consortium.give_key(*prepared)
    return prepared


@pytest.fixture
def ray_folder():
    """A short folder of our own for Ray: a killed cluster leaves a note in the shared one that others wait for."""
    folder = tempfile.mkdtemp(prefix="r")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real images; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("FEDMEDGAN_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("the folder with real images is not here (FEDMEDGAN_SHARED_DATA names another)")
    return folder
