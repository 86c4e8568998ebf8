"""Where noise and sampling come from: the operating system, through AES-256 in counter mode; never a seed.

Differential privacy assumes that nobody can guess the noise. Two common generators break that:

- torch's CPU generator keeps 32 bits of a seed: seeds s and s + 2**32 give the same stream, so an observer
  who knows all records but one tries 2**32 seeds and subtracts the noise.
- Mersenne Twister, even with its whole state filled by the operating system, is linear over GF(2): each
  output bit is a sum of bits of a 19,937-bit state. That observer assumes a value of the one unknown record,
  gets a candidate for the noise of some hundred thousand weights, and only has to test a linear system for
  consistency.

AES-CTR output cannot be told from random without the key. Each draw takes a new key from the operating
system, so there is no state to save, restore, guess or share: a forked process cannot repeat its parent's
noise, nor a resumed round the noise of the round before (the difference of two such updates is exactly the
difference of the gradients).

Floating point (Mironov 2012; Jin et al. 2021, arXiv 2112.05307): samples are float64, and each is the sum of
four draws divided by two (Holohan and Braghin 2021, arXiv 2107.10138), so the lattice that one Box-Muller
sample lies on no longer gives away what it was added to. The caller adds in float64 and rounds the noised sum
by `round_to_grid`.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from torch import Tensor

DRAWS = 4
"""Gaussian draws that are summed into one sample. The square root of four is exact, so the scale is too."""
BLOCK = 1 << 15
"""Samples that are worked out at a time: fits into a processor's cache."""


class RandomSource:
    """Uniform and Gaussian draws from a key stream; `SystemRandom` or `InsecureRandom`.

    ====================  =====================================
    case                  result
    ====================  =====================================
    n = 0, shape (0, 3)   an empty tensor
    shape ()              one number, as a tensor without axes
    std = 0               zeros
    q = 0 / q = 1         nobody / everybody
    ====================  =====================================
    """

    name: str
    """Stamped into the ledger and on artefacts."""

    def _key(self) -> bytes:
        """32 bytes that no other draw has."""
        raise NotImplementedError

    def uniform(self, n: int) -> Tensor:
        """(n,) float64 on the CPU, in [0, 1), 53 random bits each."""
        return _uniform(_KeyStream(self._key()), n)

    def bernoulli(self, n: int, q: float) -> Tensor:
        """(n,) bool on the CPU: each True with chance q, independently. This is Poisson sampling."""
        return self.uniform(n) < q

    def integers(self, n: int, high: int) -> Tensor:
        """(n,) int64 on the CPU, in [0, high), equally likely up to high * 2**-53; high at most 2**31."""
        return (self.uniform(n) * high).long()

    def normal(self, shape: Sequence[int], std: float, device: torch.device | str = "cpu") -> Tensor:
        """Gaussian samples, float64, mean 0.

        Args:
            std: standard deviation; for DP-SGD sigma * C.
            device: where the result lies. The draws are made on the CPU.
        """
        stream, n = _KeyStream(self._key()), math.prod(shape)
        out = torch.empty(n, dtype=torch.float64)
        for start in range(0, n, BLOCK):
            block = out[start : start + BLOCK]
            block.copy_(_normal(stream, len(block)))
        return out.mul_(std).reshape(tuple(shape)).to(device)


class SystemRandom(RandomSource):
    """Cryptographic randomness: a new key from the operating system for every draw. Holds no state."""

    name = "os-aes256ctr"

    def _key(self) -> bytes:
        return os.urandom(32)


class InsecureRandom(RandomSource):
    """The same draws from a seed, for tests and `simulate --insecure-seed`: repeatable, so WITHOUT privacy.

    Args:
        seed: any integer; all of its bits count.
    """

    name = "INSECURE-seed"

    def __init__(self, seed: int) -> None:
        self._seed, self._draw = seed, 0

    def _key(self) -> bytes:
        self._draw += 1
        return hashlib.sha256(f"fedmedgan insecure seed {self._seed} draw {self._draw}".encode()).digest()


def round_to_grid(noised: Tensor, step: float = 2.0**-20) -> Tensor:
    """Round a NOISED sum to multiples of `step`, a power of two: low bits that noise leaves unmixed are gone.

    After the noise, so it is post-processing and costs no privacy. Below 16 the result is exact in float32 as
    well.

    Raises:
        ValueError: `step` is not a positive power of two.
    """
    if not (step > 0 and math.frexp(step)[0] == 0.5):
        raise ValueError(f"{step=} is not a power of two")
    return torch.round(noised / step) * step


class _KeyStream:
    """The bytes of AES-256-CTR under one key, in order."""

    def __init__(self, key: bytes) -> None:
        self._encryptor = Cipher(AES256(key), CTR(bytes(16))).encryptor()

    def bits53(self, n: int) -> Tensor:
        """(n,) int64 in [0, 2**53), uniform."""
        words = np.frombuffer(self._encryptor.update(bytes(8 * n)), dtype="<u8")
        return torch.from_numpy((words >> np.uint64(11)).astype(np.int64))


def _uniform(stream: _KeyStream, n: int) -> Tensor:
    return stream.bits53(n).double().mul_(2.0**-53)


def _normal(stream: _KeyStream, n: int) -> Tensor:
    """(n,) standard Gaussian samples: Box-Muller, DRAWS of them summed and divided by sqrt(DRAWS)."""
    half = (n + 1) // 2
    # (bits + 1) * 2**-53 is in (0, 1]: the logarithm of zero is never asked for.
    radius_DH = stream.bits53(DRAWS * half).double().add_(1).mul_(2.0**-53).log_().mul_(-2).sqrt_()
    angle_DH = _uniform(stream, DRAWS * half).mul_(2 * math.pi)
    cosine = (radius_DH * angle_DH.cos()).reshape(DRAWS, half).sum(0)
    sine = radius_DH.mul_(angle_DH.sin_()).reshape(DRAWS, half).sum(0)
    return torch.cat([cosine, sine]).div_(math.sqrt(DRAWS))[:n]
