"""The coordinator's Flower app. It imports no torch and holds no key.

For a Flower app whose pyproject names ``fedmedgan.server.app:app`` and ``fedmedgan.client.app:app``: its configuration
``coordinator-folder`` names the coordinator's own folder, which holds ``study.json``. (The repository itself is the
simulated app, fedmedgan.simulations.flower_app.)
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedmedgan.server.cycle import Coordinator
from fedmedgan.shared.errors import CryptoError, RunError
from fedmedgan.shared.study import Study, from_agreed


def make_app(folder_of: Callable[[Context], Path]) -> ServerApp:
    """A ServerApp whose coordinator lives in the folder that `folder_of` names."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        folder = folder_of(context)
        refuse_secrets(folder)
        Coordinator(grid, load_study(folder), folder).run()

    return app


def load_study(folder: Path) -> Study:
    """The study that this coordinator was given.

    Raises:
        RunError: RUN_PATH.
        StudyError: the study is not valid, or not the one that its hash names.
    """
    try:
        agreed = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise RunError("RUN_PATH", "the coordinator's folder holds no study.json", str(folder)) from None
    return from_agreed(agreed, "study.json")


def refuse_secrets(folder: Path) -> None:
    """The server must not be able to read an update, so it does not start beside a hospital's key.

    Raises:
        CryptoError: HE_SECRET_AT_SERVER.
    """
    if (folder / "keys").exists():
        raise CryptoError("HE_SECRET_AT_SERVER", "the coordinator's folder holds keys", str(folder / "keys"))


def _folder_from_run_config(context: Context) -> Path:
    folder = context.run_config.get("coordinator-folder")
    if not isinstance(folder, str) or not folder:
        raise RunError("RUN_PATH", "the coordinator was not told its folder", "coordinator-folder")
    return Path(folder)


app = make_app(_folder_from_run_config)
