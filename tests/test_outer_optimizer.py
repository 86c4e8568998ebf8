"""The outer optimiser: the papers' formulas by plain loops, saved and loaded, the same bits everywhere."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load as safetensors_load
from safetensors.numpy import save as safetensors_save

from fedmedgan.client.outer_optimizer import MOMENTUM, SECOND_MOMENT, OuterOptimizer
from fedmedgan.shared.errors import ModelError
from fedmedgan.shared.study import Aggregation

KINDS = ("fedavg", "fedavgm", "fedadam")
STATES = {"fedavg": set(), "fedavgm": {MOMENTUM}, "fedadam": {MOMENTUM, SECOND_MOMENT}}


def means(rounds: int, size: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.uniform(-0.05, 0.05, size).astype(np.float32) for _ in range(rounds)]


def oracle(a: Aggregation, rounds: list[np.ndarray]) -> list[list[float]]:
    """What each round adds to the model, value by value in float64, as the papers write it."""
    size = len(rounds[0])
    m, v = [0.0] * size, [a.adaptivity**2] * size
    changes = []
    for mean in rounds:
        change = []
        for i in range(size):
            delta = float(mean[i])
            if a.optimizer == "fedavg":
                change.append(a.learning_rate * delta)
            elif a.optimizer == "fedavgm":
                m[i] = a.momentum * m[i] + delta
                change.append(a.learning_rate * m[i])
            else:
                m[i] = a.momentum * m[i] + (1 - a.momentum) * delta
                v[i] = a.beta2 * v[i] + (1 - a.beta2) * delta * delta
                change.append(a.learning_rate * m[i] / (math.sqrt(v[i]) + a.adaptivity))
        changes.append(change)
    return changes


settings_of = st.builds(
    Aggregation,
    optimizer=st.sampled_from(KINDS),
    learning_rate=st.floats(0.001, 10),
    momentum=st.floats(0, 0.99),
    beta2=st.floats(0, 0.999),
    adaptivity=st.floats(1e-4, 1),
)


@given(settings_of, st.integers(1, 6), st.integers(1, 9), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_each_step_is_that_of_the_paper(aggregation, rounds, size, seed):
    given_means = means(rounds, size, seed)
    optimizer = OuterOptimizer(aggregation, size)
    for mean, expected in zip(given_means, oracle(aggregation, given_means), strict=True):
        change = optimizer.step(mean)
        assert change.dtype == np.float32
        scale = max(abs(x) for x in expected)
        np.testing.assert_allclose(change, expected, rtol=2e-5, atol=1e-5 * scale)


def test_plain_averaging_gives_the_mean_itself():
    optimizer = OuterOptimizer(Aggregation(), 1000)
    (mean,) = means(1, 1000)
    mean[:2] = -0.0, np.float32(1e-42)  # a signed zero and a denormal are kept, too
    change = optimizer.step(mean)
    assert change.tobytes() == mean.tobytes()
    assert change is not mean
    assert optimizer.state() == {}


def test_the_first_adam_step_starts_from_the_square_of_tau_and_corrects_no_bias():
    a = Aggregation(optimizer="fedadam", learning_rate=0.5, momentum=0.9, beta2=0.99, adaptivity=0.01)
    change = OuterOptimizer(a, 1).step(np.array([0.02], np.float32))
    v = 0.99 * 0.01**2 + 0.01 * 0.02**2
    assert change[0] == pytest.approx(0.5 * 0.1 * 0.02 / (v**0.5 + 0.01), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_restart_between_rounds_changes_no_bit(kind):
    aggregation, rounds = Aggregation(optimizer=kind), means(6, 50)
    whole, first = OuterOptimizer(aggregation, 50), OuterOptimizer(aggregation, 50)
    expected = [whole.step(mean).tobytes() for mean in rounds]
    found = [first.step(mean).tobytes() for mean in rounds[:3]]
    assert set(first.state()) == STATES[kind]
    second = OuterOptimizer(aggregation, 50)
    second.load(safetensors_load(safetensors_save(first.state())))
    found += [second.step(mean).tobytes() for mean in rounds[3:]]
    assert found == expected


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_agree_bit_for_bit(kind):
    program = (
        "import hashlib, numpy as np\n"
        "from fedmedgan.client.outer_optimizer import OuterOptimizer\n"
        "from fedmedgan.shared.study import Aggregation\n"
        f"o = OuterOptimizer(Aggregation(optimizer={kind!r}, learning_rate=0.3), 4099)\n"
        "rng, digest = np.random.default_rng(5), hashlib.sha256()\n"
        "for _ in range(5): digest.update(o.step(rng.uniform(-.05, .05, 4099).astype(np.float32)).tobytes())\n"
        "print(digest.hexdigest())"
    )
    command = [sys.executable, "-c", program]
    # Other instruction sets of the same machine must round alike.
    plain = {"NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 AVX512F AVX512_SKX"}
    runs = [subprocess.run(command, capture_output=True, text=True, check=True, env=env) for env in ({}, plain)]
    assert len({run.stdout for run in runs}) == 1
    assert len(runs[0].stdout.strip()) == len(hashlib.sha256().hexdigest())


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_handed_out_or_in_is_not_shared(kind):
    optimizer = OuterOptimizer(Aggregation(optimizer=kind), 3)
    mean = np.full(3, 0.01, np.float32)
    change = optimizer.step(mean)
    kept = {name: array.copy() for name, array in optimizer.state().items()}
    change += 1
    for array in optimizer.state().values():
        array += 1
    assert mean.tolist() == np.full(3, 0.01, np.float32).tolist()
    assert all(np.array_equal(kept[name], array) for name, array in optimizer.state().items())


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("MODEL_MISMATCH", lambda s: s.pop(MOMENTUM)),
        ("MODEL_MISMATCH", lambda s: s.update(more=np.zeros(4, np.float32))),
        ("MODEL_MISMATCH", lambda s: s.update({MOMENTUM: np.zeros(5, np.float32)})),
        ("MODEL_MISMATCH", lambda s: s.update({MOMENTUM: np.zeros((4, 1), np.float32)})),
        ("MODEL_MISMATCH", lambda s: s.update({MOMENTUM: np.zeros(4)})),
        ("MODEL_MISMATCH", lambda s: s.update({SECOND_MOMENT: np.full(4, -1, np.float32)})),
        ("MODEL_NOT_FINITE", lambda s: s.update({MOMENTUM: np.full(4, np.nan, np.float32)})),
        ("MODEL_NOT_FINITE", lambda s: s.update({SECOND_MOMENT: np.full(4, np.inf, np.float32)})),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(code, change):
    optimizer = OuterOptimizer(Aggregation(optimizer="fedadam"), 4)
    optimizer.step(np.full(4, 0.01, np.float32))
    before, broken = optimizer.state(), optimizer.state()
    change(broken)
    with pytest.raises(ModelError) as caught:
        optimizer.load(broken)
    assert caught.value.code == code
    assert all(np.array_equal(before[name], array) for name, array in optimizer.state().items())


def test_a_state_is_of_one_kind():
    momentum = OuterOptimizer(Aggregation(optimizer="fedavgm"), 4).state()
    with pytest.raises(ModelError, match="MODEL_MISMATCH"):
        OuterOptimizer(Aggregation(), 4).load(momentum)
    OuterOptimizer(Aggregation(), 4).load({})


@pytest.mark.parametrize(
    ("code", "mean"),
    [
        ("MODEL_MISMATCH", np.zeros(5, np.float32)),
        ("MODEL_MISMATCH", np.zeros((4, 1), np.float32)),
        ("MODEL_MISMATCH", np.zeros(4)),
        ("MODEL_NOT_FINITE", np.array([0, np.nan, 0, 0], np.float32)),
        ("MODEL_NOT_FINITE", np.full(4, 3e38, np.float32)),
    ],
)
def test_a_mean_that_cannot_be_used_changes_nothing(code, mean):
    optimizer = OuterOptimizer(Aggregation(optimizer="fedadam"), 4)
    before = optimizer.state()
    with pytest.raises(ModelError) as caught:
        optimizer.step(mean)
    assert caught.value.code == code
    assert all(np.array_equal(before[name], array) for name, array in optimizer.state().items())
