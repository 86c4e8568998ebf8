"""The process that R1 kills: writes a ledger, and says over its standard output which calls have returned.

python ledger_writer.py LEDGER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fedmedgan.shared.privacy.events import TrainingSteps
from fedmedgan.shared.privacy.ledger import Ledger

STUDY = "a" * 64


def main() -> None:
    os.write(1, b"\n")  # imports are done: from here on it may be killed
    with Ledger(Path(sys.argv[1]), "hospital-1") as ledger:

        def acknowledge() -> None:
            record = ledger.history.records[-1]
            os.write(1, f"{record.kind} {record.seq} {record.line_sha256}\n".encode())

        ledger.open_study(STUDY, delta=1e-4, ceiling=8.0)
        acknowledge()
        for round in range(1, 10**9):
            seq = ledger.reserve(STUDY, round, [TrainingSteps(1.1, 0.05, 30)] * (1 + round % 3))
            acknowledge()
            if round % 7 == 0:
                ledger.void(seq, "the folder could not be read")
            else:
                ledger.charge(seq, *[round % 31] * (1 + round % 3), noise_source="os-aes256ctr")
            acknowledge()


if __name__ == "__main__":
    main()
