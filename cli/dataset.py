"""``fedmedgan dataset``: what is in a folder, and what a study would take of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table

from fedmedgan.cli import output
from fedmedgan.client.data.outcomes import FolderReport
from fedmedgan.client.data.patients import RADIOLOGY, check_folder
from fedmedgan.shared import study as studies
from fedmedgan.shared.errors import DataError
from fedmedgan.shared.study import Images

app = typer.Typer(help="Look at a folder of DICOM files.", no_args_is_help=True)

_MOST_LISTED = 200


@app.callback()
def dataset() -> None:
    """Look at a folder of DICOM files."""


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(help="Folder of DICOM files; sub-folders are searched.")],
    study: Annotated[Path | None, typer.Option(help="Study whose rules and classes are used.")] = None,
    modality: Annotated[list[str] | None, typer.Option(help="Take this modality; may be given several times.")] = None,
) -> None:
    """Say for each file whether it would be used, and why not.

    Without a study, radiographs and slices (CR CT DX IO MG MR NM PT PX RF XA) are taken and no labels are
    needed.
    """
    rules = studies.load(study).images if study else Images(classes=("image",), modalities=RADIOLOGY)
    if modality:
        rules = rules.model_copy(update={"modalities": tuple(name.upper() for name in modality)})
    report = _check(folder, rules)
    output.emit(report.to_json(), lambda console: _draw(report, console))
    if not report.images and not output.wants_json():
        raise DataError("DATA_EMPTY", f"no usable image among {report.sentence()}", str(folder))


def _check(folder: Path, rules: Images) -> FolderReport:
    """Check with a progress bar on stderr where a person watches."""
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("Reading", total=None)
        return check_folder(folder, rules, progress=lambda done, total: bar.update(task, completed=done, total=total))


def _draw(report: FolderReport, console: Console) -> None:
    table = Table(show_header=False)
    table.add_row("images", str(report.images))
    table.add_row("patients", str(report.patients))
    if report.targets:
        table.add_row("targets", str(report.targets))
    table.add_row("files", str(len(report.files)))
    for code, count in report.left_out.items():
        table.add_row(f"not used: {code}", str(count))
    console.print(table)
    others = [file for file in report.files if not file.used]
    for file in others[:_MOST_LISTED]:
        console.print(f"{_plain(file.path)}: {_plain(file.reason)} ({file.code})", soft_wrap=True)
    if len(others) > _MOST_LISTED:
        console.print(f"and {len(others) - _MOST_LISTED} more; --format json lists all")


def _plain(text: str) -> str:
    """Text of a file name, safe for a terminal: no control characters, no markup."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return escape(shown)
