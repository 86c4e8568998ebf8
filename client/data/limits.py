"""How much one file may ask of this machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Caps on one file. A hospital raises them in its policy when a genuine file is larger."""

    file_bytes: int = 256 * MIB
    inflated_bytes: int = 256 * MIB
    """Size after inflating, for the deflated transfer syntax: 498 KiB can inflate to 500 MiB."""
    samples: int = 1 << 27
    """rows x columns x frames x samples per pixel."""
    memory_bytes: int = 4096 * MIB
    """Address space of one worker process (RLIMIT_AS)."""
    seconds: float = 60.0
    """Wall-clock time for one file, after which its worker is killed."""
    frames_used: int = 64
    """Frames taken from one multi-frame file, evenly spaced: one patient's film must not fill the batch."""

    def to_json(self) -> dict[str, float]:
        return asdict(self)
