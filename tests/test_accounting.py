"""Epsilon: against closed forms, against direct integration, and in the right order."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, optimize
from scipy.special import logsumexp
from scipy.stats import norm

from fedmedgan.shared.errors import PrivacyError
from fedmedgan.shared.privacy import accounting
from fedmedgan.shared.privacy.accounting import (
    HOPELESS_EPSILON,
    accountant_error,
    calibrate_noise,
    epsilon_after_rounds,
    epsilon_pld,
    epsilon_rdp,
    epsilon_replace_one,
)
from fedmedgan.shared.privacy.events import TrainingSteps

DELTA = 1e-5


def gaussian_epsilon(sigma: float, steps: int, delta: float) -> float:
    """Oracle for q = 1, exact: T Gaussian steps are one with mu = sqrt(T) / sigma (Dong, Roth, Su 2019, Cor. 2.13)."""
    mu = math.sqrt(steps) / sigma

    def gap(epsilon: float) -> float:
        tail = math.exp(epsilon + norm.logcdf(-epsilon / mu - mu / 2))
        return norm.cdf(-epsilon / mu + mu / 2) - tail - delta

    return optimize.brentq(gap, 0, 500)


def one_step_epsilon(sigma: float, q: float, delta: float) -> float:
    """Oracle for one subsampled step: integrate the hockey-stick divergence in both directions."""
    p = norm(0, sigma).pdf

    def mixture(x: float) -> float:
        return (1 - q) * p(x) + q * norm(1, sigma).pdf(x)

    def divergence(epsilon: float) -> float:
        x = np.linspace(-12 * sigma, 12 * sigma + 1, 200_001)
        remove = np.maximum(mixture(x) - math.exp(epsilon) * p(x), 0)
        add = np.maximum(p(x) - math.exp(epsilon) * mixture(x), 0)
        return max(integrate.trapezoid(remove, x), integrate.trapezoid(add, x))

    return optimize.brentq(lambda e: divergence(e) - delta, 0, 50)


def renyi_epsilon(sigma: float, q: float, steps: int, delta: float) -> float:
    """Oracle for RDP: integrate E[(mixture / p)**alpha] for integer orders, then convert (Canonne et al. 2020)."""
    x = np.linspace(-40 * sigma, 40 * sigma + 80, 400_001)
    log_p = norm(0, sigma).logpdf(x)
    log_ratio = np.logaddexp(math.log1p(-q), math.log(q) + (2 * x - 1) / (2 * sigma**2))
    best = math.inf
    for alpha in range(2, 64):
        log_moment = logsumexp(log_p + alpha * log_ratio) + math.log(x[1] - x[0])
        rdp = steps * log_moment / (alpha - 1)
        best = min(best, rdp + math.log1p(-1 / alpha) - math.log(delta * alpha) / (alpha - 1))
    return best


@pytest.mark.parametrize(
    ("sigma", "steps", "delta"), [(30.0, 300, 1e-5), (1.0, 1, 1e-5), (5.0, 40, 1e-6), (200.0, 1000, 1e-4)]
)
def test_pld_is_exact_where_everybody_takes_part(sigma, steps, delta):
    truth = gaussian_epsilon(sigma, steps, delta)
    assert truth - 1e-6 <= epsilon_pld([TrainingSteps(sigma, 1.0, steps)], delta) <= truth * 1.002 + 1e-4


@pytest.mark.parametrize(("sigma", "q"), [(0.8, 0.03), (1.0, 0.1), (2.0, 0.5)])
def test_pld_is_exact_for_one_subsampled_step(sigma, q):
    truth = one_step_epsilon(sigma, q, DELTA)
    assert epsilon_pld([TrainingSteps(sigma, q, 1)], DELTA) == pytest.approx(truth, rel=2e-3)


@pytest.mark.parametrize(("sigma", "q", "steps"), [(1.0, 0.01, 10_000), (2.8, 0.16, 300), (1.1, 0.02, 500)])
def test_rdp_agrees_with_direct_integration(sigma, q, steps):
    # The accountant also knows orders between the whole ones, so it may be a little tighter, never looser.
    oracle = renyi_epsilon(sigma, q, steps, DELTA)
    assert 0.98 * oracle <= epsilon_rdp([TrainingSteps(sigma, q, steps)], DELTA) <= oracle * (1 + 1e-6)


@pytest.mark.parametrize(
    ("sigma", "q", "steps", "expected"),
    [
        (0.6, 0.01, 2000, 9.954),
        (1.0, 0.05, 2000, 16.49),
        (0.8, 0.02, 3000, 11.41),
        (1.0, 0.00213, 450_000, 9.261),
    ],
)
def test_pld_gives_the_published_figures(sigma, q, steps, expected):
    assert epsilon_pld([TrainingSteps(sigma, q, steps)], DELTA) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(("sigma", "steps", "delta"), [(30.0, 300, 1e-5), (2.0, 1, 1e-5), (10.0, 40, 1e-6)])
def test_replacing_one_is_exact_where_everybody_takes_part(sigma, steps, delta):
    """One patient's gradient may turn into its opposite: twice the distance, so half the noise."""
    truth = gaussian_epsilon(sigma / 2, steps, delta)
    found = epsilon_replace_one([TrainingSteps(sigma, 1.0, steps)], delta)
    assert truth - 1e-6 <= found <= truth * 1.002 + 1e-4


@pytest.mark.parametrize(("sigma", "q"), [(0.8, 0.03), (1.0, 0.1), (2.0, 0.5)])
def test_replacing_one_is_exact_for_one_subsampled_step(sigma, q):
    """Oracle: the hockey-stick divergence of two mixtures, with the patient's gradient and with its opposite."""
    x = np.linspace(-14 * sigma - 1, 14 * sigma + 1, 400_001)
    with_it, with_other = ((1 - q) * norm(0, sigma).pdf(x) + q * norm(at, sigma).pdf(x) for at in (1, -1))

    def gap(epsilon: float) -> float:
        return integrate.trapezoid(np.maximum(with_it - math.exp(epsilon) * with_other, 0), x) - DELTA

    truth = optimize.brentq(gap, 0, 50)
    assert epsilon_replace_one([TrainingSteps(sigma, q, 1)], DELTA) == pytest.approx(truth, rel=2e-3)


@pytest.mark.parametrize(
    ("sigma", "q", "steps", "expected"),
    [(1.0, 0.01, 10_000, 10.88), (1.0, 0.05, 2000, 29.67), (0.8, 0.02, 3000, 17.74)],
)
def test_replacing_one_costs_more(sigma, q, steps, expected):
    events = [TrainingSteps(sigma, q, steps)]
    replace_one = epsilon_replace_one(events, DELTA)
    assert replace_one == pytest.approx(expected, rel=2e-3)
    assert 1.2 < replace_one / epsilon_pld(events, DELTA) < 2.5


def test_replacing_one_has_a_closed_bound_where_there_is_no_hope():
    hopeless = [TrainingSteps(0.5, 1.0, 200)]
    assert epsilon_replace_one(hopeless, DELTA) > epsilon_rdp(hopeless, DELTA) > HOPELESS_EPSILON
    truth = 4 * 200 / 0.5**2 / 2  # the mean of the privacy loss alone
    assert truth < epsilon_replace_one(hopeless, DELTA) < 1.2 * truth


def test_nothing_done_costs_nothing():
    for accountant in (epsilon_pld, epsilon_rdp, epsilon_replace_one):
        assert accountant([], DELTA) == 0.0
        assert accountant([TrainingSteps(1.0, 0.1, 0)], DELTA) == 0.0


@settings(deadline=None, max_examples=4, derandomize=True)
@given(
    sigma=st.floats(1.5, 4),
    q=st.floats(0.05, 0.3),
    steps=st.integers(1, 500),
    more_noise=st.floats(1.05, 2),
    more_steps=st.floats(1.1, 3),
)
def test_epsilon_falls_with_noise_and_rises_with_rate_and_steps(sigma, q, steps, more_noise, more_steps):
    for accountant in (epsilon_pld, epsilon_rdp):
        base = accountant([TrainingSteps(sigma, q, steps)], DELTA)
        assert accountant([TrainingSteps(sigma * more_noise, q, steps)], DELTA) <= base
        assert accountant([TrainingSteps(sigma, min(1.0, q * more_noise), steps)], DELTA) >= base
        assert accountant([TrainingSteps(sigma, q, math.ceil(steps * more_steps))], DELTA) >= base
        assert accountant([TrainingSteps(sigma, q, steps)], DELTA / 10) >= base


def test_pld_never_exceeds_rdp():
    for sigma, q, steps in [(0.6, 0.02, 2000), (1.0, 0.002, 1000), (3.0, 0.2, 300), (0.5, 0.1, 20)]:
        events = [TrainingSteps(sigma, q, steps)]
        assert epsilon_pld(events, DELTA) <= epsilon_rdp(events, DELTA)


def test_different_steps_are_composed_in_any_order():
    first, second = TrainingSteps(1.0, 0.02, 300), TrainingSteps(2.0, 0.1, 200)
    together = epsilon_pld([first, second], DELTA)
    assert together == epsilon_pld([second, first], DELTA)
    assert max(epsilon_pld([first], DELTA), epsilon_pld([second], DELTA)) < together
    assert together < epsilon_pld([first], DELTA) + epsilon_pld([second], DELTA)
    halves = [first.with_steps(100), second, first.with_steps(200)]
    assert epsilon_pld(halves, DELTA) == together


def test_hopeless_plans_are_answered_at_once_by_the_looser_bound():
    events = [TrainingSteps(0.3, 1.0, 10_000_000)]
    assert epsilon_pld(events, DELTA) == epsilon_rdp(events, DELTA) > HOPELESS_EPSILON


@pytest.mark.parametrize("delta", [math.nan, 0.0, -1.0, 0.1, 1, 2, None, True, "1e-5"])
def test_nonsense_is_refused_before_an_accountant_sees_it(delta, monkeypatch):
    """Opacus answers delta = 2 with epsilon -10.3, steps = -5 with -134, and hangs on NaN."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("an accountant was asked")

    monkeypatch.setattr(accounting, "PLDAccountant", never)
    monkeypatch.setattr(accounting, "RdpAccountant", never)
    for accountant in (epsilon_pld, epsilon_rdp, epsilon_replace_one):
        with pytest.raises(PrivacyError) as caught:
            accountant([TrainingSteps(1.0, 0.1, 10)], delta)
        assert caught.value.code == "PRIVACY_RANGE"
    with pytest.raises(PrivacyError):
        calibrate_noise(epsilon=8.0, delta=delta, sampling_rate=0.1, steps=10)
    with pytest.raises(PrivacyError):
        epsilon_pld([TrainingSteps(1.0, 0.1, -5)], DELTA)


@pytest.mark.parametrize(
    ("epsilon", "delta", "q", "steps"),
    [(8.0, 1e-4, 0.16, 300), (1.0, 1e-5, 0.1, 200), (0.05, 1e-5, 0.01, 1000)],
)
def test_the_calibrated_noise_is_the_smallest_that_keeps_all_steps_within_epsilon(epsilon, delta, q, steps):
    sigma = calibrate_noise(epsilon=epsilon, delta=delta, sampling_rate=q, steps=steps)
    target = epsilon - 2 * accountant_error(epsilon, steps)
    assert sigma == round(sigma, 3)
    assert epsilon_pld([TrainingSteps(sigma, q, steps)], delta) <= target
    assert epsilon_pld([TrainingSteps(sigma - 0.001, q, steps)], delta) > target


def test_calibration_covers_all_rounds_and_not_one():
    """Calibrated for one of 50 rounds, the noise would let the study spend five times its epsilon."""
    whole = calibrate_noise(epsilon=8.0, delta=DELTA, sampling_rate=0.02, steps=50 * 40)
    one_round = calibrate_noise(epsilon=8.0, delta=DELTA, sampling_rate=0.02, steps=40)
    assert one_round < whole == pytest.approx(0.847, abs=0.002)
    assert epsilon_pld([TrainingSteps(one_round, 0.02, 2000)], DELTA) > 25


def test_calibration_knows_its_limits():
    assert calibrate_noise(epsilon=50.0, delta=DELTA, sampling_rate=0.02, steps=1) == 0.3
    with pytest.raises(PrivacyError) as caught:
        calibrate_noise(epsilon=0.01, delta=DELTA, sampling_rate=1.0, steps=1000)
    assert caught.value.code == "PRIVACY_RANGE"


@pytest.mark.parametrize(
    "change", [{"epsilon": math.nan}, {"epsilon": 0.001}, {"sampling_rate": 1.5}, {"steps": 0}, {"steps": -5}]
)
def test_calibration_refuses_nonsense(change):
    plan = {"epsilon": 8.0, "delta": DELTA, "sampling_rate": 0.1, "steps": 10}
    with pytest.raises(PrivacyError) as caught:
        calibrate_noise(**{**plan, **change})
    assert caught.value.code == "PRIVACY_RANGE"


def test_the_curve_of_a_study_ends_at_its_epsilon():
    curve = epsilon_after_rounds(TrainingSteps(1.0, 0.02, 40), [0, 1, 10, 50], DELTA)
    assert [k for k, _ in curve] == [0, 1, 10, 50]
    epsilons = [epsilon for _, epsilon in curve]
    assert epsilons[0] == 0.0
    assert epsilons == sorted(epsilons)
    assert epsilons[-1] == epsilon_pld([TrainingSteps(1.0, 0.02, 2000)], DELTA)


def test_the_logger_that_is_hushed_for_rdp_is_given_back():
    log = logging.getLogger("absl")
    before = log.level
    epsilon_rdp([TrainingSteps(1.0, 0.1234, 7)], DELTA)
    assert log.level == before
