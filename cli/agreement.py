"""``fedmedgan study assemble | sign | collect``: from a draft and identities to a study that everybody has signed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fedmedgan.cli import output, study
from fedmedgan.cli.site import Home, Passphrase, use_passphrase
from fedmedgan.shared.agreement import Agreement, Identity
from fedmedgan.shared.agreement import assemble as assemble_study
from fedmedgan.shared.errors import RunError, StudyError
from fedmedgan.shared.secure_sum.keys import fingerprint
from fedmedgan.shared.study import MAX_FILE_BYTES, Study, load

StudyFile = Annotated[Path, typer.Argument(help="study.json, as `fedmedgan study assemble` wrote it.")]


def fingerprints(agreed: Study) -> dict[str, str]:
    """Party -> what it reads out on the telephone."""
    parties = {"coordinator": fingerprint("coordinator", agreed.coordinator_key, "", "")}
    for site in agreed.sites:
        parties[site.name] = fingerprint(site.name, site.signing_key, site.exchange_key, site.wrapping_key)
    return parties


def assemble(
    draft: Annotated[Path, typer.Argument(help="The study in TOML, without keys.")],
    identities: Annotated[list[Path], typer.Argument(help="Identity files of the coordinator and every hospital.")],
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("study.json"),
) -> None:
    """Put everybody's public keys into the study. From here on it has its hash; any change is another study."""
    files = dict.fromkeys(path.resolve() for path in identities)
    agreed = assemble_study(load(draft), [Identity.load(path) for path in files])
    if out.exists() and Agreement.load(out).study.hash != agreed.hash:
        raise RunError("RUN_PATH", "the file holds another study", str(out), hint="choose another name")
    if not out.exists():
        _write(out, Agreement(agreed).to_json())

    def human(console: Console) -> None:
        console.print(f"study {agreed.name}  hash {agreed.hash}", soft_wrap=True)
        _draw_fingerprints(console, agreed)
        console.print(f"wrote {out}: send it to every hospital, to be signed", soft_wrap=True)

    output.emit({"study": str(out), "hash": agreed.hash, "fingerprints": fingerprints(agreed)}, human)


def sign(
    agreed_file: StudyFile,
    home: Home,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask; fingerprints were compared.")] = False,
    weights: Annotated[
        Path | None, typer.Option(help="Initial weights, where the study names some: it came with the study.")
    ] = None,
    passphrase_file: Passphrase = None,
) -> None:
    """Show what a study costs and who is in it; if a person agrees, sign it and join it."""
    from fedmedgan.client.joining import join

    passphrase = use_passphrase(passphrase_file)
    agreed = Agreement.load(agreed_file).study
    refuse_needless_weights(agreed, weights)
    console = output.console()
    study.draw_cost(console, agreed, study.cost(agreed))
    _draw_fingerprints(console, agreed)
    if not yes and not typer.confirm("Compared by telephone; sign and join this study?", err=output.wants_json()):
        raise typer.Exit(1)
    agreement = join(home, agreed, passphrase, weights)
    (site,) = agreement.signatures
    path = home / f"{site}.signature.json"
    values = {"site": site, "study": agreed.hash, "signature": agreement.signatures[site]}
    _write(path, json.dumps(values, indent=1).encode() + b"\n")
    said = f"signed by {site}: send {path} to the coordinator"
    output.emit({"signature": str(path), **values}, lambda console: console.print(said, soft_wrap=True))


def refuse_needless_weights(agreed: Study, weights: Path | None) -> None:
    """Raises RunError RUN_USAGE where weights are given and the study does not start from any."""
    if weights is not None and not agreed.gan.pretrained:
        hint = "leave --weights out, or name their SHA-256 in the study: gan.pretrained"
        raise RunError("RUN_USAGE", "the study does not start from given weights", "--weights", hint=hint)


def collect(
    agreed_file: StudyFile,
    signatures: Annotated[list[Path] | None, typer.Argument(help="Signature files of hospitals.")] = None,
) -> None:
    """Put signatures under the study, and say who is missing."""
    agreement = Agreement.load(agreed_file)
    for path in signatures or []:
        values = _signature(path)
        if values["study"] != agreement.study.hash:
            raise StudyError("STUDY_SIGNATURE", "it is under another study", path.name)
        agreement = agreement.with_signature(values["site"], values["signature"])
    _write(agreed_file, agreement.to_json())
    missing = agreement.missing()

    def human(console: Console) -> None:
        console.print(f"study {agreement.study.name}  hash {agreement.study.hash}", soft_wrap=True)
        console.print(f"signed by {', '.join(sorted(agreement.signatures)) or 'nobody'}", soft_wrap=True)
        console.print(f"missing: {', '.join(missing)}" if missing else "complete: it can start", soft_wrap=True)

    data = {"hash": agreement.study.hash, "signed": sorted(agreement.signatures), "missing": list(missing)}
    output.emit(data, human)


def _draw_fingerprints(console: Console, agreed: Study) -> None:
    table = Table("party", "fingerprint, to be compared by telephone")
    for party, digits in fingerprints(agreed).items():
        table.add_row(party, digits)
    console.print(table)


def _signature(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError
        values = json.loads(path.read_bytes())
        if set(values) != {"site", "study", "signature"} or not all(isinstance(v, str) for v in values.values()):
            raise ValueError
    except OSError as error:
        raise StudyError("CONFIG_NOT_FOUND", f"cannot be read ({error.strerror})", str(path)) from None
    except (ValueError, TypeError, RecursionError):
        raise StudyError("STUDY_SIGNATURE", "this is not a signature file", path.name) from None
    return dict(values)


def _write(path: Path, content: bytes) -> None:
    try:
        part = path.with_name(f".{path.name}.part")
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        raise RunError("RUN_PATH", f"cannot be written ({error.strerror})", str(path)) from None
