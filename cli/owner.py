"""``fedmedgan owner``: the data owner, who alone may allow a second ledger on the same patients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fedmedgan.cli import output
from fedmedgan.cli.site import use_passphrase
from fedmedgan.shared.errors import PrivacyError
from fedmedgan.shared.privacy import data_owner

app = typer.Typer(help="The data owner: make a key, allow a second ledger on the same patients.", no_args_is_help=True)

PassphraseFile = Annotated[Path, typer.Option(help="File of mode 0600 with the passphrase, 12 bytes or more.")]


@app.command()
def init(
    key: Annotated[Path, typer.Argument(help="New file, on the data owner's own machine.")],
    passphrase_file: PassphraseFile,
) -> None:
    """Make the data owner's key. Its public half goes into each hospital home's policy.toml: data_owner_key."""
    public = data_owner.make_owner_key(key, _passphrase(passphrase_file))
    line = f'data_owner_key = "{public}"'
    output.emit(
        {"key": str(key), "public": public},
        lambda console: console.print(f"the hospital puts this line into its policy.toml:\n{line}", soft_wrap=True),
    )


@app.command()
def allow(
    request: Annotated[Path, typer.Argument(help="override-request.json, as the hospital's home holds it.")],
    key: Annotated[Path, typer.Option(help="The data owner's key.")],
    reason: Annotated[str, typer.Option(help="One line that names no patient; it stands in the ledger for ever.")],
    passphrase_file: PassphraseFile,
    out: Annotated[Path, typer.Option(help="What goes back to the hospital.")] = Path("override.json"),
) -> None:
    """Allow a second ledger on the same patients. It adds no budget: what both spend is counted together."""
    asked = _read(request)
    private = data_owner.load_owner_key(key, _passphrase(passphrase_file))
    others = [other["ledger"] for other in asked["others"]]
    signed = data_owner.sign_override(
        private, book_id=asked["book"], ledger_id=asked["ledger"], others=others, reason=reason
    )
    out.write_text(json.dumps(signed, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    def human(console: Console) -> None:
        console.print(f"allowed: ledger {asked['ledger'][:12]} of {asked['hospital']} beside", soft_wrap=True)
        for other in asked["others"]:
            console.print(f"  {other['ledger'][:12]} of {other['hospital']}, since {other['since']}", soft_wrap=True)
        console.print(f"send {out} back; `fedmedgan site override` takes it", soft_wrap=True)

    output.emit({"override": str(out), "ledger": asked["ledger"], "others": others}, human)


def _passphrase(file: Path) -> bytes:
    return use_passphrase(file) or b""


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(values[name], str) for name in ("book", "ledger", "hospital")):
            [(o["ledger"] + o["hospital"] + o["since"]) for o in values["others"]]
            return values
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise PrivacyError("LEDGER_OVERRIDE", "this is no request of a hospital", path.name)
