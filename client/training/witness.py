"""Proof that the noise was there: a witness of each private step, apart from the code that makes it.

Setting a noise multiplier proves nothing about what was added. The witness looks at the tensors of every step, as the
backward pass left them and as the optimiser gets them, and answers four questions:

    noise     noised gradient minus clipped sum, over sigma C: independent standard Gaussians? `NoiseCheck`
    clipping  is the clipped sum the sum of min(1, C / norm) x row, on a random slice of each weight tensor?
    rows      do random rows leave each other alone, is a row's gradient that of its own loss, and did as many
              rows enter a step as patients were drawn and fakes are public?
    sampling  were patients drawn as Poisson sampling draws them? `SamplingCheck`

Each answer is "passed", "failed", "too-few" (steps, to tell) or "not-run". Noise and sampling call an honest run failed
with a chance below 1e-6 together, at each verdict; clipping and rows have no chance in them, only rounding.

Only verdicts leave this object. The noise and the counts that it remembers are secret: with the noise, anybody could
take it off the update again. So a witness cannot be pickled, and nothing of it is written anywhere.

What it cannot see: a hospital that WANTS to deceive and changes this file, and noise that is predictable but looks
random and never repeats.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedmedgan.client.training.noise_check import NoiseCheck
from fedmedgan.client.training.row_gradients import RowGradients
from fedmedgan.client.training.sampling_check import SamplingCheck
from fedmedgan.shared.privacy.records import CHECKS

PROBE_ROWS = 3
LOUD = 1e6
"""The probe's losses are multiplied by this: every row is then far above C, so a missing clip shows."""
SLICE = 16
"""Values of each weight tensor that are added up again in each step, at a random place."""
CLIP_TOLERANCE = 3e-5
"""Relative. Of it 1e-5 is the margin by which `private_step` clips to less than C; float32 is good for 2e-6."""
ADDING_ERROR = 2.0**-23
"""Relative error of a float32 sum, for each row in it."""
OTHER_ROWS_TOLERANCE = 1e-4
"""How far a row may move, relative to itself, when another row changes; on a CPU it does not move at all."""
OWN_GRADIENT_TOLERANCE = 1e-2
"""Between Opacus and plain autograd; GPUs convolve with 10 bits of mantissa. Reflect padding is 3 % off."""


@dataclass(frozen=True)
class ProbePass:
    """What one pass of random rows gave."""

    losses_NV: Tensor
    """Of each record's rows."""
    gradients_ND: Tensor
    norms_N: Tensor
    """As they are clipped by."""
    clipped: Sequence[Tensor]
    """The clipped sum, one tensor for each weight tensor."""


class NoWitness:
    """Nobody watches: every check is "not-run"."""

    watches = False

    def saw_draw(self, patients_B: Tensor) -> None:
        """Who was drawn for the step that begins, as places in the sampler; private."""

    def saw_rows(self, rows: RowGradients, norms_PN: Tensor) -> None:
        """Records of one chunk of the step: their gradients as the backward pass left them, and the norms of those."""

    def saw_step(self, clipped: Sequence[Tensor], gradients: Sequence[Tensor], divisor: int) -> None:
        """The clipped sum of those rows, and the gradients that the optimiser gets: noised, over `divisor`."""

    def saw_probe(self, first: ProbePass, changed: ProbePass, row_1_D: Tensor) -> None:
        """Two passes that differ in row 0 alone, and the gradient of row 1's loss in the first by plain autograd."""

    def saw_mixed_inputs(self) -> None:
        """What a recipe made of one record, before any network, changed with another record."""

    def verdicts(self) -> dict[str, str]:
        """The answer to each of CHECKS."""
        return dict.fromkeys(CHECKS, "not-run")

    def __reduce__(self) -> str:
        raise TypeError("a witness holds noise and private counts: it is never stored")


class Witness(NoWitness):
    """Watches the private steps of one hospital. For each step: `saw_draw`, `saw_rows`, `saw_step`.

    Answers are about everything that it saw, from its first step on.

    Args:
        noise_multiplier: sigma, as it is charged.
        clip_norm: C of the study.
        sampling_rate: q, as it is charged.
        fakes: rows of a step that are no patients; public.
        patients: how many the sampler draws from.
        declared: how many the study says there are; public.

    =======================================  =====================================================================
    case                                     result
    =======================================  =====================================================================
    no step yet                              every check "not-run"
    a step was shown in part, or not at all  every check fails: something went round the witness
    no probe                                 rows "not-run"
    a row's gradient or norm is not finite   clipping fails unless the row counted as zero
    no row at all                            clipping fails unless the clipped sum is zero
    no row was above C in any step           clipping is judged by the probe, whose rows are all above C
    a network with random layers (dropout)   rows fails: two passes of the probe cannot be compared
    an earlier round                         is remembered, if the same witness goes on; else each round by itself
    =======================================  =====================================================================
    """

    watches = True

    def __init__(
        self,
        *,
        noise_multiplier: float,
        clip_norm: float,
        sampling_rate: float,
        fakes: int,
        patients: int,
        declared: int,
    ) -> None:
        self._noise_std, self._clip_norm, self._fakes = noise_multiplier * clip_norm, clip_norm, fakes
        self._noise = NoiseCheck()
        self._sampling = SamplingCheck(patients=patients, declared=declared, rate=sampling_rate)
        self._draws = self._steps = 0
        self._expected_rows = -1
        self._slices: _Slices | None = None
        self._clipping_held = self._counts_held = self._shown_in_full = True
        self._rows_apart: bool | None = None

    def saw_draw(self, patients_B: Tensor) -> None:
        self._draws += 1
        self._expected_rows = len(patients_B) + self._fakes
        self._sampling.see(patients_B.numpy())

    def saw_rows(self, rows: RowGradients, norms_PN: Tensor) -> None:
        if self._slices is None:
            self._slices = _Slices(rows.shapes, self._clip_norm)
        self._slices.add(rows, norms_PN)

    def saw_step(self, clipped: Sequence[Tensor], gradients: Sequence[Tensor], divisor: int) -> None:
        self._steps += 1
        if self._slices is None:
            self._shown_in_full = False
            return
        self._counts_held &= self._slices.n_rows == self._expected_rows
        self._clipping_held &= self._slices.agree(clipped)
        z_D = _float64([g.flatten() for g in gradients])
        z_D *= divisor
        z_D -= _float64([g.flatten() for g in clipped])
        z_D /= self._noise_std
        self._noise.see(z_D, np.array([g.numel() for g in clipped]))
        self._slices, self._expected_rows = None, -1

    def saw_probe(self, first: ProbePass, changed: ProbePass, row_1_D: Tensor) -> None:
        if self._slices is None:
            self._shown_in_full = False
            return
        self._clipping_held &= _clipped_in_full(changed, self._clip_norm)
        apart = (
            _close(first.losses_NV[1:], changed.losses_NV[1:], OTHER_ROWS_TOLERANCE)
            and _close(first.gradients_ND[1:], changed.gradients_ND[1:], OTHER_ROWS_TOLERANCE)
            and _close(row_1_D[None], first.gradients_ND[1:2], OWN_GRADIENT_TOLERANCE)
        )
        self._rows_apart = apart and self._rows_apart is not False
        self._slices = None

    def saw_mixed_inputs(self) -> None:
        self._rows_apart = False

    def verdicts(self) -> dict[str, str]:
        if self._draws == self._steps == 0:
            return dict.fromkeys(CHECKS, "not-run")
        if not self._shown_in_full or self._draws != self._steps:
            return dict.fromkeys(CHECKS, "failed")
        rows = "not-run" if self._rows_apart is None else _passed(self._rows_apart)
        return {
            "noise": self._noise.verdict(),
            "clipping": _passed(self._clipping_held),
            "rows": rows if self._counts_held else "failed",
            "sampling": self._sampling.verdict(),
        }


class _Slices:
    """A few values of each weight tensor, of each record, clipped and added up in float64; and norms of few records."""

    def __init__(self, shapes: Sequence[torch.Size], clip_norm: float) -> None:
        starts = [secrets.randbelow(max(1, shape.numel() - SLICE + 1)) for shape in shapes]
        self.places = [slice(start, start + SLICE) for start in starts]
        self.clip_norm, self.chunks, self.n_rows, self.norms_held = clip_norm, 0, 0, True
        self.sum_K = self.sizes_K = np.zeros(1)

    def add(self, rows: RowGradients, norms_PN: Tensor) -> None:
        rows_NK = _float64([rows.values(i, at) for i, at in enumerate(self.places)], dim=1)
        # 1e-6 is added as in Opacus, and in float32 as there: a hostile norm is infinite in both or in none.
        norm_N, finite_N = norms_PN.norm(dim=0).cpu().numpy(), norms_PN.isfinite().all(0).cpu().numpy()
        factors_N = np.minimum(1, self.clip_norm / (norm_N + 1e-6).astype(np.float64))
        if not finite_N.all():
            rows_NK[~finite_N], factors_N[~finite_N] = 0, 0
        self.sum_K = self.sum_K + factors_N @ rows_NK
        self.sizes_K = self.sizes_K + factors_N @ np.abs(rows_NK)
        self.n_rows += len(norm_N)
        self.chunks += 1
        if len(norm_N) and secrets.randbelow(self.chunks) == 0:  # about one or two records of a step
            n = secrets.randbelow(len(norm_N))
            whole_1D = _float64([rows.values(i, records=slice(n, n + 1)) for i in range(len(rows.parts))], dim=1)
            self.norms_held &= not finite_N[n] or _same_norms(whole_1D, norm_N[n : n + 1])

    def agree(self, clipped: Sequence[Tensor]) -> bool:
        found_K = _float64([g.flatten()[at] for g, at in zip(clipped, self.places, strict=True)])
        allowed_K = self.sizes_K * (CLIP_TOLERANCE + self.n_rows * ADDING_ERROR) + 1e-12
        return self.norms_held and bool((np.abs(found_K - self.sum_K) <= allowed_K).all())


def _same_norms(gradients_ND: np.ndarray, norms_N: np.ndarray) -> bool:
    """Whether records are as long as it is said; infinitely long where float32 cannot hold the squares."""
    true_N = np.linalg.norm(gradients_ND, axis=1)
    return bool(((np.abs(true_N - norms_N) <= CLIP_TOLERANCE * true_N + 1e-12) | ~np.isfinite(norms_N)).all())


def _clipped_in_full(probe: ProbePass, clip_norm: float) -> bool:
    """Every value of a pass of the probe, whose records are all far above C."""
    gradients_ND, norms_N = _float64([probe.gradients_ND]), probe.norms_N.cpu().numpy().astype(np.float64)
    factors_N = np.minimum(1, clip_norm / (norms_N + 1e-6))
    allowed_D = factors_N @ np.abs(gradients_ND) * (CLIP_TOLERANCE + len(norms_N) * ADDING_ERROR) + 1e-12
    found_D = _float64([g.flatten() for g in probe.clipped])
    wrong_D = np.abs(found_D - factors_N @ gradients_ND) > allowed_D
    return not wrong_D.any() and _same_norms(gradients_ND, norms_N)


def _float64(parts: Sequence[Tensor], dim: int = 0) -> np.ndarray:
    return torch.cat(list(parts), dim).cpu().numpy().astype(np.float64)


def _close(a_ND: Tensor, b_ND: Tensor, tolerance: float) -> bool:
    """Row by row; a NaN is close to nothing."""
    return bool(((a_ND - b_ND).norm(dim=1) <= tolerance * a_ND.norm(dim=1)).all())


def _passed(held: bool) -> str:
    return "passed" if held else "failed"
