"""The coordinator's Flower app. It imports no torch, and holds no key but the one that it signs with.

For a Flower app whose pyproject names ``fedmedgan.server.app:app`` and ``fedmedgan.client.app:app``: its configuration
``coordinator-folder`` names the coordinator's own folder. (The repository itself is the
simulated app, fedmedgan.simulations.flower_app.)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedmedgan.server.cycle import Coordinator
from fedmedgan.shared.agreement import Agreement
from fedmedgan.shared.errors import CryptoError, RunError
from fedmedgan.shared.secure_sum.keys import load_signing_key

KEY_FILE = "coordinator.key"


def make_app(folder_of: Callable[[Context], Path]) -> ServerApp:
    """A ServerApp whose coordinator lives in the folder that `folder_of` names."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        run(grid, folder_of(context))

    return app


def run(grid: Grid, folder: Path) -> None:
    """Run, or go on with, the study of a coordinator's folder: `study.json` signed by all, and `coordinator.key`.

    Raises:
        StudyError: STUDY_*, the study is not valid or not signed by all.
        CryptoError: HE_SECRET_AT_SERVER, KEY_*.
        RunError, ModelError: see `Coordinator.run`.
    """
    refuse_secrets(folder)
    agreement = Agreement.load(folder / "study.json")
    Coordinator(grid, agreement, load_signing_key(folder / KEY_FILE), folder).run()


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
