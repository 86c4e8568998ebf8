"""``fedmedgan consortium``: coordinator and hospitals deployed on this machine, each a process of its own."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedmedgan.cli import output
from fedmedgan.shared.errors import ModelError


def consortium(
    study_file: Annotated[
        Path | None, typer.Argument(metavar="[STUDY]", help="Study without keys; a short one by default.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder, new or empty; default runs/consortium-TIME.")] = None,
    seconds: Annotated[float, typer.Option(min=1, max=604_800, help="Longest time that the study may take.")] = 3600.0,
) -> None:
    """Run a short study with TLS, node authentication, kits and homes of their own, and say where everything is.

    It gives the very commands that a coordinator and three hospitals would give, and prints them.
    """
    from fedmedgan.deploy.processes import Stopped, stoppable
    from fedmedgan.simulations.deployed import SHORT_STUDY, Deployed

    folder = out or Path("runs") / f"consortium-{time.strftime('%Y%m%d-%H%M%S')}"
    console = output.console()
    began = time.monotonic()
    deployed = Deployed(folder, study_file or SHORT_STUDY, lambda line: console.print(escape(line), soft_wrap=True))
    try:
        with stoppable():
            try:
                deployed.prepare()
                deployed.run(seconds)
            finally:
                deployed.stop()
    except Stopped:
        raise typer.Exit(1) from None
    parties = deployed.parties()
    if len({party.model_hash for party in parties if party.rounds == max(p.rounds for p in parties)}) != 1:
        raise ModelError("MODEL_DIVERGED", "hospitals hold different models", str(folder))
    took = time.monotonic() - began

    def human(console: Console) -> None:
        table = Table("hospital", "rounds", "epsilon spent", "model")
        for party in parties:
            spent = f"{party.epsilon:.3f} of {deployed.study.privacy.epsilon:g}"
            table.add_row(party.name, str(party.rounds), spent, party.model_hash[:16])
        console.print(table)
        places = {"coordinator": deployed.coordinator, **{party.name: party.home for party in parties}}
        places |= {"kits": deployed.folder / "kits", "logs": deployed.folder / "logs"}
        for name, place in places.items():
            console.print(f"files of {name}: {place}", soft_wrap=True)
        console.print(f"{took:.0f} s", soft_wrap=True)

    data = {
        "folder": str(deployed.folder),
        "coordinator": str(deployed.coordinator),
        "seconds": took,
        "hospitals": [{**asdict(party), "home": str(party.home)} for party in parties],
    }
    output.emit(data, human)
