"""A ledger for tests: one key, one book, terms that need no explaining."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmedgan.client.budget_book import BudgetBook
from fedmedgan.client.policy import Policy
from fedmedgan.shared.privacy.ledger import Ledger
from fedmedgan.shared.privacy.records import CHECKS, DOMAIN, Terms, canonical
from fedmedgan.shared.secure_sum.keys import HospitalKeys

SIGNING = Ed25519PrivateKey.from_private_bytes(b"\7" * 32)
BOOK = "d" * 64
PROOF: dict[str, Any] = {
    "noise_source": "os-aes256ctr",
    "checks": dict.fromkeys(CHECKS, "passed"),
    "code": "c" * 64,
}
"""What a charge says beside its steps."""


def ledger_at(path: Path, hospital: str = "clinic-a", *, signing: Ed25519PrivateKey = SIGNING) -> Ledger:
    return Ledger(path, hospital, signing=signing, book=BOOK)


def ledger_of(home: Path, hospital: str = "") -> Ledger:
    """The ledger of a hospital's home, with the hospital's own key and book."""
    policy, keys = Policy.load(home / "policy.toml"), HospitalKeys.load(home / "keys")
    book = BudgetBook.open(home / policy.budget_book)
    return Ledger(home / "ledger.jsonl", hospital or policy.site, signing=keys.signing, book=book.id)


def terms(**changes: Any) -> Terms:
    values: dict[str, Any] = {
        "delta": 1e-4,
        "ceiling": 8.0,
        "total_ceiling": 10.0,
        "noise_multiplier": 1.1,
        "sampling_rate": 0.05,
        "clip_norm": 1.0,
        "steps": 300,
        "dataset": "e" * 64,
        "patients": 100,
    }
    return Terms(**{**values, **changes})


def rewritten(line: bytes, signing: Ed25519PrivateKey = SIGNING, **changes: Any) -> bytes:
    """The line with another body, signed: what its own hospital could do to it."""
    body = {**json.loads(line)["body"], **changes}
    signature = signing.sign(DOMAIN + canonical(body)).hex()
    return b'{"body":' + canonical(body) + b',"signature":"' + signature.encode() + b'"}\n'
