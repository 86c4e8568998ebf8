"""Kills, bit flips, manipulations and hostile messages against the real code: how many went unnoticed?

    python benchmarks/faults                       every group; merges its figures into results/faults.json
    python benchmarks/faults ledger crypto         these groups; figures of the others stay as they were
    python benchmarks/faults --size 0.01 ledger    a small run; writes nothing

Ends with 1 if a threshold is not kept.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # so that nothing in this folder hides a library of the same name

from _results import write  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from faults.figures import Figure  # noqa: E402

PACKAGES = ("cryptography", "flwr", "numpy", "pydantic", "rfc8785", "safetensors", "tenseal")


def groups() -> dict[str, str]:
    """Every module of this folder that can measure, by the name of its group. Only those that are asked for load."""
    named = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        for name in re.findall(r'^NAME = "(\w+)"$', path.read_text(encoding="utf-8"), re.MULTILINE):
            named[name] = f"faults.{path.stem}"
    return named


def main() -> int:
    found = groups()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join(found))
    parser.add_argument("--size", type=float, default=1.0, help="1 is the full measurement")
    options = parser.parse_args()
    unknown = set(options.groups) - set(found)
    if unknown:
        parser.error(f"no such group: {', '.join(sorted(unknown))}")
    kept = True
    for name in options.groups or found:
        began = time.perf_counter()
        group = importlib.import_module(found[name])
        figures = group.measure(options.size)
        seconds = time.perf_counter() - began
        show(name, figures, seconds)
        kept = kept and all(figure.holds is not False for figure in figures)
        if options.size == 1:
            save(name, figures, seconds, getattr(group, "NOTES", []))
    return 0 if kept else 1


def save(group: str, figures: list[Figure], seconds: float, notes: list[str]) -> None:
    """Put the figures of one group beside those of the others."""
    measured = {"group": group, "date": datetime.now(UTC).date().isoformat(), "group_seconds": seconds}
    path = write(
        "faults",
        command="make bench-faults",
        packages=PACKAGES,
        rows=[figure.row() | measured for figure in figures],
        figures={figure.name: figure.measured for figure in figures},
        notes=[f"{group}: {note}" for note in notes],
        keep_other="group",
    )
    Console().print(f"{path.parent.name}/{path.name}")


def show(group: str, figures: list[Figure], seconds: float) -> None:
    table = Table(title=f"{group}, {seconds:.0f} s", title_justify="left")
    for column, side in (("figure", "left"), ("measured", "right"), ("threshold", "right"), ("", "left")):
        table.add_column(column, justify=side)
    for figure in figures:
        words = {True: "holds", False: "[red]DOES NOT HOLD[/red]", None: ""}
        table.add_row(
            figure.name,
            f"{figure.measured:,.4g}" if isinstance(figure.measured, float) else f"{figure.measured:,}",
            figure.threshold,
            words[figure.holds],
        )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
