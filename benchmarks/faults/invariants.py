"""What must be true after every fault (I1 to I8), read from what the parties have on their disks."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

from fedmedgan.client.cycle import Hospital
from fedmedgan.server.journal import Journal
from fedmedgan.shared.messages import open_certificate
from fedmedgan.shared.privacy.accounting import epsilon_pld
from fedmedgan.shared.privacy.history import read as read_ledger
from fedmedgan.shared.study import Study
from fedmedgan.simulations import consortium


def violations(folder: Path, study: Study, trace: Path, secrets: set[bytes]) -> list[str]:
    """Every invariant that does not hold, with where.

    Args:
        secrets: keys of all epochs; none may lie in the coordinator's folder.
    """
    return list(_violations(folder, study, trace, secrets))


def _violations(folder: Path, study: Study, trace: Path, secrets: set[bytes]) -> Iterator[str]:
    hospitals = {home.name: Hospital(home) for home in consortium.homes(folder, study)}
    ledgers = {name: read_ledger(h.home / "ledger.jsonl") for name, h in hospitals.items()}
    left = [json.loads(line) for line in trace.read_text().splitlines()] if trace.exists() else []
    with Journal(folder, study.hash) as journal:
        stored = [journal.certificate(number) for number in range(1, journal.last_round() + 1)]
    certificates = [pair[0] for pair in stored if pair is not None]

    for name, ledger in ledgers.items():
        reserved = {r.body["round"] for r in ledger.records if r.kind == "reserve"}
        voided = {r.body["reserve"] for r in ledger.records if r.kind == "void"}
        sent = {line["round"] for line in left if line["hospital"] == name}
        if not sent <= reserved or voided:
            yield f"I1: {name} sent rounds {sorted(sent - reserved)} that its ledger does not hold"

    accepted = [e for e in _events(folder) if e["event"] == "update_accepted"]
    for event in accepted:
        certificate = next((c for c in certificates if c.round == event["round"]), None)
        inside = certificate and event["attempt"] == certificate.attempt and event["site"] in certificate.cohort
        if certificate and not inside and certificate.attempt <= event["attempt"]:
            yield f"I2: the update of {event['site']} in round {event['round']} was accepted and then lost"

    contents: dict[tuple, str] = {}
    for line in left:
        key = (line["round"], line["attempt"], line["hospital"])
        if contents.setdefault(key, line["sha256"]) != line["sha256"]:
            yield f"I3: two contents of {key}"

    newest = max(h.applied_round for h in hospitals.values())
    if len({h.model_hash for h in hospitals.values() if h.applied_round == newest}) != 1:
        yield "I4: hospitals hold different models"

    for secret in secrets:
        forms = (secret, base64.b64encode(secret), secret.hex().encode())
        for path in folder.rglob("*"):
            if path.is_file() and "hospitals" not in path.relative_to(folder).parts:
                data = path.read_bytes()
                if any(form in data for form in forms):
                    yield f"I5: a key lies at the coordinator, in {path.name}"

    for name, ledger in ledgers.items():
        ceiling = hospitals[name].policy.max_epsilon
        if epsilon_pld(ledger.spent(), study.privacy.delta) > ceiling:
            yield f"I6: {name} has spent more than its ceiling"

    seen: dict[str, int] = {}
    for certificate in certificates:
        for name, update in open_certificate(certificate, study).items():
            if update.ledger_seq <= seen.get(name, 0):
                yield f"I7: the ledger of {name} went back in round {certificate.round}"
            seen[name] = update.ledger_seq
            head = ledgers[name].records[update.ledger_seq - 1].line_sha256 if update.ledger_seq else ""
            if head != update.ledger_head:
                yield f"I7: the ledger of {name} does not hold what it signed in round {certificate.round}"

    refused = [e for h in hospitals.values() for e in _events(h.home) if "ROUND_REJECTED" in str(e.get("error", ""))]
    if refused:
        yield "I8: a sum did not hold what its certificate says"


def _events(folder: Path) -> list[dict]:
    path = folder / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
