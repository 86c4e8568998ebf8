"""What hospitals hold alike: outer optimiser and average advance with the weights, and travel in one file."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import tiny_study

from fedmedgan.client import checkpoint
from fedmedgan.client.gans import recipe as recipes
from fedmedgan.client.shared_model import AVERAGE, GENERATOR, OUTER, SharedModel, part
from fedmedgan.shared.errors import ModelError

KINDS = {
    "plain": {},
    "momentum and average": {"aggregation": {"optimizer": "fedavgm"}, "gan": {"ema": 0.9}},
    "adam, generator alone": {"aggregation": {"optimizer": "fedadam", "share": "generator"}},
}


def model_of(**sections) -> tuple[SharedModel, tuple[torch.nn.Module, torch.nn.Module]]:
    study = tiny_study(**sections)
    networks = recipes.load(study).networks()
    return SharedModel.initial(study, networks), networks


def means(size: int, rounds: int) -> list[np.ndarray]:
    random = np.random.default_rng(1)
    return [random.normal(0, 0.01, size).astype(np.float32) for _ in range(rounds)]


@pytest.mark.parametrize("sections", KINDS.values(), ids=KINDS.keys())
def test_a_file_goes_on_exactly_where_it_was_written(sections, tmp_path):
    model, _ = model_of(**sections)
    one = two = model
    for number, mean in enumerate(means(model.size, 4), 1):
        one = one.advanced(mean, number)
        checkpoint.write(tmp_path / "m", two.advanced(mean, number).arrays())
        two = SharedModel.of_file(model.study, checkpoint.read(tmp_path / "m")[0])
    assert one.hash == two.hash
    assert checkpoint.content_hash(one.arrays()) == checkpoint.content_hash(two.arrays())


def test_plain_averaging_adds_the_mean():
    model, _ = model_of()
    (mean,) = means(model.size, 1)
    after = checkpoint.flatten(model.advanced(mean, 1).weights)
    assert np.array_equal(after, checkpoint.flatten(model.weights) + mean)


def test_the_average_is_a_running_mean_that_forgets_the_beginning():
    model, _ = model_of(gan={"ema": 0.99})
    name = next(iter(part(model.weights, GENERATOR)))
    seen, slow, current = [], None, model
    for number, mean in enumerate(means(model.size, 6), 1):
        current = current.advanced(mean, number)
        seen.append(current.weights[name])
        keep = min(0.99, (number - 1) / (number + 9))
        slow = seen[-1] if slow is None else (1 - keep) * seen[-1] + keep * slow
    np.testing.assert_allclose(current.average[AVERAGE + name], slow, rtol=1e-5)
    assert np.array_equal(current.released_generator()[name], current.average[AVERAGE + name])
    assert current.hash == checkpoint.content_hash(current.arrays()), "hospitals compare what is released, too"


def test_without_an_average_the_last_generator_is_released():
    model, _ = model_of()
    released = model.advanced(*means(model.size, 1), 1).released_generator()
    assert set(released) == set(part(model.weights, GENERATOR))


def test_a_discriminator_that_is_not_shared_stays_as_it_is():
    model, networks = model_of(aggregation={"share": "generator"})
    assert not part(model.weights, "discriminator.")
    with torch.no_grad():
        for weight in networks[1].parameters():
            weight.fill_(0.5)
    model.advanced(*means(model.size, 1), 1).load_into(networks)
    assert all((w == 0.5).all() for w in networks[1].parameters())
    assert not all((w == 0.5).all() for w in networks[0].parameters())


@pytest.mark.parametrize("sections", KINDS.values(), ids=KINDS.keys())
def test_other_arrays_are_refused(sections):
    model, _ = model_of(**sections)
    arrays = model.advanced(*means(model.size, 1), 1).arrays()
    bad = [{**arrays, "extra": np.zeros(1, np.float32)}, {n: a * np.nan for n, a in arrays.items()}]
    bad += [{n: a for n, a in arrays.items() if not n.startswith(prefix)} for prefix in (AVERAGE, OUTER)]
    for wrong in bad:
        if set(wrong) == set(arrays) and all(np.isfinite(a).all() for a in wrong.values()):
            continue  # this study has no such part
        with pytest.raises(ModelError) as caught:
            SharedModel.of_file(model.study, wrong)
        assert caught.value.code in ("MODEL_MISMATCH", "MODEL_NOT_FINITE")
