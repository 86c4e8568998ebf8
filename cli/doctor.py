"""``fedmedgan site doctor``: one line for each check, and what to do about each that failed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedmedgan.cli import output
from fedmedgan.deploy.check import Check

_COLOURS = {"ok": "green", "failed": "red", "skipped": "dim"}


def doctor(
    home: Annotated[Path, typer.Option(help="The hospital's home folder.")],
    kit: Annotated[Path | None, typer.Option(help="Its start-up kit; the folder kit in the home by default.")] = None,
) -> None:
    """Look at everything that this hospital needs for a round. Changes nothing; exit code 2 if a check failed."""
    from fedmedgan.deploy.doctor import examine  # brings Flower's client along, which other commands do without

    checks = examine(home, kit)
    failed = any(check.ok == "failed" for check in checks)
    data = {"healthy": not failed, "checks": [asdict(check) for check in checks]}
    output.emit(data, lambda console: _draw(checks, console))
    if failed:
        raise typer.Exit(2)


def _draw(checks: Sequence[Check], console: Console) -> None:
    table = Table("check", "", "found")
    for check in checks:
        colour = _COLOURS[check.ok]
        table.add_row(check.name, f"[{colour}]{check.ok}[/{colour}]", escape(check.what))
    console.print(table)
    for check in checks:
        if check.ok == "failed":
            console.print(escape(f"{check.code}: {check.what}; {check.hint}"), soft_wrap=True)
        elif check.hint:
            console.print(escape(f"warning: {check.name}: {check.hint}"), soft_wrap=True)
