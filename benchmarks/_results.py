"""What every benchmark writes: command, versions, machine, rows, and the figures that pages quote."""

from __future__ import annotations

import json
import math
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Processor, cores, memory and system; no host name and no path."""
    cpu = platform.processor() or "unknown"
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "os": f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}",
    }


def write(
    name: str,
    *,
    command: str,
    packages: tuple[str, ...],
    rows: list[dict],
    figures: dict,
    notes: list[str],
    keep_other: str = "",
) -> Path:
    """Write `results/<name>.json`; floats keep four significant digits.

    Args:
        keep_other: a field of the rows. Rows with other values of it, their figures and their notes stay as they are in
            the file, if they were measured on the same machine. Each row names its figure in "figure", each note
            begins with the value of the field.
    """
    if keep_other:
        rows, figures, notes = _merged(FOLDER / f"{name}.json", keep_other, rows, figures, notes)
    data = {
        "command": command,
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        "machine": machine(),
        "date": datetime.now(UTC).date().isoformat(),
        "notes": notes,
        "figures": _rounded(figures),
        "rows": _rounded(rows),
    }
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def _merged(path: Path, field: str, rows: list[dict], figures: dict, notes: list[str]) -> tuple[list, dict, list]:
    """New rows, figures and notes beside those of other parts of the same benchmark."""
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if old.get("machine") != machine():
        return rows, figures, notes
    new = tuple({row[field] for row in rows})
    kept = [row for row in old["rows"] if row[field] not in new]
    names = {row["figure"] for row in kept}
    return (
        kept + rows,
        {name: value for name, value in old["figures"].items() if name in names} | figures,
        [note for note in old["notes"] if not note.startswith(tuple(f"{value}:" for value in new))] + notes,
    )


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    if isinstance(value, float) and value and math.isfinite(value):
        return round(value, 3 - math.floor(math.log10(abs(value))))
    return value
