"""One JSON object a line: what a party did, for people, progress bars and the report. Never holds a secret."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any


class EventLog:
    """Appends events to a file; every line is flushed, so that others can follow it while it grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, event: str, **fields: Any) -> None:
        """Append ``{"time": unix seconds, "event": event, **fields}``."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **fields}, allow_nan=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
