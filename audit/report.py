"""The page of an audit report.

The first two printed pages are for a board that reads nothing else: what was promised and spent, who saw what, what was
tested, what cannot be shown, and where to sign. The page loads nothing and runs no script; every value is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fedmedgan.audit import charts, words
from fedmedgan.audit.spending import STATES, evenly

TABLE_ROWS = 40


def page(found: Mapping[str, Any]) -> str:
    """The report as one HTML page.

    Args:
        found: what `facts.facts` gathered.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        up=words.rounded_up, near=words.nearest, at_most=words.at_most, plain=words.plain,
        count=words.count, when=words.when, g=lambda value: f"{value:g}",
    )  # fmt: skip
    return environment.get_template("report.html").render(
        s=found,
        verdict_lines=_verdict(found),
        tests=_tests(found),
        round_rows=evenly(found["rounds"], TABLE_ROWS),
        states=STATES,
        titles=words.QUESTIONS,
        chart=Markup(_chart(found)),
        certainties=[(e, words.certainty(e)) for e in (1, 2, 4, 8)],
    )


def _verdict(found: Mapping[str, Any]) -> list[str]:
    tests = [*found["checks"], *found["attacks"]]
    wrong = [item for item in tests if item["verdict"] == "failed"]
    if wrong:
        codes = ", ".join(dict.fromkeys(item.get("code") or item["attack"] for item in wrong))
        first = f"NOT in order: {words.plural(len(wrong), 'test')} of {len(tests)} failed: {codes}."
    elif found["insecure_noise"]:
        first = "NOT in order: the noise was seeded."
    else:
        passed = sum(item["verdict"] == "passed" for item in tests)
        first = f"Nothing that was tested is wrong: {passed} of {len(tests)} tests passed, none failed"
        first += "." if passed == len(tests) else f", {len(tests) - passed} were not run or had too few numbers."
    own, everything = found["privacy"], found["all_studies"]
    second = (
        f"Each patient's epsilon is at most {words.rounded_up(own['epsilon'])} of {own['ceiling']:g} in this study and"
        f" {words.rounded_up(everything['epsilon'])} of {everything['ceiling']:g} over all studies, at delta"
        f" {words.plain(own['delta'])}."
    )
    return [first, second]


def _tests(found: Mapping[str, Any]) -> list[dict[str, str]]:
    """The table of the second page: question, verdict, detail, code."""
    rows = []
    for check in found["checks"]:
        question = words.QUESTIONS.get(check["check"], check["check"])
        rows.append(
            {"question": question, "verdict": check["verdict"], "detail": check["words"], "code": check["code"]}
        )
    for attack in found["attacks"]:
        question = words.QUESTIONS[attack["attack"]]
        rows.append({"question": question, "verdict": attack["verdict"], "detail": _shown(attack), "code": ""})
    return rows


def _shown(attack: Mapping[str, Any]) -> str:
    """What an attack showed: its worst finding in words, with the confidence."""
    if not attack["findings"]:
        return "nobody ran it in this home"
    worst = next(finding for finding in attack["findings"] if finding["verdict"] == attack["verdict"])
    more = f" {len(attack['findings']) - 1} more in Annex C." if len(attack["findings"]) > 1 else ""
    return f"{worst['explanation']} Confidence {100 * worst['confidence']:g} %.{more}"


def _chart(found: Mapping[str, Any]) -> str:
    rounds = [(row["round"], row["epsilon"]) for row in found["rounds"] if row["epsilon"] is not None]
    if not rounds:
        return ""
    own, everything = found["privacy"], found["all_studies"]
    bars = [
        charts.Bar(study["name"] or study["hash"][:12], study["epsilon"], study["ceiling"])
        for study in everything["studies"]
    ]
    together = charts.Bar("all together", everything["epsilon"], everything["ceiling"])
    ends = [f"{bar.label} {words.rounded_up(bar.epsilon)} of {bar.ceiling:g}" for bar in (*bars, together)]
    alt = (
        f"Left, a line: epsilon after each round rises to {words.rounded_up(own['epsilon'])}, the study's ceiling is"
        f" {own['ceiling']:g}. Right, bars: {'; '.join(ends)}."
    )
    return charts.spent(rounds, bars, together, alt)
