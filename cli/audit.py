"""``fedmedgan audit``: evidence about privacy, for people who take nobody's word for it. It never writes a ledger."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedmedgan.audit import words
from fedmedgan.audit.evidence import HospitalEvidence, gather
from fedmedgan.audit.spending import STATES, Spend, evenly, spending
from fedmedgan.cli import attack, output
from fedmedgan.cli.site import Home, Passphrase, use_passphrase
from fedmedgan.shared.errors import PrivacyError
from fedmedgan.shared.privacy import history as ledgers
from fedmedgan.shared.privacy.history import History
from fedmedgan.shared.privacy.records import Terms

TABLE_ROWS, BAR = 40, 14

UNIT = "one patient with all images; adding or removing one; Poisson sampling by patient"

app = typer.Typer(help="Evidence: ledger, verify, recompute, attack, report.", no_args_is_help=True)
app.add_typer(attack.app, name="attack")

Paths = Annotated[
    list[Path], typer.Argument(help="Ledgers, hospitals' homes, folders of them, or a simulation's run folder.")
]


@app.command()
def ledger(paths: Paths) -> None:
    """What was spent: round by round, of each ceiling, with every note."""
    told, drawings = [], []
    for evidence, history in _ledgers(paths):
        names = {hash: agreement.study.name for hash, agreement in evidence.agreements.items()}
        rows = spending(history)
        told.append(_ledger_facts(history, rows, names) | {"where": evidence.where})
        drawings.append((history, rows, names))

    def human(console: Console) -> None:
        for history, rows, names in drawings:
            _draw_ledger(console, history, rows, names)

    output.emit({"ledgers": told}, human)


def _ledger_facts(history: History, rows: Sequence[Spend], names: Mapping[str, str]) -> dict[str, Any]:
    studies = []
    for study in history.studies:
        terms, own = history.terms(study), [row for row in rows if row.study == study]
        assert terms is not None  # it was opened
        studies.append(
            {
                "study": study,
                "name": names.get(study, ""),
                "epsilon": own[-1].epsilon if own else 0.0,
                "ceiling": terms.ceiling,
                "delta": terms.delta,
                "closed": history.is_closed(study),
                "rounds": [row.as_dict() for row in own],
            }
        )
    latest = _latest_terms(history)
    return {
        "hospital": history.hospital,
        "ledger": history.ledger_id,
        "records": history.seq,
        "head": history.head,
        "torn_bytes": history.torn_bytes,
        "studies": studies,
        "all_studies": {
            "epsilon": rows[-1].epsilon_all if rows else 0.0,
            "ceiling": latest.total_ceiling if latest else None,
        },
    }


def _draw_ledger(console: Console, history: History, rows: Sequence[Spend], names: Mapping[str, str]) -> None:
    newest = f"{words.plural(history.seq, 'record')}, newest {history.head[:12]}"
    console.print(f"\n[bold]{history.hospital}[/bold]  {newest}", soft_wrap=True)
    if history.torn_bytes:
        console.print(f"the last line is unfinished ({history.torn_bytes} bytes): a write that was never acknowledged")
    for study in history.studies:
        terms, own = history.terms(study), [row for row in rows if row.study == study]
        assert terms is not None
        title = f"{names.get(study) or study[:12]}: ceiling {terms.ceiling:g} at delta {words.plain(terms.delta)}"
        title += ", closed" if history.is_closed(study) else ""
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
        for column in ("round", "noise", "rate", "steps", "epsilon"):
            table.add_column(column, justify="right")
        for column in ("of the ceiling", "tests", "note"):
            table.add_column(column)
        for row in evenly(own, TABLE_ROWS):
            used = words.bar(row.epsilon, terms.ceiling, BAR) if row.epsilon is not None else ""
            numbers = (f"{row.noise_multiplier:.3f}", f"{row.sampling_rate:.4f}", f"{row.steps}")
            note = escape(row.reason) if row.reason else STATES[row.state]
            table.add_row(str(row.round), *numbers, words.rounded_up(row.epsilon), used, _tests(row), note)
        console.print(table)
        if len(own) > TABLE_ROWS:
            console.print(f"{TABLE_ROWS} of {len(own)} rounds; --format json has all of them")
    latest = _latest_terms(history)
    if latest is not None:
        spent = (rows[-1].epsilon_all if rows else None) or 0.0
        used = words.bar(spent, latest.total_ceiling)
        console.print(f"all studies: {words.rounded_up(spent)} of {latest.total_ceiling:g}  {used}")
        console.print(f"epsilon by PLD, {UNIT}", style="dim")


def _latest_terms(history: History) -> Terms | None:
    """Of the study that was opened last."""
    return next((Terms.of(r.body) for r in reversed(history.records) if r.kind == "open"), None)


def _tests(row: Spend) -> str:
    if row.state != "charged":
        return ""
    if row.failed:
        return f"[red]FAILED: {', '.join(row.failed)}[/red]"
    others = [f"{name} {words.VERDICTS[verdict]}" for name, verdict in row.checks.items() if verdict != "passed"]
    return ", ".join(others) or "passed"


@app.command()
def verify(paths: Paths) -> None:
    """Is the evidence whole, signed, and what others have seen? Did every update pay? Give all hospitals at once."""
    from fedmedgan.audit.verify import verify as verify_all

    findings = verify_all([evidence for path in paths for evidence in gather(path)])
    failed = [finding for finding in findings if finding.verdict == "failed"]

    def human(console: Console) -> None:
        for ledger in dict.fromkeys((finding.hospital, finding.where) for finding in findings):
            title = ledger[0] + (f" ({ledger[1]})" if ledger[1] else "")
            table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD)
            for column in ("check", "verdict", "what was found"):
                table.add_column(column)
            for finding in findings:
                if (finding.hospital, finding.where) == ledger:
                    style = "red" if finding.verdict == "failed" else ""
                    said = f"{finding.code}: {finding.words}" if finding.code else finding.words
                    table.add_row(finding.check, words.VERDICTS[finding.verdict], escape(said), style=style)
            console.print(table)
        passed = sum(finding.verdict == "passed" for finding in findings)
        console.print(f"{passed} checks passed, {len(failed)} failed, {len(findings) - passed - len(failed)} not run")

    output.emit(
        {"findings": [finding.as_dict() for finding in findings]},
        human,
        _failure([f"{f.hospital} {f.code}" for f in failed]),
    )


@app.command()
def recompute(paths: Paths) -> None:
    """Epsilon again, from the recorded steps: each accountant, each study, and all studies of the same patients."""
    from fedmedgan.audit.recompute import Cost, all_costs, costs

    names: dict[str, str] = {}
    books: dict[str, dict[str, History]] = {}
    for evidence, history in _ledgers(paths):
        names |= {hash: agreement.study.name for hash, agreement in evidence.agreements.items()}
        same = books.setdefault(history.book, {})
        if history.studies and history.seq > same.get(history.ledger_id, History()).seq:  # the longer of two copies
            same[history.ledger_id] = history
    found: list[Cost] = []
    for same in books.values():
        found += [cost for history in same.values() for cost in costs(history)]
        found += [all_costs(list(same.values()))] if same else []
    over = [cost for cost in found if cost.epsilon > cost.ceiling]

    def human(console: Console) -> None:
        for hospital in dict.fromkeys(cost.hospital for cost in found):
            table = Table(title=hospital, title_justify="left", box=SIMPLE_HEAD)
            table.add_column("study")
            for column in ("steps", "PLD", "PRV", "RDP", "enforced", "ceiling", "replace", "delta"):
                table.add_column(column, justify="right")
            for cost in found:
                if cost.hospital == hospital:
                    table.add_row(
                        names.get(cost.study) or cost.study[:12] or "together",
                        words.count(cost.steps),
                        *(words.rounded_up(cost.accountants.get(name)) for name in ("pld", "prv")),
                        words.rounded_up(cost.rdp),
                        f"[bold]{words.rounded_up(cost.epsilon)}[/bold]",
                        f"{cost.ceiling:g}",
                        words.rounded_up(cost.replace_one),
                        words.plain(cost.delta),
                        style="red" if cost in over else "",
                    )
            console.print(table)
        console.print(f"enforced is the larger of PLD and PRV. Together: all studies. {UNIT.capitalize()}", style="dim")

    failures = [f"{cost.hospital} AUDIT_CEILING" for cost in over]
    output.emit({"costs": [cost.as_dict() for cost in found]}, human, _failure(failures))


@app.command()
def report(
    home: Home,
    study: Annotated[str, typer.Option(help="Hash of a study of this home, or its beginning; the present one.")] = "",
    out: Annotated[Path, typer.Option(help="Folder for the bundle.")] = Path(),
    others: Annotated[
        list[Path] | None,
        typer.Option("--with", help="Another hospital's ledger, home or bundle: what it has seen of this ledger."),
    ] = None,
    passphrase_file: Passphrase = None,
) -> None:
    """Everything for a board, in one sealed zip: two pages to read, and what an auditor needs to check them."""
    from fedmedgan.audit import bundle
    from fedmedgan.shared.secure_sum.keys import HospitalKeys

    keys = HospitalKeys.load(home / "keys", use_passphrase(passphrase_file))
    made = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    path, found = bundle.make(home, out=out, signing=keys.signing, made=made, study=study, others=others or [])
    own, everything = found["privacy"], found["all_studies"]

    def human(console: Console) -> None:
        for scope, spent in (("this study", own), ("all studies", everything)):
            console.print(f"{scope}: epsilon {words.rounded_up(spent['epsilon'])} of {spent['ceiling']:g}")
        for test in (*found["checks"], *found["attacks"]):
            question = words.QUESTIONS[test.get("check") or test["attack"]]
            console.print(f"  {words.VERDICTS[test['verdict']]:<8} {question}", soft_wrap=True)
        console.print(f"wrote {path}: report.html in it is for people, verify.py for auditors", soft_wrap=True)
        if not found["anchors"]:
            console.print("nobody else's word is in it: give other hospitals' ledgers with --with", soft_wrap=True)

    failures = [f"{found['hospital']['name']} {c['code']}" for c in found["checks"] if c["verdict"] == "failed"]
    failures += [f"attack {a['attack']}" for a in found["attacks"] if a["verdict"] == "failed"]
    output.emit({"bundle": str(path), "summary": found}, human, _failure(failures))


def _ledgers(paths: Sequence[Path]) -> Iterator[tuple[HospitalEvidence, History]]:
    """Every ledger that was given, verified as far as a ledger can be alone. Raises PrivacyError LEDGER_*."""
    for path in paths:
        for evidence in gather(path):
            yield evidence, ledgers.verify(evidence.ledger, evidence.where)


def _failure(failures: Sequence[str]) -> PrivacyError | None:
    """What ends a command whose table shows failures.

    Args:
        failures: hospital and code of each.
    """
    if not failures:
        return None
    what = f"{words.plural(len(failures), 'check')} failed: {', '.join(dict.fromkeys(failures))}"
    return PrivacyError("AUDIT_FAILED", what)
