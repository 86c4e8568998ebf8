"""The server that R9 and R10 measure: adds the updates of a folder, and says what that took.

    python load_server.py FOLDER

Each update comes as Flower would hand it over, as a record of arrays; the file's bytes are gone by then.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from pathlib import Path

from flwr.app import RecordDict

from fedmedgan.server.aggregation import RoundSum
from fedmedgan.server.worker import WorkerSum
from fedmedgan.shared.errors import CryptoError
from fedmedgan.shared.messages import Envelope, RoundOpen, Update, parse
from fedmedgan.shared.secure_sum import cipher, proof
from fedmedgan.shared.study import from_dict


def main() -> None:
    folder = Path(sys.argv[1])
    study = from_dict(json.loads((folder / "study.json").read_bytes()))
    opened = parse((folder / "opened.json").read_bytes(), RoundOpen)
    n_blobs = proof.update_blobs(study, int((folder / "parameters").read_text()))
    files, seconds = sorted(folder.glob("*.update")), 0.0
    with WorkerSum(n_blobs) as worker:
        model_hash = parse(Envelope.from_bytes(files[0].read_bytes()).header, Update).model_hash
        total, peaks = RoundSum(study, opened, worker, model_hash), []
        with suppress(CryptoError):
            worker.result()  # nothing yet, but then it has started
        peaks.append(_peak_mib(worker))
        for file in files:
            record = _record(file)
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak: reading the file is not the server's work
            began = time.perf_counter()
            total.add(Envelope.from_record(record, cipher.max_frame_bytes(n_blobs, "update")))
            seconds += time.perf_counter() - began
            peaks.append(_peak_mib(worker))
        began = time.perf_counter()
        certificate, payload = total.certify()
        seconds += time.perf_counter() - began
        peaks.append(_peak_mib(worker))
    (folder / "sum").write_bytes(payload)
    print(json.dumps({"seconds": seconds, "peak_mib": peaks, "certificate": certificate.canonical().decode()}))


def _record(file: Path) -> RecordDict:
    return Envelope.from_bytes(file.read_bytes()).to_record()


def _peak_mib(worker: WorkerSum) -> float:
    """Highest resident memory, of this process since it forgot and of the worker since it began."""
    total = 0
    for process in ("self", str(worker.pid)):
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return total / 1024


if __name__ == "__main__":
    main()
