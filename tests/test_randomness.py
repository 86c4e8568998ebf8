"""Randomness: the right distributions, never twice the same, never from a seed by accident.

Statistics of `SystemRandom` differ from run to run, so they are judged at one chance in a million and more.
"""

from __future__ import annotations

import copy
import math
import multiprocessing
import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedmedgan.client.training.randomness import InsecureRandom, RandomSource, SystemRandom, round_to_grid

ALARM = 1e-7
N = 200_000
SOURCES = [SystemRandom(), InsecureRandom(7)]


@pytest.fixture(params=SOURCES, ids=lambda source: source.name)
def source(request) -> RandomSource:
    return request.param


def test_uniforms_are_uniform(source):
    x = source.uniform(N)
    assert x.dtype == torch.float64
    assert x.shape == (N,)
    assert float(x.min()) >= 0
    assert float(x.max()) < 1
    assert stats.kstest(x.numpy(), "uniform").pvalue > ALARM
    low_bits = torch.bincount((x * 2.0**53).long() % 64, minlength=64)
    assert stats.chisquare(low_bits.numpy()).pvalue > ALARM, "the last of the 53 bits are as random as the first"


def test_normals_are_normal(source):
    x = source.normal((N,), 3.0).numpy()
    assert x.dtype == np.float64
    assert stats.kstest(x / 3, "norm").pvalue > ALARM
    # A chi-square test of the variance is far sharper than Kolmogorov-Smirnov against a wrong scale.
    tail = stats.chi2(N).cdf(float((x**2).sum()) / 9)
    assert ALARM < tail < 1 - ALARM
    edges = stats.norm.ppf(np.linspace(0, 1, 65))
    assert stats.chisquare(np.histogram(x / 3, edges)[0]).pvalue > ALARM


def test_the_tests_of_normality_would_notice_wrong_noise():
    x = SystemRandom().normal((N,), 1.02).numpy()
    assert stats.chi2(N).cdf(float((x**2).sum())) > 1 - ALARM
    two_valued = np.sign(x)
    assert stats.kstest(two_valued, "norm").pvalue < ALARM


def test_one_sample_tells_nothing_about_the_next(source):
    x = source.normal((N,), 1.0)
    half = N // 2
    for lag in (1, 2, half, 1 << 14):  # the two halves of a block come from the same radii
        for f in (lambda t: t, torch.abs, torch.square):
            a, b = f(x[:-lag]), f(x[lag:])
            assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 5.5 / math.sqrt(len(a))


def test_normals_reach_beyond_the_tail_of_float32():
    """torch.randn in float32 never exceeds 5.77; four float64 draws may reach 17."""
    x = SystemRandom().normal((2_000_000,), 1.0)
    beyond = int((x.abs() > 4.5).sum())
    assert 2 <= beyond <= 40, "13.6 expected"
    assert len(torch.unique(x)) == len(x), "no lattice: 53 bits and more in each sample"


@pytest.mark.parametrize("q", [0.001, 0.3, 0.97])
def test_bernoulli_draws_each_patient_independently_with_chance_q(source, q):
    drawn = source.bernoulli(N, q)
    assert drawn.dtype == torch.bool
    assert stats.binomtest(int(drawn.sum()), N, q).pvalue > ALARM
    sizes = torch.stack([source.bernoulli(200, q).sum() for _ in range(400)]).double()
    expected = 200 * q * (1 - q)  # a fixed batch size would have variance 0
    ratio = float(sizes.var()) * 399 / expected
    assert stats.chi2(399).ppf(ALARM) < ratio < stats.chi2(399).ppf(1 - ALARM)


def test_bernoulli_at_its_ends(source):
    assert not source.bernoulli(1000, 0.0).any()
    assert source.bernoulli(1000, 1.0).all()


@settings(deadline=None, max_examples=30)
@given(n=st.integers(0, 300), high=st.sampled_from([1, 2, 3, 7, 1000, 2**31 - 1, 2**31]))
def test_integers_stay_below_high(n, high):
    x = SystemRandom().integers(n, high)
    assert x.dtype == torch.int64
    assert x.shape == (n,)
    assert ((x >= 0) & (x < high)).all()


def test_integers_are_equally_likely(source):
    assert stats.chisquare(torch.bincount(source.integers(N, 7)).numpy()).pvalue > ALARM


def test_the_largest_uniform_times_high_stays_below_high():
    largest = torch.tensor([1 - 2.0**-53], dtype=torch.float64)
    for high in [*range(1, 2000), 2**31 - 1, 2**31]:
        assert int((largest * high).long()) == high - 1


@settings(deadline=None, max_examples=30)
@given(shape=st.lists(st.integers(0, 5), max_size=4), seed=st.integers(0, 9))
def test_shapes_are_kept_also_empty_ones(shape, seed):
    for random in (SystemRandom(), InsecureRandom(seed)):
        x = random.normal(torch.Size(shape), 2.0)
        assert x.shape == torch.Size(shape)
        assert x.dtype == torch.float64
        assert x.isfinite().all()
    assert torch.equal(SystemRandom().normal(shape, 0.0), torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("n", [1, 2, 3, (1 << 15) - 1, 1 << 15, (1 << 15) + 1, 70_001])
def test_no_sample_is_repeated_across_blocks(n):
    x = InsecureRandom(1).normal((n,), 1.0)
    assert len(torch.unique(x)) == n


def test_two_draws_are_never_the_same():
    first, second = SystemRandom(), SystemRandom()
    streams = [
        source.uniform(1000)
        for source in (first, second, first, copy.deepcopy(first), pickle.loads(pickle.dumps(first)))
    ]
    assert len(torch.unique(torch.cat(streams))) == 5000


def test_a_forked_process_does_not_repeat_its_parent():
    """A DataLoader worker, or a fork of any kind, must not add the noise that its parent adds."""
    random = SystemRandom()
    random.uniform(1)
    reading, writing = os.pipe()
    child = multiprocessing.get_context("fork").Process(
        target=lambda: os.write(writing, random.uniform(500).numpy().tobytes())
    )
    child.start()
    child.join()
    theirs = np.frombuffer(os.read(reading, 4000))
    os.close(reading)
    os.close(writing)
    assert len(theirs) == 500
    assert not set(theirs) & set(random.uniform(500).tolist())


def test_torch_and_numpy_seeds_change_nothing():
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        draws.append(SystemRandom().normal((50,), 1.0))
    assert not torch.equal(*draws)


def test_a_seeded_source_repeats_itself_and_says_that_it_is_insecure():
    def draws(seed: int) -> list[torch.Tensor]:
        random = InsecureRandom(seed)
        return [random.normal((3, 5), 1.0), random.uniform(9), random.normal((3, 5), 1.0)]

    for a, b in zip(draws(3), draws(3), strict=True):
        assert torch.equal(a, b)
    first, _, third = draws(3)
    assert not torch.equal(first, third)
    assert "INSECURE" in InsecureRandom.name
    assert "INSECURE" not in SystemRandom.name


@pytest.mark.parametrize("other", [3 + 2**32, 3 + 2**64, -3, 4])
def test_every_bit_of_a_seed_counts(other):
    """torch's CPU generator keeps 32 of them."""
    assert not torch.equal(InsecureRandom(3).uniform(4), InsecureRandom(other).uniform(4))
    if other == 3 + 2**32:
        same = [torch.rand(4, generator=torch.Generator().manual_seed(s)) for s in (3, other)]
        assert torch.equal(*same), "if torch mended this, the docs need a change"


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-15.9, 15.9), max_size=20))
def test_the_grid_is_exact_in_float32_and_near(values):
    x = torch.tensor(values, dtype=torch.float64)
    rounded = round_to_grid(x)
    assert ((rounded - x).abs() <= 2.0**-21).all()
    assert torch.equal((rounded * 2**20).round(), rounded * 2**20)
    assert torch.equal(rounded.float().double(), rounded)


@pytest.mark.parametrize("step", [0.0, -0.5, 0.3, math.nan, math.inf])
def test_a_grid_is_a_power_of_two(step):
    with pytest.raises(ValueError, match="power of two"):
        round_to_grid(torch.zeros(1), step)
