"""A few worker processes that decode files, and are replaced when a file kills them."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, get_args

import numpy as np

from fedmedgan.client.data.limits import Limits
from fedmedgan.client.data.outcomes import Outcome
from fedmedgan.shared.errors import RunError

# Not multiprocessing: it would import the caller's main module again, and answer in pickles.
# -P: a file called numpy.py in the data folder must not become our numpy.
_PROGRAM = ("-P", "-m", "fedmedgan.client.data.worker")
_LONGEST_ANSWER = 1 << 16
_STARTS_WITHOUT_SUCCESS = 5
_TRIES = 2
"""A file is given to a second worker when its first one died: the machine may have killed it for its
memory."""
PSEUDONYM_BYTES = 16
"""Of the keyed hash that stands for a patient; it is written as hex digits."""
CRASHED = "the decoder crashed on this file"
TIMED_OUT = "the decoder did not finish in time"


@dataclass(frozen=True)
class Examined:
    """What a worker found out about one file."""

    outcome: Outcome
    code: str
    """Why it is not used, "" where it can be."""
    reason: str
    shape: tuple[int, ...] = ()
    pixel_sha256: str = ""
    patient: str = ""
    instance: str = ""
    places: tuple[int, ...] = ()
    """Of the frames that became images, ascending: frames without information are left out."""
    images: np.ndarray | None = None
    """float16 (N, S, S) in [-1, 1], where it can be used."""


class WorkerPool:
    """Decodes files in at most `workers` processes. A context manager: leaving it ends them.

    Args:
        size: S, side of the training images.
        modalities: Modality values that are taken.
        key: of the keyed hashes that stand for patients.
        targets: the files are targets of images, among which empty masks are allowed.

    Raises:
        RunError: RUN_EXTRA, the DICOM libraries are not installed or do not start.
    """

    def __init__(
        self,
        size: int,
        modalities: Sequence[str],
        key: bytes,
        limits: Limits,
        workers: int,
        targets: bool = False,
    ) -> None:
        for name in ("pydicom", "PIL"):
            if importlib.util.find_spec(name) is None:
                raise _not_installed(f"{name} is not installed")
        self._size, self._limits, self._count = size, limits, max(1, workers)
        task: dict[str, Any] = {"size": size, "modalities": list(modalities), "key": key.hex(), "targets": targets}
        self._task = json.dumps({**task, "limits": limits.to_json()}).encode()
        self._workers: dict[Connection, _Worker] = {}
        self._failed_starts = 0

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in list(self._workers.values()):
            self._end(worker)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that are alive."""
        return [worker.process.pid for worker in self._workers.values()]

    def examine(self, paths: Sequence[str]) -> Iterator[tuple[int, Examined]]:
        """Examine files; yield (place in `paths`, result) as they are done, in any order."""
        todo = deque((index, 1) for index in range(len(paths)))
        unanswered = len(paths)
        while unanswered:
            while len(self._workers) < min(self._count, unanswered):
                self._start()
            for worker in self._workers.values():
                if worker.ready and worker.job is None and todo:
                    worker.job = todo.popleft()
                    worker.send(json.dumps(paths[worker.job[0]]).encode())
            for connection in wait(list(self._workers)):
                worker = self._workers[connection]  # type: ignore[index]
                result = self._hear(worker)
                if result is not None and worker.job is not None:
                    yield worker.job[0], result
                    unanswered -= 1
                    worker.job = None
                elif worker.dead and worker.job is not None:
                    index, tries = worker.job
                    if tries < _TRIES and not worker.timed_out:
                        todo.append((index, tries + 1))
                    else:
                        reason = TIMED_OUT if worker.timed_out else CRASHED
                        yield index, Examined("refused", "DICOM_DECODE", reason)
                        unanswered -= 1

    def _start(self) -> None:
        if self._failed_starts >= _STARTS_WITHOUT_SUCCESS:
            raise _not_installed("the process that decodes DICOM files does not start")
        self._failed_starts += 1
        ours, theirs = socket.socketpair()
        with theirs:
            arguments = [str(theirs.fileno()), str(self._limits.memory_bytes)]
            process = subprocess.Popen(
                [sys.executable, *_PROGRAM, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
        worker = _Worker(process, Connection(ours.detach()))
        self._workers[worker.connection] = worker
        worker.send(self._task)

    def _hear(self, worker: _Worker) -> Examined | None:
        """One message of a worker: an answer, or None where it came alive or died."""
        try:
            message = worker.connection.recv_bytes(_LONGEST_ANSWER)
            if not worker.ready:
                worker.ready, self._failed_starts = True, 0
                return None
            return self._answer(json.loads(message), worker.connection)
        except (EOFError, OSError, ValueError, KeyError, TypeError):
            self._end(worker)
            return None

    def _answer(self, values: dict[str, Any], connection: Connection) -> Examined:
        frames, images = int(values.pop("frames")), None
        if not 0 <= frames <= self._limits.frames_used or (frames == 0 and not values["code"]):
            raise ValueError("an image without frames, or with too many")
        if frames:
            content = connection.recv_bytes(2 * frames * self._size**2)
            images = np.frombuffer(content, np.float16).reshape(frames, self._size, self._size)
        outcome, shape = values.pop("outcome"), tuple(int(n) for n in values.pop("shape"))
        places = tuple(int(n) for n in values.pop("places"))
        if len(places) != frames or list(places) != sorted(set(places)):
            raise ValueError("not one place for each frame")
        if outcome not in get_args(Outcome):
            raise ValueError("not an outcome")
        named = re.fullmatch(f"[0-9a-f]{{{2 * PSEUDONYM_BYTES}}}", values["patient"])
        if not named and (values["patient"] or not values["code"]):
            raise ValueError("not a pseudonym")
        words = {k: str(v) for k, v in values.items()}
        return Examined(outcome, shape=shape, places=places, images=images, **words)

    def _end(self, worker: _Worker) -> None:
        worker.connection.close()
        worker.process.kill()
        worker.process.wait()
        worker.dead = True
        self._workers.pop(worker.connection, None)


class _Worker:
    def __init__(self, process: subprocess.Popen[bytes], connection: Connection) -> None:
        self.process, self.connection = process, connection
        self.ready = self.dead = False
        self.job: tuple[int, int] | None = None
        """Place of its file, and how often that file was tried."""

    @property
    def timed_out(self) -> bool:
        return self.process.returncode == -signal.SIGALRM

    def send(self, message: bytes) -> None:
        with contextlib.suppress(OSError):  # it died: reading from it says so
            self.connection.send_bytes(message)


def _not_installed(what: str) -> RunError:
    return RunError("RUN_EXTRA", what, hint='pip install "fedmedgan[hospital]"')
