"""``fedmedgan kit``: start-up kits for the coordinator and each hospital."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedmedgan.cli import output
from fedmedgan.deploy import certificates, kit_config, kits
from fedmedgan.shared.errors import RunError

app = typer.Typer(help="Start-up kits: make, verify.", no_args_is_help=True)


@app.command()
def make(
    consortium: Annotated[Path, typer.Argument(help="consortium.toml: coordinator and hospitals.")],
    out: Annotated[Path, typer.Option(help="Folder for all kits; the one of last time to add a hospital.")] = Path(
        "kits"
    ),
    wheel: Annotated[Path | None, typer.Option(help="Wheel of fedmedgan to put into the kits.")] = None,
) -> None:
    """Make a kit for the coordinator and for each hospital that has none. Kits that were made stay as they are."""
    made = kits.make(kit_config.load(consortium), out, wheel)

    def human(console: Console) -> None:
        for name in made.new:
            console.print(f"made  {out / name}", soft_wrap=True)
        for name in made.kept:
            console.print(f"kept  {out / name}", soft_wrap=True)
        console.print(f"made  {out / 'coordinator'}", soft_wrap=True)
        console.print(
            f"The private key in {out / 'ca'} stays with you; each kit goes to its own party.", soft_wrap=True
        )
        console.print(f"CA fingerprint, to be compared by telephone: {made.ca_fingerprint}", soft_wrap=True)

    output.emit({"out": str(out), **asdict(made)}, human)


@app.command()
def verify(kit: Annotated[Path, typer.Argument(help="A kit's folder.")]) -> None:
    """Say which files of a kit are not as they were made."""
    different = kits.verify(kit)
    if different:
        what = "; ".join(f"{file.name}: {file.how}" for file in different)
        raise RunError("KIT_CHANGED", what, str(kit))
    fingerprint = certificates.fingerprint(certificates.load_certificate(kit / kits.CA))

    def human(console: Console) -> None:
        console.print("every file is as it was made", soft_wrap=True)
        console.print(f"CA fingerprint, to be compared by telephone: {fingerprint}", soft_wrap=True)

    output.emit({"kit": str(kit), "ca_fingerprint": fingerprint}, human)
