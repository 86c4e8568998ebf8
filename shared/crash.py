"""Named places where a test may end the process, as a power failure would: no cleanup, no flush.

A process that finds ``FEDMEDGAN_CRASH_AT=name`` in its environment dies at that point with exit code 137. The list is
complete: `point` refuses a name that is not on it, and benchmarks/faults/protocol.py goes through all of it.
"""

from __future__ import annotations

import os

VARIABLE = "FEDMEDGAN_CRASH_AT"
EXIT_CODE = 137

CRASH_POINTS: tuple[str, ...] = (
    # a hospital, in the order of a round
    "client.attempt-noted",
    "client.reserved",
    "client.trained",
    "client.update-stored",
    "client.charged",
    "client.sealed",
    "client.released",
    "client.sent-stored",
    "client.sum-checked",
    "client.anchored",
    "client.model-stored",
    "client.update-removed",
    "client.key-stored",
    "client.key-activated",
    # the coordinator
    "server.attempt-opened",
    "server.update-file",
    "server.update-row",
    "server.certificate-file",
    "server.certificate-row",
    "server.broadcast-half",
    "server.offer-stored",
    "server.epoch-sealed",
)


def point(name: str) -> None:
    """Die here if the environment says so."""
    if name not in CRASH_POINTS:
        raise LookupError(f"{name} is not in CRASH_POINTS")
    if os.environ.get(VARIABLE) == name:
        os._exit(EXIT_CODE)
