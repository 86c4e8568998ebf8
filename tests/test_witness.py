"""The witness against planted faults, through the real trainer: each is caught, and by the right check."""

from __future__ import annotations

import math
import pickle
import secrets
from itertools import product

import numpy as np
import pytest
import torch
from conftest import tiny_study
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import binom
from test_local_round import patients
from torch import nn
from torch.nn import functional

from fedmedgan.client.gans import cdcgan, recipe
from fedmedgan.client.gans.recipe import Records
from fedmedgan.client.training import book_keeping, noise_check, sampling_check
from fedmedgan.client.training.local_round import Batch, LocalTrainer, PatientSampler
from fedmedgan.client.training.noise_check import NoiseCheck
from fedmedgan.client.training.private_step import PrivateStep, _NoisyOptimizer
from fedmedgan.client.training.randomness import InsecureRandom, SystemRandom
from fedmedgan.client.training.row_gradients import RowGradients, WrittenOut
from fedmedgan.client.training.sampling_check import SamplingCheck, binomial_p, dispersion_p
from fedmedgan.client.training.witness import NoWitness, Witness
from fedmedgan.shared.privacy.records import failed_checks

PASSED = {"noise": "passed", "clipping": "passed", "rows": "passed", "sampling": "passed"}
PATIENTS, PER_STEP, STEPS = 48, 12, 9


def trainer(sampler=None, networks=None, *, random=None, width=4, **options) -> LocalTrainer:
    study = tiny_study(
        training={"patients_per_step": PER_STEP, "discriminator_steps": 5},
        gan={"discriminator_width": width},
    )
    networks = networks or recipe.load(study).networks()
    sampler = sampler or PatientSampler(patients([1] * PATIENTS), PER_STEP / PATIENTS, SystemRandom())
    options = {"noise_multiplier": 1.1, "device": torch.device("cpu")} | options
    return LocalTrainer(study, *networks, sampler, random=random or SystemRandom(), **options)


def after(one: LocalTrainer, steps: int = STEPS) -> dict[str, str]:
    one.train(steps)
    return one.checks


# honest runs


def test_an_honest_round_passes_and_a_second_one_with_the_same_witness():
    one = trainer()
    assert after(one) == PASSED
    again = trainer(witness=one.d.witness)
    assert again.d.witness is one.d.witness
    assert after(again) == PASSED


def test_honest_rounds_raise_no_false_alarm():
    sampler = PatientSampler(patients([1, 5, 2, 1] * 12), PER_STEP / PATIENTS, SystemRandom())
    one = trainer(sampler)
    for _ in range(60):
        one.d.witness = one.d.step.optimizer.witness = Witness(
            noise_multiplier=1.1,
            clip_norm=1.0,
            sampling_rate=PER_STEP / PATIENTS,
            fakes=PER_STEP,
            patients=PATIENTS,
            declared=PATIENTS,
        )
        assert not failed_checks(after(one, 2))


def honest_noise(chance: np.random.Generator, sizes: np.ndarray, steps: int, scale: float = 1.0) -> str:
    check = NoiseCheck()
    for _ in range(steps):
        check.see(scale * chance.standard_normal(sizes.sum()), sizes)
    return check.verdict()


def test_false_alarms_are_as_rare_as_stated(monkeypatch):
    """At the real threshold none in 400 runs; at a threshold of 30 % about as many as that allows."""
    chance, sizes = np.random.default_rng(1), np.array([64, 4, 700, 8, 8, 8, 1000, 2])

    def runs(n: int) -> list[str]:
        draws = [SamplingCheck(patients=40, declared=40, rate=0.2) for _ in range(n)]
        for check in draws:
            for _ in range(12):
                check.see(np.flatnonzero(chance.random(40) < 0.2))
        return [honest_noise(chance, sizes, 5) for _ in range(n)] + [check.verdict() for check in draws]

    assert runs(200) == ["passed"] * 400
    monkeypatch.setattr(noise_check, "ALPHA", 0.3)
    monkeypatch.setattr(sampling_check, "ALPHA", 0.3)
    found = runs(200)
    assert 0.1 < np.mean(np.array(found[:200]) == "failed") < 0.4, "exact p-values, corrected"
    assert np.mean(np.array(found[200:]) == "failed") < 0.35, "bounds of p-values"


def test_ten_percent_less_noise_is_caught_in_one_step_of_ten_thousand_values():
    """R17: at least 99.9 % caught, at most 0.1 % false alarms."""
    chance, sizes = np.random.default_rng(2), np.array([128, 8, 2000, 16, 7848])
    assert [honest_noise(chance, sizes, 1, scale=0.9) for _ in range(1000)].count("failed") >= 999
    assert [honest_noise(chance, sizes, 1) for _ in range(1000)].count("failed") <= 1


def test_the_witness_changes_nothing_that_is_trained():
    weights = []
    for witness in (None, NoWitness()):
        sampler = PatientSampler(patients([1] * PATIENTS), PER_STEP / PATIENTS, InsecureRandom(1))
        one = trainer(sampler, random=InsecureRandom(2), witness=witness)
        one.train(3)
        weights.append(torch.cat([p.flatten() for n in (one.generator, one.discriminator) for p in n.parameters()]))
    assert torch.equal(*weights)


def test_a_single_layer_in_its_first_step_has_nothing_to_be_compared_with():
    assert honest_noise(np.random.default_rng(4), np.array([5000]), 1) == "passed"


# verdicts other than passed and failed


def test_without_privacy_or_without_a_witness_nothing_was_checked():
    for options in ({"noise_multiplier": None}, {"witness": NoWitness()}):
        assert set(after(trainer(**options), 1).values()) == {"not-run"}
    assert set(trainer().checks.values()) == {"not-run"}


def test_two_steps_are_too_few_to_tell():
    assert after(trainer(), 2) == PASSED | {"noise": "too-few", "sampling": "too-few"}


def test_a_batch_without_patients_is_fine():
    sampler = PatientSampler(patients([1] * PATIENTS), 1e-9, SystemRandom())
    assert after(trainer(sampler), 4) == PASSED | {"sampling": "too-few"}


def test_a_witness_is_never_stored():
    with pytest.raises(TypeError, match="never stored"):
        pickle.dumps(trainer().d.witness)


# faults of the noise


class Repeating(InsecureRandom):
    """The noise of every `period`-th step is the same: a seed that is set again."""

    def __init__(self, period: int) -> None:
        super().__init__(0)
        self.period = period

    def _key(self) -> bytes:
        call = self._draw
        self._draw = call % self.period
        key = super()._key()
        self._draw = call + 1
        return key


class SeededForEachLayer(SystemRandom):
    """Another seed in every step, and set again for each layer."""

    def normal(self, shape, std, device="cpu"):
        seed = secrets.randbits(32)
        sizes = [p.numel() for p in trainer().discriminator.parameters()]
        generators = [torch.Generator().manual_seed(seed) for _ in sizes]
        layers = [torch.randn(n, generator=g, dtype=torch.float64) for n, g in zip(sizes, generators, strict=True)]
        return std * torch.cat(layers)


class Shaped(SystemRandom):
    """Real noise, made into other noise of the same standard deviation unless told."""

    def __init__(self, shape) -> None:
        self.shape = shape

    def normal(self, shape, std, device="cpu"):
        return std * self.shape(super().normal((math.prod(shape),), 1.0)).reshape(tuple(shape))


def neighbours(z):
    return (z + z.roll(1)) / math.sqrt(2)


class WithMemory(SystemRandom):
    """A quarter of each step's noise is that of the step before."""

    def __init__(self) -> None:
        self.before = {}

    def normal(self, shape, std, device="cpu"):
        old = self.before.get(shape, torch.zeros(shape, dtype=torch.float64))
        self.before[shape] = 0.25 * old + math.sqrt(1 - 0.25**2) * super().normal(shape, std)
        return self.before[shape]


@pytest.mark.parametrize(
    ("random", "steps"),
    [
        (Shaped(lambda z: 0.9 * z), 9),
        (Shaped(lambda z: 1.1 * z), 9),
        (Shaped(lambda z: 0 * z), 1),
        (Shaped(lambda z: z * float("nan")), 1),
        (Shaped(lambda z: z.sign()), 1),
        (Shaped(lambda z: math.sqrt(3) * torch.erf(z / math.sqrt(2))), 9),
        (Shaped(lambda z: z + 0.2), 9),
        (Shaped(neighbours), 1),
        (WithMemory(), 9),
        (Repeating(1), 2),
        (Repeating(3), 4),
        (SeededForEachLayer(), 1),
    ],
    ids=["0.9", "1.1", "none", "nan", "signs", "uniform", "biased", "neighbours", "memory", "same", "third", "layers"],
)
def test_other_noise_fails(random, steps):
    one = trainer()
    one.d.step.optimizer.random = random
    for _ in range(steps):  # not by `train`, which refuses weights that are NaN
        one._discriminator_step()
    assert one.checks["noise"] == "failed"
    assert one.checks["clipping"] == "passed"


@pytest.mark.parametrize(("layer", "steps"), [(layer, 1) for layer in (0, 2, 4, 5, 6)] + [(1, 2), (7, 4)])
def test_noise_that_is_missing_in_one_layer_fails(layer, steps, monkeypatch):
    """Layer 7 has two values, layer 1 four: they are told from rounding over some steps."""
    add_noise = _NoisyOptimizer.add_noise

    def forgetful(self):
        add_noise(self)
        self.params[layer].grad = self.params[layer].summed_grad.clone().view_as(self.params[layer])

    monkeypatch.setattr(_NoisyOptimizer, "add_noise", forgetful)
    assert after(trainer(), steps)["noise"] == "failed"


def test_ten_percent_less_noise_fails_in_one_real_step():
    one = trainer(width=16)
    one.d.step.optimizer.noise_std *= 0.9
    assert after(one, 1) == PASSED | {"noise": "failed", "sampling": "too-few"}


def test_a_seed_that_every_round_sets_again_fails_if_the_witness_goes_on():
    first = trainer(random=InsecureRandom(5))
    assert not failed_checks(after(first, 2))
    again = trainer(random=InsecureRandom(5), witness=first.d.witness)
    assert after(again, 2)["noise"] == "failed"


# faults of the clipping


original = RowGradients.clipped


def unclipped(self, factors_N):
    return original(self, torch.ones_like(factors_N))


def mean_of_clipped(self, factors_N):
    return [g / max(1, self.records) for g in original(self, factors_N)]


def one_layer_unclipped(self, factors_N):
    return [*original(self, factors_N)[:-1], original(self, torch.ones_like(factors_N))[-1]]


@pytest.mark.parametrize("fault", [unclipped, mean_of_clipped, one_layer_unclipped])
def test_a_wrong_clip_fails(fault, monkeypatch):
    monkeypatch.setattr(RowGradients, "clipped", fault)
    assert after(trainer(), 2)["clipping"] == "failed"


def test_norms_that_are_too_small_fail(monkeypatch):
    """The sum is then right for the norms that were given, and more than C."""
    norms_PN = RowGradients.norms_PN
    monkeypatch.setattr(RowGradients, "norms_PN", lambda self: norms_PN(self) * 0.99)
    assert after(trainer(), 1)["clipping"] == "failed"


@pytest.mark.parametrize("factor", [2.0, 1.001, 0.5])
def test_another_clip_norm_than_declared_fails_though_no_row_may_reach_it(factor):
    one = trainer()
    one.d.step.optimizer.max_grad_norm *= factor
    assert after(one, 1)["clipping"] == "failed"


def test_a_step_of_no_rows_is_a_sum_of_zeros():
    witness = Witness(noise_multiplier=1.0, clip_norm=1.0, sampling_rate=0.5, fakes=0, patients=4, declared=4)
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 1))
    sgd = torch.optim.SGD(network.parameters(), lr=0.1)
    options = {"noise_multiplier": 1.0, "clip_norm": 1.0, "divisor": 2, "random": SystemRandom(), "witness": witness}
    step = PrivateStep(network, sgd, **options)
    witness.saw_draw(torch.empty(0, dtype=torch.int64))
    step.step(lambda net, images: net(images).squeeze(1), [torch.empty(0, 1, 28, 28)])
    assert witness.verdicts()["clipping"] == "passed"


def test_a_step_that_goes_round_the_witness_fails_everything(monkeypatch):
    every = dict.fromkeys(PASSED, "failed")
    one = trainer()
    one.d.step.optimizer.step_hook = None
    assert after(one, 2) == every
    monkeypatch.setattr(Witness, "saw_rows", NoWitness.saw_rows)
    assert after(trainer(), 2) == every


def hostile(one: LocalTrainer, pixel: float, every: int = 5) -> LocalTrainer:
    one.sampler.images = one.sampler.images.float()  # float16 ends at 65504
    one.sampler.images[::every] = pixel
    return one


@pytest.mark.parametrize("pixel", [1e4, 1e17, 1e19, 1e30, float("inf"), float("nan")])
def test_hostile_images_are_clipped_or_counted_as_zero(pixel):
    assert after(hostile(trainer(), pixel)) == PASSED


def test_hostile_images_that_are_not_counted_as_zero_fail(monkeypatch):
    monkeypatch.setattr(RowGradients, "forget", lambda self, records_N: None)
    one = hostile(trainer(), float("nan"), every=1)
    one.probe()
    one._discriminator_step()
    assert {"clipping", "noise"} <= set(failed_checks(one.checks))


# faults of the rows


class Mixing(cdcgan.Discriminator):
    """Rows are normalised together in a place where no layer's type tells of it."""

    def forward(self, images, labels):
        mixed = functional.batch_norm(images, None, None, training=True)
        return super().forward(mixed, labels)


class MixingInside(cdcgan.Discriminator):
    def forward(self, images, labels):
        features = functional.batch_norm(self.features(images), None, None, training=True)
        return self.heads(features).flatten(1).gather(1, labels[:, None]).squeeze(1)


class MixingALittle(cdcgan.Discriminator):
    """Minibatch statistics as a small term (Karras et al. 2018)."""

    def forward(self, images, labels):
        return super().forward(images, labels) + 0.1 * images.std(0).mean()


class Reflecting(cdcgan.Discriminator):
    """Opacus differentiates this wrongly, without a word, and book-keeping leaves it to Opacus."""

    def __init__(self, images, gan):
        super().__init__(images, gan)
        self.features[0].padding_mode = "reflect"
        self.features[0]._reversed_padding_repeated_twice = [1, 1, 1, 1]


@pytest.mark.parametrize("kind", [Mixing, MixingInside, MixingALittle, Reflecting])
def test_a_network_that_mixes_rows_or_hides_its_gradient_fails(kind, monkeypatch):
    monkeypatch.setattr("fedmedgan.client.training.private_step.refuse_unsafe", lambda network: None)
    study = tiny_study()
    networks = recipe.load(study).networks()[0], kind(study.images, study.gan)
    checks = after(trainer(networks=networks))
    assert failed_checks(checks) == ["rows"]


def no_bias(layer, x):
    return torch.zeros(x.shape[:2])


def moved_patches(original):
    return lambda layer, image, grid: (original(layer, image.roll(1, -1), grid)[0], original(layer, image, grid)[1])


def of_the_next_record(original):
    return lambda layer, use: (original(layer, use)[0].roll(1, 0), *original(layer, use)[1:])


@pytest.mark.parametrize(
    ("where", "fault"),
    [
        ("_over_positions", lambda original: no_bias),
        ("_normalised", lambda original: lambda layer, x: x),
        ("_patches", moved_patches),
        ("_SIDES", lambda original: original | {nn.Conv2d: of_the_next_record(original[nn.Conv2d])}),
    ],
    ids=["no bias", "not normalised", "moved patches", "next record"],
)
def test_book_keeping_that_is_wrong_fails(where, fault, monkeypatch):
    """The sum is clipped and noised all right, but it is not the sum of the records' gradients."""
    monkeypatch.setattr(book_keeping, where, fault(getattr(book_keeping, where)))
    one = trainer()
    assert one.d.step.method == "book-keeping"
    assert failed_checks(after(one)) == ["rows"]


def test_book_keeping_with_a_wrong_norm_fails(monkeypatch):
    for kind in (WrittenOut, book_keeping.Outer):
        norm_N = kind.norm_N
        monkeypatch.setattr(kind, "norm_N", lambda self, norm_N=norm_N: 0.9 * norm_N(self))
        assert after(trainer(), 1)["clipping"] == "failed"
        monkeypatch.undo()


class OneMore(PatientSampler):
    """A patient comes along who was not drawn."""

    def draw(self) -> Batch:
        records, who = super().draw()
        return Batch(Records(*(torch.cat([part, part[:1]]) for part in records)), who)


def test_a_row_that_nobody_drew_fails():
    sampler = OneMore(patients([1] * PATIENTS), PER_STEP / PATIENTS, SystemRandom())
    assert failed_checks(after(trainer(sampler))) == ["rows"]


# faults of the sampling


class Chosen(PatientSampler):
    """Draws what `choose` says instead of Poisson batches."""

    def __init__(self, choose, n: int = PATIENTS, per_step: int = PER_STEP) -> None:
        super().__init__(patients([1] * n), per_step / n, SystemRandom())
        self.choose, self.step = choose, 0

    def draw(self) -> Batch:
        who = torch.as_tensor(self.choose(self.step, len(self.count)))
        self.step += 1
        images = self.images[who].float()
        return Batch(Records(images, self.labels[who], images), who)


CHANCE = np.random.default_rng(3)
ORDER = CHANCE.permutation(PATIENTS)


def always_the_same(step: int, n: int) -> np.ndarray:
    return np.arange(PER_STEP)


def shuffled_epochs(step: int, n: int) -> np.ndarray:
    at = step * PER_STEP % PATIENTS
    if at == 0:
        CHANCE.shuffle(ORDER)
    return ORDER[at : at + PER_STEP].copy()


def of_one_size(step: int, n: int) -> np.ndarray:
    return CHANCE.choice(n, PER_STEP, replace=False)


def favourites(step: int, n: int) -> np.ndarray:
    """Sizes are right, the first half of the patients is drawn, the others never."""
    return CHANCE.choice(n // 2, CHANCE.binomial(n, PER_STEP / PATIENTS), replace=False)


def too_many(step: int, n: int) -> np.ndarray:
    return np.flatnonzero(CHANCE.random(n) < 2 * PER_STEP / PATIENTS)


def twice(step: int, n: int) -> np.ndarray:
    return np.append(np.flatnonzero(CHANCE.random(n) < PER_STEP / PATIENTS), [3, 3])


@pytest.mark.parametrize(
    ("choose", "steps"),
    [(always_the_same, 9), (shuffled_epochs, 12), (of_one_size, 9), (favourites, 16), (too_many, 9), (twice, 1)],
)
def test_other_sampling_fails(choose, steps):
    assert failed_checks(after(trainer(Chosen(choose)), steps)) == ["sampling"]


def test_batches_of_one_size_are_always_caught_after_a_hundred_steps():
    """R18, for small and large hospitals and batches."""
    for n, expected in ((10, 1), (24, 6), (400, 32), (100_000, 256)):
        for choose in (lambda n, k: np.arange(k), lambda n, k: CHANCE.choice(n, k, replace=False)):
            check = SamplingCheck(patients=n, declared=n, rate=expected / n)
            for _ in range(100):
                check.see(choose(n, expected))
            assert check.verdict() == "failed"


def test_a_slightly_higher_rate_fails_by_the_number_of_all_draws():
    """Two percent more than declared: neither batch sizes nor patients vary enough to tell by themselves."""
    drawn = CHANCE.random((1600, 1600)) < 0.102
    check = SamplingCheck(patients=1600, declared=1600, rate=0.1)
    for row in drawn:
        check.see(np.flatnonzero(row))
    assert check.verdict() == "failed"
    assert min(dispersion_p(drawn.sum(axis), 1600, 0.1) for axis in (0, 1)) > sampling_check.ALPHA


def test_a_patient_who_is_left_out_of_a_step_of_everybody_fails():
    check = SamplingCheck(patients=10, declared=10, rate=1.0)
    check.see(np.arange(10))
    assert check.verdict() == "passed"
    check.see(np.arange(9))
    assert check.verdict() == "failed"


def test_a_patient_that_does_not_exist_fails():
    check = SamplingCheck(patients=10, declared=10, rate=0.5)
    check.see(np.array([2, 10]))
    assert check.verdict() == "failed"


@settings(max_examples=30, deadline=None)
@given(coins=st.integers(1, 4), counts=st.integers(1, 4), q=st.floats(0.05, 0.95), data=st.data())
def test_the_bound_is_never_below_the_exact_p_value(coins, counts, q, data):
    """Oracle: all outcomes are listed."""
    chance = [binom(coins, k) * q**k * (1 - q) ** (coins - k) for k in range(coins + 1)]

    def spread(outcome) -> float:
        return sum((k - coins * q) ** 2 for k in outcome)

    outcomes = list(product(range(coins + 1), repeat=counts))
    seen = data.draw(st.sampled_from(outcomes))
    mass = {o: math.prod(chance[k] for k in o) for o in outcomes}
    more = sum(m for o, m in mass.items() if spread(o) >= spread(seen) - 1e-9)
    less = sum(m for o, m in mass.items() if spread(o) <= spread(seen) + 1e-9)
    assert dispersion_p(np.array(seen), coins, q) >= min(1.0, 2 * min(more, less)) * (1 - 1e-6)
    heads = [chance_of(k, coins, q) for k in range(coins + 1)]
    exact = 2 * min(sum(heads[: seen[0] + 1]), sum(heads[seen[0] :]))
    assert binomial_p(seen[0], coins, q) == pytest.approx(min(1.0, exact))


def chance_of(k: int, n: int, q: float) -> float:
    return float(binom(n, k)) * q**k * (1 - q) ** (n - k)
