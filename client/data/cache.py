"""Decoded images kept on the hospital's own disk, so that a restart does not decode a folder again.

One safetensors file: no pickle, and numpy reads it. It is bound to the folder by a fingerprint over every
file's path, size and times, labels.csv, the rules and the decoders, and it is sealed with HMAC-SHA256 under
the hospital's pseudonym key. Whatever does not fit is decoded again. The file holds pixels, so it is readable
by its owner alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import importlib.metadata
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedmedgan.client.data.folder import Entry
from fedmedgan.client.data.limits import Limits
from fedmedgan.shared.study import Images

_FORMAT = 1
"""Raised whenever `grayscale` or the checks of `dicom` change what they make of a file."""
_DECODERS = (
    *("pydicom", "numpy", "pillow", "python-gdcm", "pyjpegls", "pylibjpeg", "pylibjpeg-openjpeg"),
    *("pylibjpeg-libjpeg", "pylibjpeg-rle"),
)

Arrays = dict[str, np.ndarray]


def fingerprint(entries: Sequence[Entry], labels: bytes | None, rules: Images, limits: Limits) -> str:
    """SHA-256 over all that decides what a folder decodes to, 64 hex digits."""
    parts: list[Any] = [_FORMAT, rules.model_dump(mode="json"), limits.to_json()]
    parts.append({name: _version(name) for name in _DECODERS})
    parts.append(hashlib.sha256(labels).hexdigest() if labels is not None else None)
    parts.append([asdict(entry) for entry in entries])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def write(path: Path, arrays: Arrays, report: dict[str, Any], fingerprint: str, key: bytes) -> None:
    """Write a cache in one step, mode 0600. No error where it cannot be written: that only costs time."""
    text = json.dumps(report)
    metadata = {"fingerprint": fingerprint, "report": text, "seal": _seal(arrays, text, fingerprint, key)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(save(arrays, metadata))
            file.flush()
            os.fsync(descriptor)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def read(path: Path, names: Sequence[str], fingerprint: str, key: bytes) -> tuple[Arrays, dict[str, Any]] | None:
    """Arrays and report of a cache; None where it is absent, damaged, of another key or of other files."""
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            if metadata.get("fingerprint") != fingerprint or set(file.keys()) != set(names):
                return None
            arrays = {name: file.get_tensor(name) for name in names}
        text = metadata["report"]
        if not hmac.compare_digest(metadata["seal"], _seal(arrays, text, fingerprint, key)):
            return None
        return arrays, json.loads(text)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None


def _seal(arrays: Arrays, report: str, fingerprint: str, key: bytes) -> str:
    seal = hmac.new(key, b"fedmedgan image cache", "sha256")
    header = [[name, a.dtype.str, list(a.shape)] for name, a in sorted(arrays.items())]
    seal.update(json.dumps([fingerprint, report, header]).encode())
    for _, array in sorted(arrays.items()):
        seal.update(np.ascontiguousarray(array).data)
    return seal.hexdigest()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
