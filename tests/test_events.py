"""Events: what accountants are fed, and what never reaches them."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmedgan.shared.errors import PrivacyError
from fedmedgan.shared.privacy.events import TrainingSteps, check_delta, merge, statement

events = st.builds(
    TrainingSteps,
    st.sampled_from([0.3, 1, 1.1, 1000.0]) | st.floats(0.3, 1000),
    st.sampled_from([1, 0.5, 1e-6]) | st.floats(1e-9, 1),
    st.integers(0, 1000),
)

NONSENSE = [math.nan, math.inf, -math.inf, -1.0, None, "1", True, [1.0], 10**400]


@pytest.mark.parametrize("value", [*NONSENSE, 0.0, 0.29, 1000.1])
def test_a_noise_multiplier_that_is_not_one_is_refused(value):
    with pytest.raises(PrivacyError) as caught:
        TrainingSteps(value, 0.1, 1)
    assert (caught.value.code, caught.value.where) == ("PRIVACY_RANGE", "noise_multiplier")


@pytest.mark.parametrize("value", [*NONSENSE, 0.0, 1.0001])
def test_a_sampling_rate_that_is_not_one_is_refused(value):
    with pytest.raises(PrivacyError) as caught:
        TrainingSteps(1.0, value, 1)
    assert (caught.value.code, caught.value.where) == ("PRIVACY_RANGE", "sampling_rate")


@pytest.mark.parametrize("value", [*NONSENSE, -5, 10_000_001, 3.0])
def test_a_number_of_steps_that_is_not_one_is_refused(value):
    with pytest.raises(PrivacyError) as caught:
        TrainingSteps(1.0, 0.1, value)
    assert (caught.value.code, caught.value.where) == ("PRIVACY_RANGE", "steps")


@pytest.mark.parametrize("value", [*NONSENSE, 0.0, 1e-11, 0.1, 1, 2])
def test_a_delta_that_is_not_one_is_refused(value):
    with pytest.raises(PrivacyError) as caught:
        check_delta(value)
    assert (caught.value.code, caught.value.where) == ("PRIVACY_RANGE", "delta")


@pytest.mark.parametrize(
    "values",
    [
        None,
        [],
        {},
        {"noise_multiplier": 1.0, "sampling_rate": 0.1},
        {"noise_multiplier": 1.0, "sampling_rate": 0.1, "steps": 1, "more": 1},
        {"noise_multiplier": 1.0, "sampling_rate": 0.1, "steps": True},
    ],
)
def test_from_dict_refuses_what_to_dict_never_writes(values):
    with pytest.raises(PrivacyError) as caught:
        TrainingSteps.from_dict(values)
    assert caught.value.code == "PRIVACY_RANGE"


@settings(deadline=None, max_examples=50)
@given(event=events)
def test_an_event_survives_json_exactly(event):
    assert TrainingSteps.from_dict(json.loads(json.dumps(event.to_dict()))) == event


@settings(deadline=None, max_examples=50)
@given(history=st.lists(events, max_size=8), order=st.randoms(use_true_random=False))
def test_merge_keeps_the_steps_of_each_kind_whatever_the_order(history, order):
    def count(events):
        """Oracle: one entry for every single step."""
        return sorted((e.noise_multiplier, e.sampling_rate) for e in events for _ in range(e.steps))

    merged = merge(history)
    assert count(merged) == count(history)
    assert len({(e.noise_multiplier, e.sampling_rate) for e in merged}) == len(merged)
    assert all(e.steps for e in merged)
    shuffled = history[:]
    order.shuffle(shuffled)
    assert merge(shuffled) == merged


def test_merge_of_more_steps_than_an_accountant_takes_is_refused():
    with pytest.raises(PrivacyError) as caught:
        merge([TrainingSteps(1.0, 0.1, 10_000_000), TrainingSteps(1.0, 0.1, 1)])
    assert caught.value.code == "PRIVACY_RANGE"


def test_the_statement_names_unit_adjacency_and_sampling():
    text = statement(7.983, 1e-4, 13.21)
    for part in ("(7.98, 0.0001)", "one patient", "add or remove", "replace", "13.2", "Poisson", "pays the sum"):
        assert part in text
