"""What hits prove: the audit's bounds against slow, obvious formulas, published figures and exact error rates."""

from __future__ import annotations

import math
from bisect import bisect
from itertools import combinations

import dp_accounting
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedmedgan.audit import bounds
from fedmedgan.audit.bounds import (
    auc,
    auc_limits,
    gaussian_epsilon,
    judge,
    many_run_epsilon,
    many_run_epsilon_of_normal_noise,
    one_run_epsilon,
    one_run_p_value,
    rate_limits,
    smallest_auc_found,
    true_positives,
)


def binomial(n: int, p: float) -> list[float]:
    return [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]


# --- one run ---------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.data())
def test_the_p_value_is_the_papers(guesses, data):
    """Theorem 5.2, term by term: tail(v) + 2 m delta max_i (tail(v - i) - tail(v)) / i."""
    canaries = guesses + data.draw(st.integers(0, 9))
    correct = data.draw(st.integers(0, guesses))
    epsilon, delta = data.draw(st.floats(0, 6)), data.draw(st.sampled_from([0.0, 1e-5, 0.01]))
    chances = binomial(guesses, 1 / (1 + math.exp(-epsilon)))

    def tail(v: int) -> float:
        return sum(chances[v:])

    slopes = [(tail(correct - i) - tail(correct)) / i for i in range(1, correct + 1)] or [0.0]
    slow = min(1.0, tail(correct) + 2 * canaries * delta * max(slopes))
    fast = one_run_p_value(canaries=canaries, guesses=guesses, correct=correct, epsilon=epsilon, delta=delta)
    assert math.isclose(fast, slow, rel_tol=1e-9, abs_tol=1e-12)


@pytest.mark.parametrize(
    ("canaries", "guesses", "ceiling"), [(100, 100, 3.49), (1000, 100, 3.47), (1000, 1000, 5.78), (10000, 1000, 5.53)]
)
def test_the_known_ceilings(canaries, guesses, ceiling):
    found = one_run_epsilon(canaries=canaries, guesses=guesses, correct=guesses, delta=1e-5)
    assert round(found, 2) == ceiling


def test_the_bound_is_the_largest_epsilon_that_is_rejected():
    bound = one_run_epsilon(canaries=300, guesses=80, correct=75, delta=1e-5)
    at, above = (
        one_run_p_value(canaries=300, guesses=80, correct=75, epsilon=bound + d, delta=1e-5) for d in (0, 1e-4)
    )
    assert at <= 0.05 < above
    assert one_run_epsilon(canaries=300, guesses=80, correct=40, delta=1e-5) == 0.0
    assert one_run_epsilon(canaries=300, guesses=80, correct=0, delta=1e-5) == 0.0
    assert one_run_epsilon(canaries=300, guesses=80, correct=80, delta=0.01) == 0.0, "delta alone explains it"


@pytest.mark.parametrize(("epsilon", "delta"), [(0.5, 0.0), (2.0, 0.0), (1.0, 1e-3)])
def test_randomised_response_is_not_overestimated_more_often_than_the_level(epsilon, delta):
    """It tells the truth with chance delta, and otherwise with e^eps / (1 + e^eps): exactly (eps, delta)-private."""
    m = 200
    truth = delta + (1 - delta) / (1 + math.exp(-epsilon))
    too_large = [v for v in range(m + 1) if one_run_epsilon(canaries=m, guesses=m, correct=v, delta=delta) > epsilon]
    chances = binomial(m, truth)
    assert 0 < sum(chances[v] for v in too_large) <= 0.05


def test_randomised_response_by_simulation_where_the_auditor_picks_its_guesses():
    """A mechanism that is surer of some answers than of others: only those are guessed, as the theorem allows."""
    rng, m, r, wrong = np.random.default_rng(3), 400, 100, 0
    known = {}
    for _ in range(400):
        member = rng.random(m) < 0.5
        epsilons = np.where(np.arange(m) < r, 1.0, 0.1)  # the first hundred answer best, at epsilon 1
        answer = member ^ (rng.random(m) > 1 / (1 + np.exp(-epsilons)))
        correct = int((answer == member)[:r].sum())
        if correct not in known:
            known[correct] = one_run_epsilon(canaries=m, guesses=r, correct=correct, delta=0.0)
        wrong += known[correct] > 1.0
    assert wrong <= 400 * 0.05 + 3 * math.sqrt(400 * 0.05 * 0.95)


# --- many runs -------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 300), st.data())
def test_limits_of_a_rate_are_clopper_pearsons(trials, data):
    hits = data.draw(st.integers(0, trials))
    interval = stats.binomtest(hits, trials).proportion_ci(0.9, method="exact")
    assert np.allclose(rate_limits(hits, trials, 0.05), (interval.low, interval.high))


def test_no_trial_says_nothing_of_a_rate():
    assert rate_limits(0, 0, 0.05) == (0.0, 1.0)


def bound_of(hits, false, n=100, delta=1e-5, function=many_run_epsilon):
    return function(with_record=n, said_in=hits, without_record=n, said_in_wrongly=false, delta=delta, confidence=0.95)


def test_many_runs_by_hand():
    high = 1 - 0.025 ** (1 / 100)  # upper limit of 0 of 100, each side at 2.5 %
    assert math.isclose(bound_of(100, 0), math.log((1 - high - 1e-5) / high))
    low, high = rate_limits(60, 100, 0.025)[0], rate_limits(10, 100, 0.025)[1]
    assert math.isclose(bound_of(60, 10), math.log((low - 1e-5) / high))
    assert math.isclose(bound_of(90, 40), bound_of(60, 10)), "the other direction: negatives"
    assert bound_of(50, 50) == bound_of(0, 100) == bound_of(0, 0, n=0) == 0.0


def test_many_runs_of_randomised_response_are_not_overestimated():
    epsilon, n = 1.0, 60
    truth = 1 / (1 + math.exp(-epsilon))
    hits, false = binomial(n, truth), binomial(n, 1 - truth)
    over = sum(
        hits[h] * false[f] for h in range(n + 1) for f in range(n + 1) if bound_of(h, f, n=n, delta=0.0) > epsilon
    )
    assert 0 < over <= 0.05


@pytest.mark.parametrize("mu", [0.1, 0.5, 1.0, 3.0])
def test_epsilon_of_normal_noise_is_google_s(mu):
    assert math.isclose(gaussian_epsilon(mu, 1e-5), dp_accounting.get_epsilon_gaussian(1 / mu, 1e-5), rel_tol=1e-3)


def test_epsilon_of_normal_noise_at_its_ends():
    assert gaussian_epsilon(0.0, 1e-5) == gaussian_epsilon(1e-9, 0.5) == 0.0
    assert gaussian_epsilon(1000.0, 1e-5) == bounds.MOST_EPSILON


def test_normal_noise_is_bounded_far_more_sharply_and_not_overestimated():
    """The best attack on normal noise with mu = 1, threshold in the middle: TPR = Phi(1/2), FPR = Phi(-1/2)."""
    n, mu = 100, 1.0
    truth, expected = gaussian_epsilon(mu, 1e-5), round(n * stats.norm.cdf(mu / 2))
    sharp = bound_of(expected, n - expected, function=many_run_epsilon_of_normal_noise)
    assert bound_of(expected, n - expected) < 0.2 * truth < 0.35 * truth < sharp < truth
    hits, false, over = binomial(n, stats.norm.cdf(mu / 2)), binomial(n, stats.norm.cdf(-mu / 2)), 0.0
    for h in range(55, 90):
        too_large = bisect(
            range(n), False, key=lambda f, h=h: bound_at(h, f) <= truth
        )  # fewer false ones, larger bound
        over += hits[h] * sum(false[:too_large])
    assert 0 < over <= 0.05


def bound_at(hits, false):
    return bound_of(hits, false, function=many_run_epsilon_of_normal_noise)


# --- scores ----------------------------------------------------------------------------------------------------

SCORES = st.lists(st.integers(0, 5), min_size=1, max_size=12)


@settings(deadline=None, max_examples=40)
@given(SCORES, SCORES)
def test_the_auc_counts_pairs(members, others):
    slow = np.mean([(m > o) + (m == o) / 2 for m in members for o in others])
    assert math.isclose(auc(members, others), slow, abs_tol=1e-12)


def test_limits_of_the_auc_cover_it_as_often_as_they_say(monkeypatch):
    monkeypatch.setattr(bounds, "RESAMPLES", 200)
    rng, truth, tries = np.random.default_rng(0), stats.norm.cdf(1 / math.sqrt(2)), 80
    found = [
        auc_limits(rng.normal(1, 1, 40), rng.normal(0, 1, 50), lower_level=0.05, upper_level=0.05, seed=i)
        for i in range(tries)
    ]
    lower, upper = np.array(found)[:, 0], np.array(found)[:, 1]
    slack = 3 * math.sqrt(0.05 * 0.95 / tries)
    assert np.mean(lower > truth) < 0.05 + slack
    assert np.mean(upper < truth) < 0.05 + slack
    assert np.mean(upper - lower) < 0.25, "and they are not wide"


def test_a_bootstrap_without_spread_claims_no_more_than_its_patients():
    lower, upper, ceiling = auc_limits(np.ones(20), np.zeros(30), lower_level=0.025, upper_level=0.05)
    assert (lower, upper) == (ceiling, 1.0)
    assert math.isclose(ceiling, 0.025 ** (1 / 20))
    assert auc_limits([1.0], [0.0], lower_level=0.025, upper_level=0.05)[0] == 0.025
    assert auc_limits(np.ones(20), np.ones(30), lower_level=0.025, upper_level=0.05)[:2] == (0.5, 0.5)
    repeated = [auc_limits(np.arange(20), np.arange(30), lower_level=0.1, upper_level=0.1) for _ in range(2)]
    assert repeated[0] == repeated[1]


def test_the_smallest_auc_found_is_found_nine_times_in_ten(monkeypatch):
    monkeypatch.setattr(bounds, "RESAMPLES", 200)
    rng, n = np.random.default_rng(1), 100
    shift = math.sqrt(2) * stats.norm.ppf(smallest_auc_found(n, n, level=0.05))
    found = [
        auc_limits(rng.normal(shift, 1, n), rng.normal(0, 1, n), lower_level=0.05, upper_level=0.05)[0] > 0.5
        for _ in range(60)
    ]
    assert 0.75 < np.mean(found) < 0.99


@pytest.mark.parametrize(("members", "others", "rate"), [(5, 4, 0.01), (4, 5, 0.2), (6, 4, 0.5)])
def test_what_chance_catches_is_exact(members, others, rate):
    """Every order of members and others, by hand: `by_chance` is the limit of the last count that is not too rare."""
    allowed, level, orders = math.floor(rate * others), 0.15, []
    for ranks in combinations(range(members + others), members):
        scores = [sorted(ranks), [r for r in range(members + others) if r not in ranks]]
        threshold = sorted(scores[1])[::-1][allowed]
        orders.append(sum(s > threshold for s in scores[0]))
        found = true_positives(*scores, false_positive_rate=rate, level=level)
        assert (found.caught, found.false_positives) == (orders[-1], allowed)
    rare = [c for c in range(1, members + 1) if np.mean(np.array(orders) >= c) <= level]
    expected = min(rare, default=members + 1) - 1
    assert found.by_chance == rate_limits(expected, members, level)[0]


def test_few_who_are_copied_are_found_where_the_average_is_blind():
    rng = np.random.default_rng(2)
    members, others = rng.normal(size=300), rng.normal(size=300)
    members[:15] = 9
    found = true_positives(members, others, false_positive_rate=0.01, level=0.0125)
    assert found.caught >= 15 and found.lower > found.by_chance and found.ceiling > 0.98
    assert auc_limits(members, others, lower_level=0.0125, upper_level=0.05)[0] < 0.5


def test_a_member_at_the_threshold_is_not_caught():
    found = true_positives(np.ones(50), np.ones(50), false_positive_rate=0.01, level=0.05)
    assert (found.caught, found.lower, found.rate) == (0, 0.0, 0.0)


def test_too_few_to_tell_anything():
    found = true_positives([1.0, 1.0], [0.0, 0.0], false_positive_rate=0.01, level=0.05)
    assert judge(found.lower, found.ceiling, found.by_chance) == "too-few"


def test_the_verdict():
    assert judge(2.1, 3.0, 2.0) == "failed"
    assert judge(1.9, 3.0, 2.0) == "passed"
    assert judge(1.9, 2.0, 2.0) == "too-few"
