"""The audit bundle of one hospital: ``audit-STUDY-HOSPITAL.zip``, sealed with its signing key.

    report.html            what a board reads (audit/report.py)
    summary.json           the same as values; summary_schema.json describes it
    ledger.jsonl           the raw ledger; ledger.csv is the same for a spreadsheet
    study.json             the study with every hospital's signature
    certificates/          what the coordinator certified of each round, with the hospitals' signed words
    anchors.json           how long other parties have seen this ledger: [{by, study, round, seq, head}]
    sbom.cdx.json          the software that is installed here (CycloneDX)
    verify.py              checks all of it with Python and the package cryptography alone
    SHA256SUMS, .sig       every file's hash; Ed25519 over "fedmedgan audit bundle 1\\n" and those bytes

It holds no image, no pseudonym and no path of this machine, and of patients the declared number. What attacks on the
generator found depends on patients without noise and is in it: a bundle is for reviewers.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jsonschema
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmedgan.audit import facts, report, results
from fedmedgan.audit.bill_of_materials import bill_of_materials
from fedmedgan.audit.evidence import LEDGER, SEAL, STUDY, SUMS, HospitalEvidence, gather
from fedmedgan.audit.recompute import all_costs, costs
from fedmedgan.audit.verify import SEAL_DOMAIN, verify
from fedmedgan.shared.agreement import Agreement
from fedmedgan.shared.errors import PrivacyError, RunError
from fedmedgan.shared.messages import Signed
from fedmedgan.shared.privacy.history import History
from fedmedgan.shared.privacy.history import verify as verify_ledger
from fedmedgan.shared.privacy.records import Record

HERE = Path(__file__).parent
SCHEMA = "summary_schema.json"
CSV_COLUMNS = (
    "seq", "time", "hospital", "study", "kind", "round", "attempt", "reserve", "noise_multiplier", "sampling_rate",
    "steps", "noise_source", "noise", "clipping", "rows", "sampling", "delta", "ceiling", "total_ceiling", "epoch",
    "certificate", "sha256", "bytes", "reason", "code", "prev", "line_sha256",
)  # fmt: skip


def make(
    home: Path, *, out: Path, signing: Ed25519PrivateKey, made: str, study: str = "", others: Sequence[Path] = ()
) -> tuple[Path, dict[str, Any]]:
    """Gather, verify and recompute what a home holds, and write its sealed bundle. A bundle is also made of a failure.

    Args:
        home: the hospital's own folder.
        out: folder for the zip; made if it is not there.
        signing: the hospital's key.
        made: the bundle's time, as in a ledger.
        study: hash or its beginning; the home's present study by default.
        others: ledgers, homes or bundles of other hospitals, for what they have seen of this ledger.

    Returns:
        The zip, and what its summary.json says.

    Raises:
        RunError: AUDIT_EVIDENCE, no ledger or no such study; RUN_PATH. PrivacyError: LEDGER_*, the ledger is not one
            that could be told about; LEDGER_OWNER, it is signed with another key. StudyError: STUDY_*.
    """
    own = replace(gather(home)[0], where="")  # as no other is called
    history = verify_ledger(own.ledger, LEDGER)
    if signing.public_key().public_bytes_raw().hex() != history.signing_key:
        raise PrivacyError("LEDGER_OWNER", "the ledger is signed with another key than this hospital's", LEDGER)
    agreement = _study_of(home, own, study)
    if history.terms(agreement.study.hash) is None:
        raise RunError("AUDIT_EVIDENCE", "the study was never opened in this ledger", LEDGER)
    handed = [evidence for path in others for evidence in gather(path)]
    seen = [verify_ledger(evidence.ledger, evidence.where) for evidence in handed]
    spent = {cost.study: cost for cost in costs(history)}
    material = facts.Material(
        agreement=agreement,
        history=history,
        findings=[finding for finding in verify([own, *handed]) if finding.where == own.where],
        costs=[spent.pop(agreement.study.hash), *spent.values()],
        all_costs=all_costs([history, *_same_book(history, seen)]),
        names={hash: known.study.name for hash, known in own.agreements.items()},
        anchors=anchors_of(history, seen),
        attacks=results.kept(home),
        made=made,
    )
    files = contents(material, ledger=own.ledger, certificates=own.certificates[agreement.study.hash])
    path = out / f"audit-{agreement.study.name}-{history.hospital}.zip"
    write(path, sealed(files, signing), made)
    return path, json.loads(files["summary.json"])


def _study_of(home: Path, own: HospitalEvidence, study: str) -> Agreement:
    """The study of a home that is meant. Raises RunError AUDIT_EVIDENCE, StudyError."""
    wanted = study or Agreement.load(home / STUDY).study.hash
    for hash, agreement in own.agreements.items():
        if hash.startswith(wanted):
            return agreement
    raise RunError("AUDIT_EVIDENCE", "the home holds no such study", wanted[:16])


def _same_book(history: History, others: Iterable[History]) -> list[History]:
    """Other ledgers of the same hospital. What they spent counts in full: nobody outside can tell whose patients."""
    return [other for other in others if other.book == history.book and other.ledger_id != history.ledger_id]


def ledger_csv(history: History) -> str:
    """The ledger as a table, one line a record. Steps of several kinds stand in one cell, set apart by spaces."""
    table = io.StringIO()
    rows = csv.DictWriter(table, CSV_COLUMNS, lineterminator="\n")
    rows.writeheader()
    rows.writerows(_cells(record) for record in history.records)
    return table.getvalue()


def _cells(record: Record) -> dict[str, Any]:
    body = dict(record.body)
    if record.kind == "reserve":
        for name in ("noise_multiplier", "sampling_rate", "steps"):
            body[name] = " ".join(str(event[name]) for event in body["events"])
    elif record.kind == "charge":
        body |= body["checks"]
        body["steps"] = " ".join(map(str, body["steps"]))
    elif record.kind == "open":
        del body["sampling"]  # the word "poisson"; the column is the test of the same name
    cells = {name: body[name] for name in CSV_COLUMNS if body.get(name) is not None}
    cells["line_sha256"] = record.line_sha256
    if "reason" in cells and cells["reason"][0] in "=+-@":  # or a spreadsheet would take it for a formula
        cells["reason"] = "'" + cells["reason"]
    return cells


def anchors_of(history: History, others: Iterable[History]) -> list[dict[str, Any]]:
    """What other hospitals' ledgers hold of this one: every head that they have seen, the oldest first.

    Args:
        history: whose heads are looked for.
        others: verified ledgers; those of the same hospital are passed over.
    """
    found = []
    for other in others:
        if other.signing_key == history.signing_key:
            continue
        for record in other.records:
            if record.kind == "anchor" and history.signing_key in record.body["heads"]:
                seq, head = record.body["heads"][history.signing_key]
                study, number = record.body["study"], record.body["round"]
                found.append({"by": other.hospital, "study": study, "round": number, "seq": seq, "head": head})
    return sorted(found, key=lambda anchor: (anchor["seq"], anchor["by"], anchor["round"]))


def contents(material: facts.Material, *, ledger: bytes, certificates: Sequence[Signed]) -> dict[str, bytes]:
    """Every file of the bundle but the seal.

    Args:
        ledger: the raw ledger; a torn last line is left out.
        certificates: all of them, also such as nobody can open: they are numbered, not named by what they say.

    Raises:
        RunError: RUN_STATE, the summary is not what its schema describes.
    """
    found = facts.facts(material)
    schema = (HERE / SCHEMA).read_bytes()
    try:
        jsonschema.Draft202012Validator(json.loads(schema)).validate(found)
    except jsonschema.ValidationError as error:
        place = "/".join(map(str, error.absolute_path))
        raise RunError("RUN_STATE", "the summary is not what its schema describes", place) from None
    files = {
        "report.html": report.page(found).encode(),
        "summary.json": _json(found),
        SCHEMA: schema,
        LEDGER: ledger[: ledger.rfind(b"\n") + 1],
        "ledger.csv": ledger_csv(material.history).encode(),
        "anchors.json": _json(list(material.anchors)),
        STUDY: material.agreement.to_json(),
        "sbom.cdx.json": bill_of_materials(material.made).encode(),
        "verify.py": (HERE / "verify_alone.py").read_bytes(),
    }
    numbered = enumerate(certificates, start=1)
    return files | {f"certificates/{n:04d}.json": signed.model_dump_json().encode() for n, signed in numbered}


def sealed(files: Mapping[str, bytes], signing: Ed25519PrivateKey) -> dict[str, bytes]:
    """The files in the order of their names, then their hashes and the signature over them."""
    ordered = {name: files[name] for name in sorted(files)}
    sums = "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in ordered.items()).encode()
    signature = signing.sign(SEAL_DOMAIN + sums).hex().encode() + b"\n"
    return ordered | {SUMS: sums, SEAL: signature}


def write(path: Path, files: Mapping[str, bytes], made: str) -> None:
    """Write a zip with one folder, named like the zip. Equal files and times give equal bytes.

    Raises:
        RunError: RUN_PATH, it cannot be written.
    """
    time = datetime.strptime(made, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                member = zipfile.ZipInfo(f"{path.stem}/{name}", time.timetuple()[:6])
                member.compress_type, member.external_attr = zipfile.ZIP_DEFLATED, 0o100644 << 16
                archive.writestr(member, content)
        os.replace(partial, path)
    except OSError as error:
        raise RunError("RUN_PATH", f"cannot be written ({error.strerror})", str(path)) from None


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, allow_nan=False).encode() + b"\n"
