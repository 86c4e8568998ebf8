"""What the journal stands on: one SQLite database, files that are there as a whole, and a lock.

Every fault of the disk or the database comes out as RunError RUN_JOURNAL; the texts hold no path and no content.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedmedgan.shared.errors import RunError


class Database:
    """SQLite in WAL mode, on the disk (synchronous=FULL) when a transaction ends. Deleted content is overwritten."""

    def __init__(self, path: Path) -> None:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        self._connection = sqlite3.connect(path)
        self.close = self._connection.close
        try:
            for setting in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "secure_delete = ON"):
                self._connection.execute(f"PRAGMA {setting}")
        except BaseException:
            self.close()
            raise

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Everything or nothing of what is executed inside."""
        with disk(), self._connection as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield connection

    def rows(self, query: str, *values: object) -> list[Any]:
        """All rows of a query."""
        with disk():
            return self._connection.execute(query, values).fetchall()

    def row(self, query: str, *values: object) -> Any:
        """The first row, or None."""
        return next(iter(self.rows(query, *values)), None)

    def value(self, query: str, *values: object) -> Any:
        """The first column of the first row, or None."""
        return (self.row(query, *values) or (None,))[0]

    def truncate_log(self) -> None:
        """Write the log into the database and empty it, so that what was deleted is in neither."""
        self.rows("PRAGMA wal_checkpoint(TRUNCATE)")


def problem(what: str) -> RunError:
    """The journal cannot be used."""
    return RunError("RUN_JOURNAL", what, "journal")


@contextmanager
def disk() -> Iterator[None]:
    """What SQLite and the file system report inside, as RUN_JOURNAL."""
    try:
        yield
    except sqlite3.Error as error:
        raise problem(f"it cannot be read or written ({error})") from None
    except OSError as error:
        raise problem(f"a file of it cannot be read or written ({error.strerror})") from None


def lock(path: Path) -> int:
    """A descriptor that holds the lock until it is closed or the process ends, whatever ends it (flock).

    Raises:
        RunError: RUN_JOURNAL, somebody else holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise problem("another coordinator is at work in this folder") from None
        raise
    return descriptor


def write(path: Path, data: bytes) -> None:
    """Write a file, mode 0600: as a whole or not at all, and on the disk when this returns."""
    temporary = path.with_name(path.name + ".tmp")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


def sync(folder: Path) -> None:
    """Bring new, renamed and deleted names of a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
