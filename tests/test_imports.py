"""What may be imported where. Import rules between rooms are import-linter's (pyproject.toml)."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("server", "client", "shared", "deploy", "audit", "simulations", "cli")


def modules() -> list[str]:
    files = [p for room in ROOMS for p in (ROOT / room).rglob("*.py") if p.name != "__init__.py"]
    return sorted("fedmedgan." + ".".join(p.relative_to(ROOT).with_suffix("").parts) for p in files)


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)


BLOCK = """
    import sys
    class Block:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in {blocked!r}:
                raise ModuleNotFoundError("blocked: " + name, name=name)
    sys.meta_path.insert(0, Block())
"""


def test_the_coordinator_needs_no_torch_and_no_opacus():
    done = run(
        BLOCK.format(blocked={"torch", "opacus", "pydicom", "safetensors", "ray"})
        + """
    import fedmedgan.server.app, fedmedgan.server.cycle, fedmedgan.server.aggregation, fedmedgan.cli.main
    assert "torch" not in sys.modules
    """
    )
    assert done.returncode == 0, done.stderr


def test_a_coordinators_install_says_what_is_missing_and_still_tells_the_price_in_privacy():
    without = (
        BLOCK.format(blocked={"torch", "opacus"})
        + """
    from fedmedgan.cli.main import run as main
    sys.argv = ["fedmedgan", *{arguments!r}]
    main()
    """
    )
    simulate = run(without.replace("{arguments!r}", "['simulate']"))
    assert simulate.returncode == 2
    assert simulate.stderr.splitlines()[-1].startswith("error[RUN_EXTRA]: torch is not installed")
    check = run(without.replace("{arguments!r}", f"['study', 'check', {str(ROOT / 'simulations' / 'study.toml')!r}]"))
    assert check.returncode == 0, check.stderr
    assert "of 8" in check.stdout


def test_the_coordinator_never_names_the_secret_key():
    for path in (ROOT / "server").rglob("*.py"):
        text = path.read_text()
        assert "HospitalCipher" not in text, path
        assert "HospitalKeys" not in text, path


@pytest.mark.slow
def test_every_module_imports_with_torchvision_blocked():
    """torchvision's wheel crashes beside the CPU build of this torch; nothing may pull it in."""
    assert len(modules()) > 30
    lines = "\n".join(f"    import {name}" for name in modules() if not name.endswith(".data.worker"))
    done = run(BLOCK.format(blocked={"torchvision"}) + lines)
    assert done.returncode == 0, done.stderr
