"""The environment of every Flower process that a party runs: telemetry off, nothing fetched, nothing on the path."""

from __future__ import annotations

import os
import sys
from pathlib import Path

OFF_SWITCHES = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "DO_NOT_TRACK": "1",
}
"""Nobody outside learns that a study runs, and no package is installed while it does."""

HIJACKS = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONUSERBASE", "PYTHONINSPECT")
"""Variables that make Python run other code than what was installed."""

BIN = Path(sys.executable).parent
"""Where the scripts of this installation lie: flwr, flower-superlink, flower-supernode."""


def environment(flower_home: Path, *first: Path) -> dict[str, str]:
    """Environment for a Flower process.

    Args:
        flower_home: FLWR_HOME, where Flower keeps its configuration and what it unpacks.
        first: folders whose programs go before all others.
    """
    kept = {name: value for name, value in os.environ.items() if name not in HIJACKS}
    path = os.pathsep.join([*map(str, first), str(BIN), kept.get("PATH", os.defpath)])
    return {**kept, **OFF_SWITCHES, "FLWR_HOME": str(flower_home), "PATH": path, "PYTHONNOUSERSITE": "1"}
