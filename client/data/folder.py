"""The files of a data folder, found without opening one.

| entry | what happens |
|---|---|
| regular file | listed |
| hidden (name starts with a dot), labels.csv at the top | passed over |
| link to a regular file inside the folder | listed |
| link out of the folder, to a folder, to nothing, in a circle | listed as unsafe |
| pipe, socket, device | listed as unsafe; never opened, so never waited for |
| sub-folder that cannot be read | listed as unreadable |
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from fedmedgan.shared.errors import DataError

LABELS = "labels.csv"


@dataclass(frozen=True)
class Entry:
    """One thing in a folder."""

    name: str
    """Path relative to the folder, with / between its parts; may hold surrogate escapes."""
    path: str
    """Where to open it: absolute, without links."""
    problem: str
    """Code of the reason for not opening it, "" for a regular file."""
    size: int
    mtime_ns: int
    ctime_ns: int


def scan(folder: Path) -> list[Entry]:
    """List a folder and its sub-folders, sorted by name.

    Raises:
        DataError: DATA_PATH, it is not a folder that can be read.
    """
    try:
        if not folder.exists():
            raise DataError("DATA_PATH", "there is no such folder", str(folder))
        if not folder.is_dir():
            raise DataError("DATA_PATH", "this is not a folder", str(folder))
        root = os.path.realpath(folder, strict=True)
        os.listdir(root)
    except OSError as error:
        raise DataError("DATA_PATH", f"cannot be read ({error.strerror})", str(folder)) from None

    found, waiting = [], [""]
    while waiting:
        prefix = waiting.pop()
        try:
            with os.scandir(os.path.join(root, prefix)) as entries:
                items = list(entries)
        except OSError:
            found.append(Entry(prefix, "", "DATA_PATH", 0, 0, 0))
            continue
        for item in items:
            name = f"{prefix}/{item.name}" if prefix else item.name
            if item.name.startswith(".") or name == LABELS:
                continue
            if item.is_dir(follow_symlinks=False):
                waiting.append(name)
            else:
                found.append(_entry(name, root))
    return sorted(found, key=lambda entry: os.fsencode(entry.name))


def _entry(name: str, root: str) -> Entry:
    path = os.path.join(root, name)
    try:
        if os.path.islink(path):
            path = os.path.realpath(path, strict=True)
            if os.path.commonpath([path, root]) != root:
                return Entry(name, "", "DATA_UNSAFE_PATH", 0, 0, 0)
        status = os.lstat(path)
    except OSError:
        return Entry(name, "", "DATA_UNSAFE_PATH", 0, 0, 0)
    problem = "" if stat.S_ISREG(status.st_mode) else "DATA_UNSAFE_PATH"
    return Entry(name, path, problem, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
