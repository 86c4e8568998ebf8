"""``fedmedgan site``: what a hospital does around a study. Each decision is a person's, at the hospital."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedmedgan.cli import output
from fedmedgan.cli.doctor import doctor
from fedmedgan.shared.secure_sum.key_file import PASSPHRASE_VARIABLE, passphrase_from_environment

app = typer.Typer(
    help="A hospital: init, doctor, start, budget, evaluate, anomaly, rotate, leave.", no_args_is_help=True
)
app.command()(doctor)

Home = Annotated[Path, typer.Option(help="The hospital's own folder: keys, ledger, model.")]
Passphrase = Annotated[
    Path | None, typer.Option(help=f"File of mode 0600 with the passphrase of the keys; ${PASSPHRASE_VARIABLE}.")
]


def use_passphrase(file: Path | None) -> bytes | None:
    """The passphrase that opens this hospital's keys, for this process and those that it starts.

    Raises:
        CryptoError: KEY_PASSPHRASE, KEY_PERMISSIONS.
    """
    if file is not None:
        os.environ[PASSPHRASE_VARIABLE] = str(file.absolute())
    return passphrase_from_environment()


@app.command()
def init(
    kit: Annotated[Path, typer.Option(help="This hospital's start-up kit.")],
    home: Home,
    data: Annotated[Path, typer.Option(help="Folder with the DICOM files.")],
    max_epsilon: Annotated[float, typer.Option(help="Most privacy ever spent on these patients, over ALL studies.")],
    budget_book: Annotated[
        Path | None,
        typer.Option(help="Folder that ALL homes of this hospital share; fedmedgan-budget-book beside HOME."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    passphrase_file: Passphrase = None,
) -> None:
    """Make this hospital's folder: its rules, its keys. They are made here and never leave."""
    from fedmedgan.deploy import supernode

    passphrase = use_passphrase(passphrase_file)
    identity = supernode.init(
        kit,
        home,
        data=data,
        max_epsilon=max_epsilon,
        budget_book=budget_book,
        device=device,
        passphrase=passphrase,
    )
    path = home / f"{identity.name}.identity.json"

    def human(console: Console) -> None:
        console.print(f"hospital     {identity.name}", soft_wrap=True)
        console.print(f"fingerprint  {identity.fingerprint}", soft_wrap=True)
        sealed = "sealed with the passphrase" if passphrase else "not sealed: the disk should be encrypted"
        console.print(f"keys are in {home / 'keys'}, {sealed}; back them up", soft_wrap=True)
        console.print(f"send {path} to the coordinator; read the fingerprint out when they ring", soft_wrap=True)

    output.emit({"site": identity.name, "fingerprint": identity.fingerprint, "identity": str(path)}, human)


@app.command()
def start(
    home: Home,
    passphrase_file: Passphrase = None,
    runtime_port: Annotated[int | None, typer.Option(help="Loopback port of Flower's local interface.")] = None,
) -> None:
    """Take part: run the SuperNode behind the gate, until Ctrl-C or SIGTERM."""
    from fedmedgan.deploy import supernode

    use_passphrase(passphrase_file)
    log = output.console()
    supernode.start(home, runtime_port=runtime_port, say=lambda line: log.print(escape(line), soft_wrap=True))
    output.emit({"stopped": True}, lambda console: console.print("stopped"))


@app.command()
def rotate(home: Home, passphrase_file: Passphrase = None) -> None:
    """After rejected sums were looked into: allow the hospitals to agree on a new key."""
    from fedmedgan.client.joining import allow_rotation

    use_passphrase(passphrase_file)
    number = allow_rotation(home)
    said = (
        f"key epoch {number} may be replaced: before the next round, once every hospital that rejected sums allows it"
    )
    output.emit({"epoch": number}, lambda console: console.print(said, soft_wrap=True))


@app.command()
def budget(home: Home, passphrase_file: Passphrase = None) -> None:
    """What this hospital's patients have spent, what is left, and what the next round would cost."""
    from fedmedgan.client.outlook import Outlook, outlook
    from fedmedgan.shared.privacy.events import statement

    use_passphrase(passphrase_file)
    found: Outlook = outlook(home)
    scopes = (("in this study", found.in_study), ("over all studies", found.in_all))

    def human(console: Console) -> None:
        table = Table("", "spent", "ceiling", "left", "after the next round", title=f"{found.hospital}, {found.study}")
        for scope, decision in scopes:
            left = max(0.0, decision.ceiling - decision.spent_epsilon)
            after = f"{decision.after_epsilon:.3f}" if found.next_round else "-"
            numbers = (f"{decision.spent_epsilon:.3f}", f"{decision.ceiling:g}", f"{left:.3f}", after)
            table.add_row(scope, *numbers)
        console.print(table)
        if found.other_ledgers:
            console.print(f"{found.other_ledgers} other ledgers of the same patients are counted in", soft_wrap=True)
        if found.next_round is None:
            said = "no further round: every one is trained and paid, or the study is over here"
        else:
            said = f"round {found.next_round} of {found.rounds} " + ("fits" if found.fits else "WOULD BE REFUSED")
        console.print(said, soft_wrap=True)
        console.print(statement(found.in_study.spent_epsilon, found.delta, found.replace_one), soft_wrap=True)

    data = {"hospital": found.hospital, "study": found.study, "delta": found.delta, "next_round": found.next_round}
    data |= {"rounds": found.rounds, "fits": found.fits, "other_ledgers": found.other_ledgers}
    data |= {"epsilon_replace_one": found.replace_one}
    for name, (_, decision) in zip(("in_study", "in_all"), scopes, strict=True):
        data[name] = {
            "spent": decision.spent_epsilon,
            "ceiling": decision.ceiling,
            "after_next_round": decision.after_epsilon if found.next_round else None,
            "per_accountant": dict(decision.per_accountant),
        }
    output.emit(data, human)


@app.command()
def override(
    home: Home,
    signed: Annotated[Path, typer.Argument(help="What the data owner sent back: override.json.")],
    passphrase_file: Passphrase = None,
) -> None:
    """Take in the data owner's permission for a second ledger on the same patients; then sign the study again."""
    from fedmedgan.client.joining import allow_beside

    use_passphrase(passphrase_file)
    allow_beside(home, signed)
    said = "on record; now `fedmedgan study sign` again: both ledgers share one budget"
    output.emit({"override": True}, lambda console: console.print(said, soft_wrap=True))


@app.command()
def leave(home: Home, yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False) -> None:
    """Leave the study for good. The model that this hospital has stays here; it is given no further key."""
    from fedmedgan.client.joining import leave as leave_study

    if not yes and not typer.confirm("Leave the study for good?", err=output.wants_json()):
        raise typer.Exit(1)
    leave_study(home)
    said = "left: the coordinator is told at its next roll call, so let the SuperNode run until then"
    output.emit({"left": True}, lambda console: console.print(said, soft_wrap=True))
