"""Starting, watching and ending the Flower processes of one party."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

from fedmedgan.shared.errors import RunError

LOG_BYTES = 20 << 20
"""A log that is larger when a process starts becomes ``NAME.1``, in place of the one before."""
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
STOP_SECONDS = 60.0
"""Flower needs up to 50 s to end in good order."""


@contextmanager
def only_one(lock: Path) -> Iterator[IO[str]]:
    """Nobody else, on this machine, runs what this file stands for; processes that are given the file hold it too.

    Raises:
        RunError: RUN_PATH.
    """
    lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            hint = "end the process that is running; it may be left over from a start that was killed"
            raise RunError("RUN_PATH", "it is running already", str(lock.parent), hint=hint) from None
        yield file


def is_running(lock: Path) -> bool:
    """Whether somebody holds the lock."""
    if not lock.exists():
        return False
    try:
        with only_one(lock):
            return False
    except RunError:
        return True


def spawn(
    command: Sequence[str], *, env: Mapping[str, str], folder: Path, log: Path, lock: IO[str]
) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own: it gets no Ctrl-C of the terminal, only what we send it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if log.exists() and log.stat().st_size > LOG_BYTES:
        log.replace(log.with_name(f"{log.name}.1"))
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            env=env,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock.fileno(),),
        )


def stop(*running: subprocess.Popen[bytes], seconds: float = STOP_SECONDS) -> None:
    """SIGTERM to all at once, and SIGKILL to the whole session of those that it does not end. Not to be interrupted."""
    with _deaf():
        for process in running:
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + seconds
        for process in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


class Stopped(BaseException):
    """Somebody asked this process to end: SIGTERM, SIGINT."""


@contextmanager
def _deaf() -> Iterator[None]:
    """SIGTERM and SIGINT are ignored; only a main thread can say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {name: signal.signal(name, signal.SIG_IGN) for name in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM and SIGINT raise `Stopped`, once; what cleans up after it is not disturbed."""

    def raise_stopped(number: int, frame: FrameType | None) -> None:
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, signal.SIG_IGN)
        raise Stopped

    before = {name: signal.signal(name, raise_stopped) for name in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def last_error(log: Path) -> str:
    """What a log says last about an error, or its last line: one line, for people."""
    try:
        text = COLOUR.sub("", log.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return ""
    lines = [line.strip() for line in text.splitlines()[-60:] if line.strip()]
    marked = [number for number, line in enumerate(lines) if "ERROR" in line or line.startswith("error[")]
    return " ".join(" ".join(lines[marked[-1] : marked[-1] + 3] if marked else lines[-1:]).split())
