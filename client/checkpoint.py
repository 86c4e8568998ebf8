"""A hospital's state on its own disk: both networks, its Adam states, and the update that it is about to send.

safetensors only, so nothing that is loaded can run code; written to a temporary file, flushed to the disk and renamed,
so a file is either the old one or the new one; checked by hash when read, because a flipped byte loads silently. The
hash is over the whole file, notes and spaces of the header included, with zeros where the hash itself stands.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.numpy import load as safetensors_load
from safetensors.numpy import save as safetensors_save
from torch import nn

from fedmedgan.shared.errors import ModelError, RunError

Arrays = dict[str, np.ndarray]
_NO_HASH = "0" * 64
T = TypeVar("T")


def content_hash(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, types, shapes and bytes in the order of the names: 64 hex digits."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name], order="C")
        digest.update(json.dumps([name, array.dtype.str, array.shape]).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def write(path: Path, arrays: Mapping[str, np.ndarray], **notes: str | int) -> str:
    """Write arrays and notes so that they survive a crash at any point. Returns the content hash of the arrays."""
    contiguous = {name: np.asarray(a, order="C") for name, a in arrays.items()}
    metadata = {"sha256": _NO_HASH, "notes": json.dumps(notes, sort_keys=True)}
    unsealed = safetensors_save(contiguous, metadata=metadata)
    digest = hashlib.sha256(unsealed).hexdigest()
    write_bytes(path, unsealed.replace(_hash_field(_NO_HASH), _hash_field(digest), 1))
    return content_hash(contiguous)


def _hash_field(digest: str) -> bytes:
    """The hash as it stands in the header; notes are JSON within JSON and quote otherwise, so nothing else looks so."""
    return f'"sha256":"{digest}"'.encode()


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file as a whole, mode 0600: after a crash it is the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def read_note(path: Path, kind: type[T], missing: T) -> T:
    """One of the hospital's own small JSON files, checked against a type; `missing` where it is not there.

    Raises:
        RunError: RUN_STATE, the file is damaged: what it should have said is not guessed.
    """
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes(), strict=True)
    except FileNotFoundError:
        return missing
    except (OSError, ValueError):
        raise RunError("RUN_STATE", "a file of the hospital's own is damaged", path.name) from None


def read(path: Path) -> tuple[Arrays, dict[str, str | int]]:
    """Arrays and notes of a file that `write` made.

    Raises:
        ModelError: MODEL_HASH, the file is missing, cut, or any bit of it differs.
    """
    try:
        raw = path.read_bytes()
        metadata = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
        stored = str(metadata["sha256"])
        unsealed = raw.replace(_hash_field(stored), _hash_field(_NO_HASH), 1)
        arrays, notes = safetensors_load(raw), json.loads(metadata["notes"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError):
        raise ModelError("MODEL_HASH", "the checkpoint is missing or damaged", path.name) from None
    if hashlib.sha256(unsealed).hexdigest() != stored or not isinstance(notes, dict):
        raise ModelError("MODEL_HASH", "the checkpoint's content differs from its hash", path.name)
    return arrays, notes


def network_arrays(generator: nn.Module, discriminator: nn.Module) -> Arrays:
    """Copies of the weights of both networks, named ``generator.*`` and ``discriminator.*``."""
    pairs = (("generator", generator), ("discriminator", discriminator))
    return {
        f"{prefix}.{name}": tensor.detach().cpu().numpy().copy()
        for prefix, network in pairs
        for name, tensor in network.state_dict().items()
    }


def load_networks(arrays: Mapping[str, np.ndarray], generator: nn.Module, discriminator: nn.Module) -> None:
    """Put weights into both networks.

    Raises:
        ModelError: MODEL_MISMATCH, other names, shapes or types; MODEL_NOT_FINITE.
    """
    expected = network_arrays(generator, discriminator)
    if {n: (a.shape, a.dtype) for n, a in expected.items()} != {n: (a.shape, a.dtype) for n, a in arrays.items()}:
        raise ModelError("MODEL_MISMATCH", "names, shapes or types of the weights differ", "checkpoint")
    if not all(np.isfinite(a).all() for a in arrays.values()):
        raise ModelError("MODEL_NOT_FINITE", "the checkpoint holds NaN or infinity", "checkpoint")
    for prefix, network in (("generator.", generator), ("discriminator.", discriminator)):
        own = {n.removeprefix(prefix): torch.from_numpy(a.copy()) for n, a in arrays.items() if n.startswith(prefix)}
        network.load_state_dict(own)


def flatten(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """All values as one float32 vector (P,), in the order of the names."""
    return np.concatenate([arrays[name].ravel() for name in sorted(arrays)]).astype(np.float32, copy=False)


def unflatten(vector_P: np.ndarray, like: Mapping[str, np.ndarray]) -> Arrays:
    """The inverse of `flatten`, with names and shapes of `like`."""
    sizes = [like[name].size for name in sorted(like)]
    parts = np.split(vector_P, np.cumsum(sizes)[:-1])
    return {name: part.reshape(like[name].shape) for name, part in zip(sorted(like), parts, strict=True)}


def optimizer_arrays(**optimizers: torch.optim.Optimizer) -> Arrays:
    """States of Adam optimisers as arrays, named ``<optimizer>.<parameter index>.<field>``."""
    return {
        f"{name}.{index}.{field}": torch.as_tensor(value).cpu().numpy().copy()
        for name, optimizer in optimizers.items()
        for index, state in optimizer.state_dict()["state"].items()
        for field, value in state.items()
    }


def load_optimizers(arrays: Mapping[str, np.ndarray], **optimizers: torch.optim.Optimizer) -> None:
    """Put states from `optimizer_arrays` back.

    Raises:
        ModelError: MODEL_MISMATCH, these are not states of these optimisers; none of them was changed.
    """
    states: dict[str, dict[int, dict[str, torch.Tensor]]] = {name: {} for name in optimizers}
    try:
        for key, array in arrays.items():
            owner, index, field = key.split(".")
            states[owner].setdefault(int(index), {})[field] = torch.from_numpy(array.copy())
        fits = all(_fits(optimizer, states[name]) for name, optimizer in optimizers.items())
    except (KeyError, ValueError, IndexError, TypeError):
        fits = False
    if not fits:
        raise ModelError("MODEL_MISMATCH", "the states belong to other optimisers or networks", "optimizers")
    for name, optimizer in optimizers.items():
        optimizer.load_state_dict({**optimizer.state_dict(), "state": states[name]})


def _fits(optimizer: torch.optim.Optimizer, state: Mapping[int, Mapping[str, torch.Tensor]]) -> bool:
    """Whether both moments of Adam have the shapes of the parameters. Raises KeyError, IndexError."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return all(
        parameters[index].shape == moments["exp_avg"].shape == moments["exp_avg_sq"].shape
        for index, moments in state.items()
    )
