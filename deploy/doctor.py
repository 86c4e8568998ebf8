"""`site doctor`: why a hospital cannot take part, found before a round finds it. It looks, and changes nothing.

Each check is a function of its own: it says what it found, or that it does not apply here, or what is wrong and the
hint that mends it. A fault that several checks run into is told once, by the first. No check names a file of the data
folder, a DICOM value or a key.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fedmedgan.deploy import hospital_checks, network_checks
from fedmedgan.deploy.check import Check, Place

CHECKS: tuple[Callable[[Place], Check], ...] = (
    hospital_checks.policy,
    network_checks.kit,
    network_checks.dns,
    network_checks.port,
    network_checks.certificate,
    network_checks.health,
    network_checks.clock,
    network_checks.registered,
    hospital_checks.disk,
    hospital_checks.gpu,
    hospital_checks.data,
    hospital_checks.keys,
    hospital_checks.study,
    hospital_checks.model,
    hospital_checks.ledger,
    hospital_checks.budget,
)
"""In the order in which they are made: what others build on comes first."""


def examine(home: Path, kit: Path | None = None) -> tuple[Check, ...]:
    """Make every check.

    Args:
        home: the hospital's home folder.
        kit: its start-up kit; ``home/kit`` by default.
    """
    place = Place(home, kit or home / "kit")
    checks: list[Check] = []
    for look in CHECKS:
        check = look(place)
        first = next((c for c in checks if c.ok == "failed" and (c.code, c.what) == (check.code, check.what)), None)
        if first is not None:
            check = Check(check.name, "skipped", f"waits for: {first.name}")
        checks.append(check)
    return tuple(checks)
