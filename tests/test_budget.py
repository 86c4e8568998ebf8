"""The budget: refuses before anything is written, and whatever happens later stays spent."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledgers import PROOF, ledger_at, terms

from fedmedgan.shared.errors import PrivacyError
from fedmedgan.shared.privacy.accounting import calibrate_noise, epsilon_pld
from fedmedgan.shared.privacy.budget import Budget, preview
from fedmedgan.shared.privacy.events import TrainingSteps
from fedmedgan.shared.privacy.history import read
from fedmedgan.shared.privacy.ledger import Ledger

STUDY, OTHER, DELTA = "a" * 64, "b" * 64, 1e-4
ROUND = TrainingSteps(1.0, 0.1, 10)


def steps(events, delta) -> float:
    """A transparent stand-in where only the logic is tested: epsilon = number of steps."""
    return float(sum(event.steps for event in events))


def says(value: float):
    return lambda events, delta: value


@pytest.fixture
def ledger(tmp_path):
    with ledger_at(tmp_path / "ledger.jsonl") as ledger:
        ledger.open_study(STUDY, terms())
        yield ledger


def budget(ledger, study=STUDY, *, study_ceiling=30.0, total_ceiling=1000.0, **accountants) -> Budget:
    return Budget(
        ledger,
        study=study,
        delta=DELTA,
        study_ceiling=study_ceiling,
        total_ceiling=total_ceiling,
        accountants=accountants or {"steps": steps},
    )


def refused(code: str, context, ledger: Ledger) -> PrivacyError:
    """The reservation is refused, its body never runs, and the ledger is byte for byte as before."""
    before = ledger.path.read_bytes()
    with pytest.raises(PrivacyError) as caught, context:
        pytest.fail("data was touched")
    assert caught.value.code == code
    assert ledger.path.read_bytes() == before
    return caught.value


def test_preview_takes_the_larger_accountant():
    decision = preview(
        [ROUND],
        [ROUND],
        delta=DELTA,
        ceiling=25.0,
        accountants={"one": steps, "two": lambda *a: steps(*a) + 0.1},
    )
    assert (decision.spent_epsilon, decision.after_epsilon) == (10.1, 20.1)
    assert decision.per_accountant == {"one": 20.0, "two": 20.1}
    assert decision.allowed
    assert decision.agree


def test_exactly_at_the_ceiling_is_allowed_and_one_bit_above_is_not():
    plan = {"delta": DELTA, "accountants": {"steps": steps}}
    assert preview([ROUND], [ROUND], ceiling=20.0, **plan).allowed
    assert not preview([ROUND], [ROUND], ceiling=math.nextafter(20.0, 0), **plan).allowed


@pytest.mark.parametrize(
    ("accountants", "ceiling"),
    [
        ({"a": says(math.nan), "b": says(1.0)}, 8.0),
        ({"a": says(1.0), "b": says(math.nan)}, 8.0),
        ({"a": says(math.inf)}, 8.0),
        ({"a": says(-math.inf)}, 8.0),
        ({}, 8.0),
        ({"a": says(1.0)}, math.nan),
        ({"a": says(1.0)}, math.inf),
        ({"a": says(1.0)}, -1.0),
    ],
)
def test_doubt_is_not_permission(accountants, ceiling):
    assert not preview([], [ROUND], delta=DELTA, ceiling=ceiling, accountants=accountants).allowed


@settings(deadline=None, max_examples=100)
@given(pld=st.floats(0, 100), gap=st.floats(-5, 5))
def test_accountants_agree_within_two_percent_or_a_hundredth(pld, gap):
    prv = max(0.0, pld + gap)
    decision = preview([], [], delta=DELTA, ceiling=1e3, accountants={"pld": says(pld), "prv": says(prv)})
    assert decision.agree == (abs(pld - prv) <= max(0.01, 0.02 * max(pld, prv)))


def test_rounds_run_until_the_next_one_would_break_the_ceiling(ledger):
    for number in (1, 2, 3):
        with budget(ledger).reserve(number, ROUND) as reservation:
            assert reservation.decision.after_epsilon == 10.0 * number
            reservation.charge(10, **PROOF)
    error = refused("BUDGET_EXHAUSTED", budget(ledger).reserve(4, ROUND), ledger)
    assert "40" in error.what
    assert "30" in error.what
    assert "round 4" in error.where


def test_a_crash_inside_a_round_spends_it_in_full(ledger):
    with pytest.raises(ZeroDivisionError), budget(ledger).reserve(1, ROUND):
        1 / 0  # noqa: B018
    with budget(ledger).reserve(1, ROUND):
        pass  # neither charged nor voided
    assert ledger.spent() == [ROUND.with_steps(20)]
    assert read(ledger.path).spent() == [ROUND.with_steps(20)]


def test_fewer_steps_are_charged_and_an_untouched_round_is_taken_back(ledger):
    with budget(ledger).reserve(1, ROUND) as reservation:
        reservation.charge(4, **PROOF)
    with budget(ledger).reserve(2, ROUND) as reservation:
        reservation.void("the folder could not be read")
    assert ledger.spent() == [ROUND.with_steps(4)]


def test_a_round_of_two_kinds_of_steps(ledger):
    second = TrainingSteps(2.0, 0.1, 5)
    with budget(ledger).reserve(1, ROUND, second) as reservation:
        assert reservation.decision.after_epsilon == 15.0
        reservation.charge(10, 5, **PROOF)
    assert ledger.spent() == [ROUND, second]


def test_all_studies_share_the_hospitals_ceiling(ledger):
    ledger.open_study(OTHER, terms(ceiling=30.0))
    with budget(ledger, OTHER).reserve(1, ROUND, ROUND) as reservation:
        reservation.charge(10, 10, **PROOF)
    ledger.close_study(OTHER)
    limited = budget(ledger, study_ceiling=30.0, total_ceiling=30.0)
    with limited.reserve(1, ROUND) as reservation:
        assert reservation.decision.after_epsilon == 10.0, "what this study spent"
    error = refused("BUDGET_EXHAUSTED", limited.reserve(2, ROUND), ledger)
    assert "all studies" in error.where


def test_accountants_that_disagree_stop_the_round(ledger):
    apart = budget(ledger, pld=says(5.0), prv=says(5.2))
    error = refused("PRIVACY_ACCOUNTANTS", apart.reserve(1, ROUND), ledger)
    assert "pld 5" in error.what
    assert "prv 5.2" in error.what


def test_an_accountant_that_fails_stops_the_round(ledger):
    def fail(events, delta):
        raise PrivacyError("PRIVACY_ACCOUNTANTS", "gave up")

    refused("PRIVACY_ACCOUNTANTS", budget(ledger, broken=fail).reserve(1, ROUND), ledger)


def test_a_study_that_was_never_opened_reserves_nothing(ledger):
    refused("LEDGER_STATE", budget(ledger, OTHER).reserve(1, ROUND), ledger)


@pytest.mark.parametrize(
    "change", [{"delta": 2.0}, {"delta": math.nan}, {"study_ceiling": math.nan}, {"total_ceiling": math.inf}]
)
def test_a_budget_of_nonsense_is_refused(ledger, change):
    values = {
        "study": STUDY,
        "delta": DELTA,
        "study_ceiling": 8.0,
        "total_ceiling": 8.0,
        "accountants": {"s": steps},
    }
    with pytest.raises(PrivacyError) as caught:
        Budget(ledger, **{**values, **change})
    assert caught.value.code == "PRIVACY_RANGE"


def test_the_noise_calibrated_for_a_study_pays_for_all_its_rounds_and_no_more(ledger):
    """The real accountant, from calibration to the last round."""
    sigma = calibrate_noise(epsilon=4.0, delta=DELTA, sampling_rate=0.2, steps=5 * 20)
    one_round = TrainingSteps(sigma, 0.2, 20)
    real = budget(ledger, study_ceiling=4.0, total_ceiling=4.0, pld=epsilon_pld)
    curve = [0.0]
    for number in range(1, 6):
        with real.reserve(number, one_round) as reservation:
            curve.append(reservation.decision.after_epsilon)
            assert reservation.decision.spent_epsilon == curve[-2]
            reservation.charge(20, **PROOF)
    assert all(before < after for before, after in pairwise(curve))
    assert 3.9 < curve[-1] <= 4.0
    refused("BUDGET_EXHAUSTED", real.reserve(6, one_round), ledger)
