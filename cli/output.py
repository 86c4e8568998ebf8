"""One contract for everything that a command prints.

Human text on stdout by default; with ``--format json`` exactly one envelope on stdout. Logs and progress go to stderr.
An error is one line on stderr (or the envelope with ``"status": "error"``) and exit code 2.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import typer
from rich.console import Console

from fedmedgan.shared.errors import FedMedGanError, RunError

SCHEMA_VERSION = "1"

_format: Literal["human", "json"] = "human"


def use_format(name: Literal["human", "json"]) -> None:
    """Choose the form of what this process prints."""
    global _format
    _format = name


def wants_json() -> bool:
    return _format == "json"


def refuse_existing(path: Path) -> None:
    """Raises RunError RUN_PATH where a file that is to be written is there already."""
    if path.exists():
        raise RunError("RUN_PATH", "the file exists already", str(path), hint="choose another name")


def console() -> Console:
    """Where human text goes: stdout, or stderr when stdout carries the envelope."""
    return Console(stderr=wants_json(), highlight=False)


def emit(data: dict[str, Any], human: Callable[[Console], None], error: FedMedGanError | None = None) -> None:
    """Print a result: `data` as the envelope, or whatever `human` draws.

    Args:
        error: what the result shows to be wrong: in the same envelope, or one line after the text. Exit code 2.
    """
    if wants_json():
        status = {"status": "ok"} if error is None else {"status": "error", "error": _fields(error)}
        print(json.dumps({"schema_version": SCHEMA_VERSION, **status, "data": data}, allow_nan=False))
    else:
        human(console())
        if error is not None:
            print(error.line(), file=sys.stderr)
    if error is not None:
        raise typer.Exit(2)


def emit_error(error: FedMedGanError) -> None:
    """Print an error: one line, no traceback."""
    if wants_json():
        print(json.dumps({"schema_version": SCHEMA_VERSION, "status": "error", "error": _fields(error)}))
    else:
        print(error.line(), file=sys.stderr)


def _fields(error: FedMedGanError) -> dict[str, str]:
    return {"code": error.code, "what": error.what, "where": error.where, "hint": error.hint}
