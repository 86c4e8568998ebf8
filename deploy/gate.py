"""The hospital's gate: whatever the coordinator pushes, the INSTALLED fedmedgan answers, or nobody.

For every task the SuperNode's executor starts a program by its name, found through PATH, which unpacks the pushed
bundle and runs what lies in it. `site start` puts a folder first in PATH in which all of those names lead here:

task                                        what happens
a ClientApp, with the one accepted bundle   the bundle is not unpacked; the installed ClientApp answers
a ClientApp, with any other bundle          refused: an error to the server, a line in both logs, nothing unpacked
an agent, a ServerApp, a model, a plug-in   refused alike: the coordinator decides the kind of a task
Flower of another version                   refused: the private names below may no longer be what they were

The gate replaces four private names of Flower 1.41.0 (tests/test_gate.py pushes a hostile bundle through a real
SuperLink and SuperNode, and watches the same bundle run its code where there is no gate).
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flwr
from flwr.clientapp.client_app import LoadClientAppError
from flwr.supercore.constant import TASK_TYPE_TO_COMMAND
from flwr.supernode.runtime import run_clientapp as flower

from fedmedgan.shared import bundle
from fedmedgan.shared.errors import FedMedGanError, RunError
from fedmedgan.shared.eventlog import EventLog

TESTED = "1.41.0"
"""The Flower whose private names were read, replaced and tested."""
REPLACED = ("pull_task_input", "install_from_fab", "get_load_client_app_fn", "install_app_dependencies")
ALLOWED = "flwr-clientapp"


def check_flower() -> None:
    """Is this the Flower that the gate was made for?

    Raises:
        RunError: RUN_FLOWER.
    """
    version = flwr.__version__
    missing = [name for name in REPLACED if not callable(getattr(flower, name, None))]
    if version != TESTED or missing or ALLOWED not in TASK_TYPE_TO_COMMAND.values():
        what = f"the gate was made for Flower {TESTED}, this is {version}"
        raise RunError("RUN_FLOWER", what, ", ".join(missing), hint="install the version that fedmedgan pins")


def write_programs(folder: Path) -> None:
    """Write one program for each kind of task into a folder that goes first in PATH.

    Raises:
        RunError: RUN_FLOWER.
    """
    check_flower()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for command in sorted(set(TASK_TYPE_TO_COMMAND.values())):
        program = folder / command
        # -I: no PYTHONPATH, no user packages, no current folder.
        program.write_text(
            f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -I -m fedmedgan.deploy.gate {command} "$@"\n'
        )
        program.chmod(0o700)


def close_gate(command: str) -> None:
    """Replace the parts of Flower's runner that take, unpack and load the bundle.

    Args:
        command: the program that the executor started.
    """
    take = flower.pull_task_input

    def take_and_check(client: Any) -> tuple:
        message, context, run, fab = take(client)
        try:
            if command != ALLOWED:
                raise RunError("RUN_BUNDLE", f"a task for {command} was sent; only {ALLOWED} runs here", "task")
            bundle.check(fab.content)
        except FedMedGanError as error:
            print(error.line(), file=sys.stderr, flush=True)
            flower.get_load_client_app_fn = _loader(_refuse)
            home = context.node_config.get("home")
            if isinstance(home, str) and Path(home).is_dir():
                EventLog(Path(home) / "events.jsonl").write("bundle_refused", run=run.run_id, error=error.line())
        return message, context, run, fab

    flower.pull_task_input = take_and_check
    flower.install_from_fab = _nothing
    flower.install_app_dependencies = _nothing
    flower.get_load_client_app_fn = _loader(_installed)


def _loader(load: Callable[..., Any]) -> Callable[..., Callable[..., Any]]:
    return lambda **_: load


def _installed(*_: str) -> Any:
    from fedmedgan.client.app import app  # takes seconds to import, and a refusal needs none of it

    return app


def _refuse(*_: str) -> Any:
    raise LoadClientAppError("RUN_BUNDLE")


def _nothing(*_: Any, **__: Any) -> None:
    return None


def main() -> None:
    """Run one task: ``python -I -m fedmedgan.deploy.gate COMMAND [what the executor says]``."""
    command, *arguments = sys.argv[1:]
    try:
        check_flower()
    except RunError as error:
        sys.exit(error.line())
    close_gate(command)
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

    sys.argv = [ALLOWED, *arguments]
    flwr_clientapp()


if __name__ == "__main__":
    main()
