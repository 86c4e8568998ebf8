"""``fedmedgan server``: what the coordinator does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from fedmedgan.cli import output
from fedmedgan.deploy import coordinator, superlink

app = typer.Typer(help="The coordinator: init, start, status.", no_args_is_help=True)

Folder = Annotated[Path, typer.Option(help="The coordinator's own folder.")]


@app.command()
def init(kit: Annotated[Path, typer.Option(help="The coordinator's start-up kit.")], folder: Folder) -> None:
    """Make the coordinator's folder and its signing key; again, with a newer kit, replace the kit."""
    identity = coordinator.init(kit, folder)
    path = folder / "coordinator.identity.json"

    def human(console: Console) -> None:
        console.print(f"public key   {identity.signing_key}", soft_wrap=True)
        console.print(f"fingerprint  {identity.fingerprint}", soft_wrap=True)
        console.print(f"wrote {path}, for `fedmedgan study assemble`", soft_wrap=True)

    data = {"identity": str(path), "signing_key": identity.signing_key, "fingerprint": identity.fingerprint}
    output.emit(data, human)


@app.command()
def start(
    folder: Folder,
    study: Annotated[Path | None, typer.Option(help="The study, signed by all; needed the first time.")] = None,
    catch_up: Annotated[
        bool, typer.Option("--catch-up", help="After the end, for hospitals that were away for the last sums.")
    ] = False,
) -> None:
    """Run the study until it has ended. Started again after a crash, it goes on where it was."""
    log = output.console()
    reason = superlink.start(folder, study, lambda line: log.print(escape(line), soft_wrap=True), catch_up=catch_up)
    status = coordinator.status(folder)

    def human(console: Console) -> None:
        console.print(f"ended ({reason}) after round {status['round']} of {status['rounds']}", soft_wrap=True)

    output.emit({"reason": reason, **status}, human)


@app.command()
def status(folder: Folder) -> None:
    """Where the study is."""
    now = coordinator.status(folder)

    def human(console: Console) -> None:
        state = f"the study has ended ({now['ended']})" if now["ended"] else "not running"
        state = "the server is running" if now["running"] else state
        console.print(f"study {now['study']}  hash {now['hash']}", soft_wrap=True)
        console.print(f"round {now['round']} of {now['rounds']}; {state}", soft_wrap=True)
        if now["round"]:
            sites = ", ".join(now["sites"])
            console.print(f"model {now['model_hash']} at {sites}", soft_wrap=True)
        if missing := now["last_missing"]:
            where = f"round {missing['round']}: {missing['site']} ({missing['reason']})"
            console.print(f"last missing in {where}", soft_wrap=True)

    output.emit(now, human)
