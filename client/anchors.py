"""Anchors: how long each hospital's ledger was when others last saw it. A ledger alone cannot show a roll-back.

Number and hash of the ledger's newest record ride in each signed Update, so every hospital of the cohort and the server
hold them. Three watch over one ledger: the hospital's own model file, its peers, and its own signed words, which the
server brings back at each roll call and cannot forge.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from fedmedgan.client import checkpoint
from fedmedgan.shared.errors import PrivacyError
from fedmedgan.shared.messages import Signed, Update, open_shown
from fedmedgan.shared.privacy.ledger import History
from fedmedgan.shared.study import Study

FILE = "anchors.json"
Anchor = tuple[int, str]
"""Number and hash of a ledger's newest record."""


def check_own(history: History, own: str, shown: Iterable[Signed], study: Study) -> None:
    """Does the ledger hold what this hospital itself once signed?

    Raises:
        PrivacyError: LEDGER_ROLLBACK, LEDGER_FORK. MessageError: an anchor was not signed by its hospital.
    """
    for signed in shown:
        update = open_shown(Update, signed, study)
        if update.hospital == own:
            history.check_anchor(update.ledger_seq, update.ledger_head)


def load(home: Path) -> dict[str, Anchor]:
    """The newest anchor of each peer, by its signing key: names may mean others in another study.

    Raises:
        RunError: RUN_STATE.
    """
    return checkpoint.read_note(home / FILE, dict[str, Anchor], {})


def check_peers(known: Mapping[str, Anchor], updates: Mapping[str, Update], study: Study) -> None:
    """No hospital's ledger may have become shorter, or another one of the same length.

    Raises:
        PrivacyError: LEDGER_ROLLBACK, LEDGER_FORK; the text names the hospital.
    """
    for name, update in updates.items():
        seq, head = known.get(study.site(name).signing_key, (0, ""))
        if update.ledger_seq < seq:
            raise PrivacyError("LEDGER_ROLLBACK", f"the ledger of {name} is shorter than it was", "Certificate")
        if update.ledger_seq == seq and update.ledger_head != head:
            raise PrivacyError("LEDGER_FORK", f"the ledger of {name} is another one than it was", "Certificate")


def keep(home: Path, known: Mapping[str, Anchor], updates: Mapping[str, Update], study: Study) -> None:
    """Remember the newest anchors."""
    seen = {study.site(name).signing_key: (u.ledger_seq, u.ledger_head) for name, u in updates.items()}
    newest = {**known, **seen}
    checkpoint.write_bytes(home / FILE, json.dumps(newest, sort_keys=True).encode())
