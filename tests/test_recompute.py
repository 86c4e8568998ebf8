"""Epsilon from the events alone: an RDP of our own against integrals and dp-accounting, and what a ledger comes to."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import dp_accounting
import numpy as np
import pytest
from audited import KEYS, Consortium, chained, study, terms
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from scipy.stats import norm

from fedmedgan.audit import recompute
from fedmedgan.audit.recompute import (
    MAX_KINDS,
    all_costs,
    cost_of,
    costs,
    enforced,
    epsilon_rdp,
    fewer_kinds,
    renyi_divergence,
)
from fedmedgan.shared.errors import PrivacyError
from fedmedgan.shared.privacy.accounting import epsilon_pld, epsilon_replace_one
from fedmedgan.shared.privacy.events import TrainingSteps, merge
from fedmedgan.shared.privacy.history import History, verify

DELTA = 1e-5
NAME = "clinic-a"


def integrated(sigma: float, q: float, order: float) -> float:
    """Oracle: the Renyi divergence of one step by direct integration."""
    x = np.linspace(-50 * sigma - 30, 50 * sigma + 30 + 2 * order, 1_000_001)
    log_p = norm(0, sigma).logpdf(x)
    log_ratio = np.logaddexp(math.log1p(-q), math.log(q) + (2 * x - 1) / (2 * sigma**2))
    return (logsumexp(log_p + order * log_ratio) + math.log(x[1] - x[0])) / (order - 1)


@pytest.mark.parametrize(("sigma", "q"), [(0.8, 0.3), (1.2, 0.5), (2.0, 0.99), (0.3, 0.1), (1.0, 0.01), (4.0, 0.05)])
def test_every_order_agrees_with_the_integral(sigma, q):
    for order in (1.05, 1.5, 1.95, 2, 2.5, 7.5, 10, 33):
        assert renyi_divergence(sigma, q, order) == pytest.approx(integrated(sigma, q, order), rel=1e-5, abs=1e-8)


def test_both_directions_of_the_divergence_are_covered():
    """Removing a patient and adding one differ; the theorem says that the one that is worked out is the larger."""
    for sigma, q, order in itertools.product([0.7, 1.5], [0.05, 0.4], [1.5, 3, 12]):
        x = np.linspace(-60, 60, 400_001)
        log_p = norm(0, sigma).logpdf(x)
        log_mixture = log_p + np.logaddexp(math.log1p(-q), math.log(q) + (2 * x - 1) / (2 * sigma**2))
        other = (logsumexp(order * log_p + (1 - order) * log_mixture) + math.log(x[1] - x[0])) / (order - 1)
        assert other <= renyi_divergence(sigma, q, order) + 1e-9


GRID = list(itertools.product([0.6, 1.0, 2.0, 5.0], [0.001, 0.02, 0.2, 1.0], [1, 50, 5000], [1e-4, 1e-7]))


@pytest.mark.parametrize(("sigma", "q", "steps", "delta"), GRID[::3])
def test_its_rdp_is_that_of_dp_accounting(sigma, q, steps, delta):
    """At the same orders. Alone, dp-accounting leaves out fractional orders where its series is not stable."""
    whole = RdpAccountant(recompute._WHOLE_ORDERS)
    event = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma))
    theirs = whole.compose(dp_accounting.SelfComposedDpEvent(event, steps)).get_epsilon(delta)
    ours = epsilon_rdp([TrainingSteps(sigma, q, steps)], delta)
    assert ours <= theirs * 1.0001 + 1e-9, "more orders, so tighter or the same"
    at_theirs = epsilon_at(recompute._WHOLE_ORDERS, sigma, q, steps, delta)
    assert at_theirs == pytest.approx(theirs, rel=0.02, abs=1e-4)


def epsilon_at(orders, sigma: float, q: float, steps: int, delta: float) -> float:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recompute, "_FRACTIONAL_ORDERS", ())
        patch.setattr(recompute, "_WHOLE_ORDERS", orders)
        return epsilon_rdp([TrainingSteps(sigma, q, steps)], delta)


@settings(deadline=None, max_examples=15, derandomize=True)
@given(
    sigma=st.floats(0.5, 6), q=st.floats(0.001, 1), steps=st.integers(1, 300), delta=st.sampled_from([1e-3, 1e-5, 1e-8])
)
def test_it_is_an_upper_bound(sigma, q, steps, delta):
    events = [TrainingSteps(sigma, q, steps)]
    ours = epsilon_rdp(events, delta)
    if ours < 200:
        assert epsilon_pld(events, delta) <= ours * (1 + 1e-6)


# ---- all accountants


def test_the_larger_accountant_counts_and_the_others_stand_beside():
    events = [TrainingSteps(1.1, 0.05, 200), TrainingSteps(2.0, 0.1, 100)]
    found = cost_of(events, DELTA)
    assert found.enforced == max(found.accountants["pld"], found.accountants["prv"]) == enforced(events, DELTA)
    assert found.accountants["pld"] == epsilon_pld(events, DELTA)
    assert found.enforced < found.rdp < 1.3 * found.enforced
    assert found.replace_one == epsilon_replace_one(events, DELTA) > found.enforced
    assert not found.rounded


def test_nothing_done_costs_nothing():
    for events in ([], [TrainingSteps(1.0, 0.1, 0)]):
        found = cost_of(events, DELTA)
        assert (found.enforced, found.rdp, found.replace_one) == (0.0, 0.0, 0.0)


def test_order_and_cutting_into_rounds_do_not_matter():
    first, second = TrainingSteps(1.0, 0.02, 100), TrainingSteps(2.0, 0.1, 60)
    parts = [second.with_steps(10), first.with_steps(99), second.with_steps(50), first.with_steps(1)]
    assert cost_of(parts, DELTA) == cost_of([first, second], DELTA)


@pytest.mark.parametrize("delta", [math.nan, 0.0, 0.5, None, "1e-5"])
def test_nonsense_is_refused_before_any_accountant_sees_it(delta, monkeypatch):
    monkeypatch.setattr(recompute, "_cost_of", lambda *_: pytest.fail("an accountant was asked"))
    with pytest.raises(PrivacyError) as caught:
        cost_of([TrainingSteps(1.0, 0.1, 10)], delta)
    assert caught.value.code == "PRIVACY_RANGE"


def test_without_torch_pld_is_what_counts():
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "opacus"):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Block())
from fedmedgan.audit.recompute import cost_of
from fedmedgan.shared.privacy.events import TrainingSteps
found = cost_of([TrainingSteps(2.0, 0.1, 50)], 1e-5)
assert set(found.accountants) == {"pld"} and found.rdp > found.enforced > 0, found
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# ---- many kinds of steps


def test_few_kinds_are_left_alone_and_many_are_rounded_up():
    many = [TrainingSteps(1 + i / 977, 0.01 + i / 99_991, 3) for i in range(60)]
    assert fewer_kinds(many[:MAX_KINDS]) == tuple(merge(many[:MAX_KINDS]))
    few = fewer_kinds(many)
    assert len(few) <= MAX_KINDS
    assert sum(event.steps for event in few) == sum(event.steps for event in many)
    assert epsilon_rdp(few, DELTA) >= epsilon_rdp(many, DELTA)
    spread = [TrainingSteps(0.3 * 1.2**i, 0.9**j, 1) for i in range(30) for j in range(60)]
    assert len(fewer_kinds(spread)) == 1
    assert fewer_kinds(spread)[0] == TrainingSteps(0.3, 1.0, 1800)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.floats(0.3, 1000), st.floats(1e-9, 1)), min_size=1, max_size=40), st.integers(1, 5))
def test_rounding_never_takes_anything_away(pairs, most):
    """Every kind of step that was done is covered by one with at most its noise and at least its rate."""
    before = merge(TrainingSteps(sigma, q, 2) for sigma, q in pairs)
    after = fewer_kinds(before, most)
    assert len(after) <= most
    assert sum(event.steps for event in after) == sum(event.steps for event in before)
    for event in before:
        covers = (
            a.noise_multiplier <= event.noise_multiplier and a.sampling_rate >= event.sampling_rate for a in after
        )
        assert any(covers)


def test_a_ledger_of_thousands_of_kinds_does_not_hang():
    events = [TrainingSteps(1 + i / 1000, 0.01, 1) for i in range(3000)]
    found = cost_of(events, DELTA)
    assert found.rounded
    assert found.enforced >= epsilon_pld([TrainingSteps(2.5, 0.01, 3000)], DELTA)


# ---- a ledger


@pytest.fixture(scope="module")
def consortium(tmp_path_factory) -> Consortium:
    made = Consortium(tmp_path_factory.mktemp("costs") / "run")
    made.join(study(), total_ceiling=9.0)
    hospital = made.hospitals[NAME]
    for round in (1, 2):
        hospital.train(study(), round)
    made.join(study("second", epsilon=2.0), total_ceiling=7.0)
    hospital.train(study("second", epsilon=2.0), 1)
    return made


def history_of(consortium: Consortium, name: str = NAME) -> History:
    return verify(consortium.hospitals[name].path.read_bytes(), name)


def test_every_study_and_all_of_them(consortium):
    history = history_of(consortium)
    first, second = costs(history)
    assert [c.study for c in (first, second)] == [study().hash, study("second", epsilon=2.0).hash]
    assert (first.ceiling, second.ceiling, first.steps, second.steps) == (4.0, 2.0, 50, 25)
    assert first.epsilon == cost_of(history.spent(study().hash), 1e-4).enforced
    together = all_costs([history])
    assert (together.study, together.ceiling, together.kinds) == ("", 7.0, 2)
    assert max(first.epsilon, second.epsilon) < together.epsilon < first.epsilon + second.epsilon
    assert set(together.as_dict()) == set(together.__dataclass_fields__)


def test_several_ledgers_of_the_same_patients_are_added_up(consortium):
    one, other = history_of(consortium), history_of(consortium, "clinic-b")
    assert all_costs([one, other]).epsilon == all_costs([one]).epsilon, "the other one spent nothing"
    assert all_costs([one, one]).epsilon > all_costs([one]).epsilon


def test_reservations_that_were_never_settled_voided_or_cut_short(consortium, tmp_path):
    made = Consortium(tmp_path / "run")
    made.join(study())
    hospital = made.hospitals[NAME]
    event = TrainingSteps(2.0, 0.05, 25)
    with hospital.ledger() as ledger:
        ledger.void(ledger.reserve(study().hash, 1, [event]), "no data")
        empty = costs(ledger.history)[0]
        seq = ledger.reserve(study().hash, 1, [event])
        unsettled = costs(ledger.history)[0]
        ledger.charge(seq, 0, noise_source="os-aes256ctr", checks=dict.fromkeys(("noise", "clipping", "rows", "sampling"), "not-run"), code="c" * 64)  # fmt: skip # noqa: E501
        short = costs(ledger.history)[0]
    assert (empty.epsilon, empty.steps) == (short.epsilon, short.steps) == (0.0, 0)
    assert unsettled.epsilon == cost_of([event], 1e-4).enforced > 0


def test_a_ledger_without_a_study_has_no_costs(tmp_path):
    begun = {
        "v": 2, "time": "2026-01-01T00:00:00Z", "hospital": NAME, "study": None, "kind": "begin",
        "ledger": "1" * 64, "signing_key": KEYS[NAME].public_key().public_bytes_raw().hex(), "book": "2" * 64,
    }  # fmt: skip
    history = verify(chained([begun], KEYS[NAME]), "ledger")
    assert costs(history) == []
    with pytest.raises(PrivacyError):
        all_costs([history])


def test_the_latest_terms_are_those_that_count(consortium, tmp_path):
    made = Consortium(tmp_path / "run")
    made.join(study())
    with made.hospitals[NAME].ledger() as ledger:
        ledger.open_study(study().hash, terms(study(), NAME, total_ceiling=3.5))
        assert all_costs([ledger.history]).ceiling == 3.5


@pytest.mark.slow
def test_a_hospital_after_500_rounds_takes_two_seconds_of_work():
    """In a fresh process, after the imports: nothing is known yet."""
    code = """
import time
import torch, opacus.accountants, dp_accounting.pld.privacy_loss_distribution
from fedmedgan.audit.recompute import cost_of
from fedmedgan.shared.privacy.events import TrainingSteps
torch.set_num_threads(1)
began = time.process_time()
cost_of([TrainingSteps(1.53, 0.02, 500 * 20)], 1e-5)
print(time.process_time() - began)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2.0
