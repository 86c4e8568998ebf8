"""Initial weights that are the same on every machine.

torch draws uniform and Gaussian numbers in an order that depends on the processor's vector instructions: two hospitals
with different machines would start from different weights, and the first round would stop with MODEL_DIVERGED. Here
every such draw while networks are built comes from numpy's PCG64, whose stream is fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fedmedgan.shared.errors import ModelError

_UNIFORM, _NORMAL = torch.ops.aten.uniform_.default, torch.ops.aten.normal_.default


class SameEverywhere(TorchDispatchMode):
    """Context in which weights are drawn from a seed alone.

    Raises:
        ModelError: MODEL_MISMATCH, at a draw of another kind (bernoulli, randperm, ...).
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._random = np.random.Generator(np.random.PCG64(seed))

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given: Mapping[str, Any] = kwargs or {}
        if func is _UNIFORM or func is _NORMAL:
            names = ("from", "to") if func is _UNIFORM else ("mean", "std")
            first, second = (args[i + 1] if len(args) > i + 1 else given.get(n, i) for i, n in enumerate(names))
            return self._fill(args[0], func is _UNIFORM, float(first), float(second))
        if torch.Tag.nondeterministic_seeded in getattr(func, "tags", ()):
            raise ModelError("MODEL_MISMATCH", "initial weights are drawn uniformly or from a Gaussian", str(func))
        return func(*args, **given)

    def _fill(self, tensor: Tensor, uniform: bool, first: float, second: float) -> Tensor:
        shape = tuple(tensor.shape)
        drawn = self._random.uniform(first, second, shape) if uniform else self._random.normal(first, second, shape)
        return tensor.copy_(torch.from_numpy(np.asarray(drawn)))
