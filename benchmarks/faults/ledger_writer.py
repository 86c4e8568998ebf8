"""The process that R1 kills: writes a ledger, and says over its standard output which calls have returned.

python ledger_writer.py LEDGER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmedgan.shared.privacy.events import TrainingSteps
from fedmedgan.shared.privacy.ledger import Ledger
from fedmedgan.shared.privacy.records import CHECKS, Terms

STUDY = "a" * 64
SIGNING = Ed25519PrivateKey.from_private_bytes(b"\7" * 32)
PROOF = {"noise_source": "os-aes256ctr", "checks": dict.fromkeys(CHECKS, "passed"), "code": "c" * 64}


def begin(path: Path) -> Ledger:
    return Ledger(path, "hospital-1", signing=SIGNING, book="d" * 64)


def terms(delta: float) -> Terms:
    return Terms(
        delta=delta,
        ceiling=8.0,
        total_ceiling=10.0,
        noise_multiplier=1.1,
        sampling_rate=0.05,
        clip_norm=1.0,
        steps=300,
        dataset="e" * 64,
        patients=100,
    )


def main() -> None:
    os.write(1, b"\n")  # imports are done: from here on it may be killed
    with begin(Path(sys.argv[1])) as ledger:

        def acknowledge() -> None:
            record = ledger.history.records[-1]
            os.write(1, f"{record.kind} {record.seq} {record.line_sha256}\n".encode())

        ledger.open_study(STUDY, terms(1e-4))
        acknowledge()
        for round in range(1, 10**9):
            seq = ledger.reserve(STUDY, round, [TrainingSteps(1.1, 0.05, 30)] * (1 + round % 3))
            acknowledge()
            if round % 7 == 0:
                ledger.void(seq, "the folder could not be read")
            else:
                ledger.charge(seq, *[round % 31] * (1 + round % 3), **PROOF)
            acknowledge()


if __name__ == "__main__":
    main()
