"""Everything that an audit report says about one hospital in one study, as plain values: ``summary.json``.

The page (audit/report.py) shows these and no others; audit/summary_schema.json describes them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedmedgan.audit import words
from fedmedgan.audit.findings import Finding
from fedmedgan.audit.recompute import Cost
from fedmedgan.audit.results import ATTACKS, Result
from fedmedgan.audit.spending import spending
from fedmedgan.shared.agreement import Agreement
from fedmedgan.shared.privacy.events import ADJACENCY, SAMPLING, UNIT
from fedmedgan.shared.privacy.history import History
from fedmedgan.shared.privacy.records import CHECKS, Record, failed_checks
from fedmedgan.shared.study import Study

SCHEMA_VERSION = "1"
MOST_NOTABLE = 40
_NOTABLE = ("open", "void", "rotate", "override", "close", "tail_repaired")


@dataclass(frozen=True)
class Material:
    """What a report is made of."""

    agreement: Agreement
    history: History
    findings: Sequence[Finding]
    """What `verify` found about this hospital."""
    costs: Sequence[Cost]
    """Of each study of the ledger, the audited one first."""
    all_costs: Cost
    """Of all studies of the same patients together."""
    names: Mapping[str, str]
    """study hash -> its name, as far as the home knows it"""
    anchors: Sequence[Mapping[str, Any]]
    """What others hold of this ledger: by, study, round, seq, head."""
    attacks: Sequence[Result]
    """Earlier results of `audit attack`, oldest first."""
    made: str
    """Time, as in a ledger."""


def facts(material: Material) -> dict[str, Any]:
    """What the report says, as plain values: the content of ``summary.json``."""
    study, history = material.agreement.study, material.history
    terms = history.terms(study.hash)
    rows = [row for row in spending(history) if row.study == study.hash]
    charges = [r.body for r in history.records if r.kind == "charge" and r.body["study"] == study.hash]
    opened = [r.body for r in history.records if r.kind == "open" and r.body["study"] == study.hash]
    own, checks = material.costs[0], [_check(finding) for finding in material.findings]
    attacks = [_attack(name, material.attacks) for name in ATTACKS]
    insecure = any(body["noise_source"].startswith("INSECURE") for body in charges)
    failed = insecure or any(item["verdict"] == "failed" for item in (*checks, *attacks))
    return {
        "schema_version": SCHEMA_VERSION,
        "made": material.made,
        "verdict": "failed" if failed else "passed",
        "hospital": {
            "name": history.hospital,
            "ledger": history.ledger_id,
            "signing_key": history.signing_key,
            "records": history.seq,
            "head": history.head,
        },
        "study": {
            "name": study.name,
            "hash": study.hash,
            "hospitals": [site.name for site in study.sites],
            "signed_by": sorted(material.agreement.signatures),
            "image_size": study.images.size,
            "classes": list(study.images.classes),
            "modalities": list(study.images.modalities),
            "rounds_planned": study.training.rounds,
        },
        "privacy": {
            **_cost(own),
            "unit": UNIT,
            "adjacency": ADJACENCY,
            "sampling": SAMPLING,
            "certainty": words.certainty(own.epsilon),
            "patients_declared": terms.patients if terms else study.site(history.hospital).patients,
            "rounds": len({row.round for row in rows if row.state != "voided"}),
            "reservations": len(rows),
        },
        "all_studies": {
            **_cost(material.all_costs),
            "studies": [
                {
                    "hash": cost.study,
                    "name": material.names.get(cost.study, ""),
                    "epsilon": cost.epsilon,
                    "ceiling": cost.ceiling,
                    "delta": cost.delta,
                    "closed": history.is_closed(cost.study),
                }
                for cost in material.costs
            ],
        },
        "rounds": [row.as_dict() for row in rows],
        "tests_of_rounds": {
            name: dict(sorted(Counter(body["checks"][name] for body in charges).items())) for name in CHECKS
        },
        "checks": checks,
        "attacks": attacks,
        "anchors": _newest(material.anchors),
        "peers": _peers(study, history),
        "records": _records(history),
        "insecure_noise": insecure,
        "noise_sources": sorted({body["noise_source"] for body in charges}),
        "code": sorted({body["code"] for body in charges}),
        "versions": opened[-1]["versions"] if opened else {},
    }


def _cost(cost: Cost) -> dict[str, Any]:
    return {
        "epsilon": cost.epsilon,
        "accountants": dict(cost.accountants),
        "epsilon_replace_one": cost.replace_one,
        "ceiling": cost.ceiling,
        "delta": cost.delta,
    }


def _check(finding: Finding) -> dict[str, str]:
    return {name: getattr(finding, name) for name in ("check", "verdict", "code", "words")}


def _attack(name: str, results: Sequence[Result]) -> dict[str, Any]:
    """The newest result of one kind of attack; without one, "not-run"."""
    newest = next((result for result in reversed(results) if result.attack == name), None)
    if newest is None:
        return {"attack": name, "verdict": "not-run", "time": "", "study": "", "findings": []}
    shown = newest.as_dict()
    if name == "generator":
        shown["findings"] = [_without_counts(finding) for finding in shown["findings"]]
    return shown


def _without_counts(finding: dict[str, Any]) -> dict[str, Any]:
    """What an attack on patients found, without telling how many they are: that number is in no record either."""
    explanation = "Training patients do not stand out from held-out ones by more than chance allows."
    if finding["verdict"] == "failed":
        explanation = "Training patients can be told from held-out ones by what the generator makes."
    elif finding["verdict"] == "too-few":
        explanation = "With so few patients a leak could have been missed."
    named = ("estimate", "lower_bound", "ceiling", "allowed")
    rounded = {name: None if finding[name] is None else round(finding[name], 2) for name in named}
    kept = {name: value for name, value in finding["numbers"].items() if name == "generated_images"}
    return finding | rounded | {"numbers": kept, "explanation": explanation}


def _newest(anchors: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each party, the longest ledger that it has seen."""
    newest = {anchor["by"]: dict(anchor) for anchor in sorted(anchors, key=lambda anchor: anchor["seq"])}
    return [newest[by] for by in sorted(newest)]


def _peers(study: Study, history: History) -> list[dict[str, Any]]:
    """The newest record of each other hospital's ledger, as certificates told this one."""
    names = {site.signing_key: site.name for site in study.sites if site.name != history.hospital}
    known = {names[key]: seen for key, seen in history.peers.items() if key in names}
    return [{"of": name, "seq": seq, "head": head} for name, (seq, head) in sorted(known.items())]


def _records(history: History) -> dict[str, Any]:
    settled = {r.body["reserve"] for r in history.records if r.kind in ("charge", "void")}
    notable = [
        {"seq": r.seq, "time": r.body["time"], "kind": r.kind, "words": _says(r)}
        for r in history.records
        if r.kind in _NOTABLE or (r.kind == "reserve" and r.seq not in settled) or _failed(r)
    ]
    return {
        "kinds": dict(Counter(r.kind for r in history.records)),
        "first": history.records[0].body["time"],
        "last": history.records[-1].body["time"],
        "notable": notable[-MOST_NOTABLE:],
        "notable_left_out": max(0, len(notable) - MOST_NOTABLE),
    }


def _failed(record: Record) -> bool:
    return record.kind == "charge" and bool(failed_checks(record.body["checks"]))


def _says(record: Record) -> str:
    """One record in words."""
    body = record.body
    match record.kind:
        case "open":
            noise, ceiling, total = body["noise_multiplier"], body["ceiling"], body["total_ceiling"]
            return (
                f"study {body['study'][:12]}: noise {noise}, {body['steps']} steps, ceiling {ceiling},"
                f" over all studies {total}"
            )
        case "reserve":
            return f"round {body['round']} was never settled, so it counts in full"
        case "charge":
            return f"tests that failed: {', '.join(failed_checks(body['checks']))}"
        case "void":
            return f"reservation {body['reserve']} taken back: {body['reason']}"
        case "rotate":
            return f"key epoch {body['epoch']} of {', '.join(body['members'])}"
        case "override":
            return f"the data owner allowed {words.plural(len(body['ledgers']), 'other ledger')}: {body['reason']}"
        case "tail_repaired":
            return f"{body['removed_bytes']} bytes of a line that was never acknowledged were cut off"
        case _:
            return f"study {body['study'][:12]}"
