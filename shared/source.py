"""Which code runs: one hash over the source of the installed package, for the ledger."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path

ROOMS = ("audit", "cli", "client", "deploy", "server", "shared", "simulations")


@cache
def source_hash() -> str:
    """SHA-256 over names and contents of every Python file of the package, 64 hex digits.

    A party that installed only its own part has another hash than one that installed all. What is counted is the source
    that lies on the disk, not what a debugger changed in memory.
    """
    digest = hashlib.sha256()
    for room in ROOMS:
        spec = find_spec(f"fedmedgan.{room}")
        for folder in (spec.submodule_search_locations if spec else None) or ():
            for path in sorted(Path(folder).rglob("*.py")):
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                digest.update(f"{room}/{path.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()
