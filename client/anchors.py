"""Anchors: how long each hospital's ledger was when others last saw it. A ledger alone cannot show a roll-back.

Number and hash of the ledger's newest record ride in each signed Update, so every hospital of the cohort and the server
hold them; a hospital keeps those of its peers in `anchor` records of its own ledger. Four watch over one ledger: the
hospital's own model file, its budget book, its peers, and its own signed words, which the server brings back at each
roll call and cannot forge.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fedmedgan.shared.errors import PrivacyError
from fedmedgan.shared.messages import Signed, Update, open_shown
from fedmedgan.shared.privacy.history import History
from fedmedgan.shared.study import Study

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


def check_peers(known: Mapping[str, Anchor], updates: Mapping[str, Update], study: Study) -> None:
    """No hospital's ledger may have become shorter, or another one of the same length.

    Args:
        known: signing key -> the newest anchor (`History.peers`): names may mean others in another study.

    Raises:
        PrivacyError: LEDGER_ROLLBACK, LEDGER_FORK; the text names the hospital.
    """
    for name, update in updates.items():
        seq, head = known.get(study.site(name).signing_key, (0, ""))
        if update.ledger_seq < seq:
            raise PrivacyError("LEDGER_ROLLBACK", f"the ledger of {name} is shorter than it was", "Certificate")
        if update.ledger_seq == seq and update.ledger_head != head:
            raise PrivacyError("LEDGER_FORK", f"the ledger of {name} is another one than it was", "Certificate")
