"""The empirical audit: faults that were planted are found, honest code and honest generators are not accused."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny_study
from torch.nn import functional

from fedmedgan.audit.bounds import CONFIDENCE, Finding, one_run_epsilon
from fedmedgan.audit.generator_attacks import gate, generator_attacks
from fedmedgan.audit.many_run import many_run_audit, toy_study
from fedmedgan.audit.mirror import Canaries, Seen, clipped_rows, watch
from fedmedgan.audit.one_run import log_ratio_drawn, one_run_audit, plan, without_fakes
from fedmedgan.client.gans import recipe
from fedmedgan.client.training.local_round import LocalTrainer
from fedmedgan.client.training.randomness import InsecureRandom
from fedmedgan.shared.errors import DataError
from fedmedgan.shared.privacy.accounting import calibrate_noise, epsilon_pld
from fedmedgan.shared.privacy.events import TrainingSteps
from fedmedgan.shared.study import from_dict


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors: more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def with_noise_times(factor):
    """The planted fault: a trainer that adds less noise than it was told."""

    def make(*args, noise_multiplier, **options):
        return LocalTrainer(*args, noise_multiplier=factor * noise_multiplier, **options)

    return make


# --- the mirror ------------------------------------------------------------------------------------------------


def test_without_noise_the_rest_is_the_sum_of_the_members_rows():
    """Opacus' clipped sum, less the generated images, against rows from torch.func: every step, both losses."""
    study = tiny_study(privacy={"clip_norm": 0.7}, training={"discriminator_steps": 2})
    random, seen = InsecureRandom(1), []
    member = torch.tensor([True, False, True, True, False])
    canaries = Canaries(study, 5, random)
    watch(
        study,
        canaries,
        member,
        seen.append,
        noise_multiplier=1.0,
        sampling_rate=1.0,
        steps=4,
        random=random,
        make_trainer=with_noise_times(1e-7),
    )
    assert len(seen) == 4
    for one in seen:
        assert torch.allclose(one.rows_MD[member].sum(0) + one.fakes_ND.sum(0), one.noised_D, atol=1e-4)
        assert one.rows_MD.norm(dim=1).max() <= 0.7 + 1e-6
        assert len(one.fakes_ND) == study.training.patients_per_step
    assert not torch.allclose(seen[0].rows_MD, seen[3].rows_MD, atol=1e-3), "the weights move, and the rows with them"


def test_the_attacks_rows_are_the_gradients_one_by_one():
    study = tiny_study(privacy={"clip_norm": 2.0})
    used = recipe.load(study)
    network = used.networks()[1]
    canaries = Canaries(study, 4, InsecureRandom(2))
    is_real = torch.tensor([1.0, 0.0, 1.0, 0.0])
    rows = clipped_rows(used, network, canaries.images_M1SS, canaries.labels_M, is_real)
    for i in range(4):
        logits = network(canaries.images_M1SS[i : i + 1], canaries.labels_M[i : i + 1])
        loss = functional.binary_cross_entropy_with_logits(logits, is_real[i : i + 1])
        slow = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])
        slow *= min(1.0, 2.0 / float(slow.norm()))
        assert torch.allclose(rows[i], slow, atol=1e-5)


def test_canaries_are_nobodys_images():
    canaries = Canaries(tiny_study(), 50, InsecureRandom(3))
    assert set(canaries.images_M1SS.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(canaries.images_M1SS.mean())) < 0.03
    assert set(canaries.labels_M.tolist()) == {0, 1}
    members = canaries.patients(torch.arange(50) < 20)
    assert members.n_patients == len(members.images_N1HW) == 20


# --- one run ---------------------------------------------------------------------------------------------------


def test_the_likelihood_ratio_is_that_of_a_normal_prior():
    """Against the two densities themselves, written out in the space of the weights; the noise level is measured."""
    generator, q, noise, size = torch.Generator().manual_seed(0), 0.3, 0.2, 500
    rows = torch.randn(4, size, generator=generator) / size**0.5
    rest = rows[0] + noise * torch.randn(size, generator=generator)
    fast = log_ratio_drawn(rows, rest, size, sampling_rate=q, clip_norm=1.0)
    explained = torch.linalg.lstsq(rows.T.double(), rest.double()).solution @ rows.double()
    variance = float((rest.double() - explained).square().sum() / (size - 4))
    assert math.isclose(variance, noise**2, rel_tol=0.1)
    mean = q / 2
    energy = float((rest - mean * rows.sum(0)).double().square().sum()) - size * variance
    prior = max(mean * (1 - mean), energy / float(rows.double().square().sum()))
    for i in range(4):
        others = rows[torch.arange(4) != i].double()
        covariance = variance * torch.eye(size).double() + prior * others.T @ others
        densities = [
            torch.distributions.MultivariateNormal(drawn * rows[i].double() + mean * others.sum(0), covariance)
            for drawn in (0, 1)
        ]
        out, drawn = (density.log_prob(rest.double()) for density in densities)
        assert math.isclose(float(fast[i]), float(drawn - out), rel_tol=1e-4)
    assert fast[0] > 1 > -1 > max(fast[1:])


def test_what_generated_images_could_add_is_left_out():
    generator = torch.Generator().manual_seed(1)
    rows, fakes = torch.randn(3, 40, generator=generator), torch.randn(5, 40, generator=generator)
    noised = torch.randn(40, generator=generator)
    once = without_fakes(Seen(rows, fakes, noised))
    unclipped = without_fakes(Seen(rows, fakes, noised + 7 * fakes[0] - 3 * fakes[4]))
    for a, b in zip(once[:2], unclipped[:2], strict=True):
        assert torch.allclose(a, b, atol=1e-4)
        assert (a @ fakes.T).abs().max() < 1e-4
    assert once[2] == 35


@pytest.fixture(scope="module")
def eight():
    """A study of 200 steps at 28 pixels with epsilon 8: (study, site, the noise that it declares)."""
    values = tiny_study(gan={"discriminator_width": 8}, privacy={"epsilon": 8.0, "delta": 1e-5}).model_dump()
    values["sites"] = [{"name": f"site-{i}", "patients": 400} for i in range(3)]
    values["training"] |= {"rounds": 10, "local_steps": 20, "patients_per_step": 32, "discriminator_steps": 5}
    study = from_dict(values)
    sigma = calibrate_noise(epsilon=8.0, delta=1e-5, sampling_rate=32 / 400, steps=200)
    return study, study.sites[0], sigma


def run_once(setting, factor, canaries=300, seed=5):
    study, site, sigma = setting
    return one_run_audit(
        study,
        site,
        noise_multiplier=sigma,
        canaries=canaries,
        random=InsecureRandom(seed),
        make_trainer=with_noise_times(factor),
    )


def complete(finding: Finding) -> bool:
    """Everything that must be printed is there, and agrees with itself."""
    assert finding.confidence == CONFIDENCE
    assert 0 <= finding.lower_bound <= finding.ceiling
    assert finding.seconds > 0
    assert f"{finding.ceiling:.2f}" in finding.explanation
    return True


def test_an_honest_run_at_epsilon_eight_passes(eight):
    for seed in (1, 2):
        finding = run_once(eight, 1.0, seed=seed)
        assert complete(finding)
        assert finding.verdict == "passed"
        assert finding.lower_bound <= finding.allowed <= 8


@pytest.mark.parametrize("factor", [0.15, 0.1, 1e-6])
def test_a_seventh_of_the_noise_a_tenth_and_none_are_caught(eight, factor):
    finding = run_once(eight, factor)
    assert complete(finding)
    assert finding.verdict == "failed"
    assert finding.lower_bound > finding.allowed
    assert finding.numbers["noise_multiplier"] == eight[2], "declared, not what was planted"


def clipped_tenfold(study, *args, noise_multiplier, **options):
    """Clips to ten times C, and adds the noise that C needs."""
    loose = study.model_copy(update={"privacy": study.privacy.model_copy(update={"clip_norm": 10.0})})
    return LocalTrainer(loose, *args, noise_multiplier=noise_multiplier / 10, **options)


def without_privacy(*args, noise_multiplier, **options):
    """The arm of a simulation that neither clips nor adds noise."""
    return LocalTrainer(*args, noise_multiplier=None, **options)


@pytest.mark.parametrize("trainer", [clipped_tenfold, without_privacy])
def test_rows_that_are_not_clipped_as_agreed_are_caught(eight, trainer):
    study, site, sigma = eight
    finding = one_run_audit(
        study, site, noise_multiplier=sigma, canaries=300, random=InsecureRandom(6), make_trainer=trainer
    )
    assert finding.verdict == "failed"


def test_the_plan_leaves_room_between_what_is_declared_and_the_ceiling(eight):
    study, site, sigma = eight
    p = plan(study, site, noise_multiplier=sigma, canaries=400, confidence=0.95)
    assert p.canaries == 400 and 1 <= p.steps <= study.total_steps
    assert p.epsilon == epsilon_pld([TrainingSteps(sigma, study.sampling_rate(site), p.steps)], 1e-5) < 8
    assert p.ceiling == one_run_epsilon(canaries=400, guesses=p.guesses, correct=p.guesses, delta=1e-5)
    assert p.ceiling > p.epsilon + 0.5
    members_drawn = 200 * (1 - (1 - study.sampling_rate(site)) ** p.steps)
    assert p.guesses < members_drawn, "nobody is named who cannot have been seen"


def test_too_few_canaries_say_so(eight):
    finding = run_once(eight, 1e-6, canaries=20)
    assert finding.verdict == "too-few" and finding.ceiling <= finding.allowed


# --- many runs -------------------------------------------------------------------------------------------------


def test_the_toy_has_ten_thousand_weights():
    study = toy_study()
    assert 8_000 < sum(p.numel() for p in recipe.load(study).networks()[1].parameters()) < 15_000


def test_many_honest_runs_stay_below_the_theory():
    general, normal = many_run_audit(runs=40, epsilon=4.0, random=InsecureRandom(1))
    assert complete(general) and complete(normal)
    assert general.verdict == "too-few", "forty runs cannot show 4, whatever the noise"
    assert normal.verdict == "passed" and general.lower_bound <= normal.lower_bound < 4.0
    assert general.numbers["said_in"] > general.numbers["said_in_wrongly"], "the attack is one"


def test_a_tenth_of_the_noise_is_caught_in_many_runs():
    general, normal = many_run_audit(runs=80, random=InsecureRandom(2), make_trainer=with_noise_times(0.1))
    assert general.verdict == normal.verdict == "failed"
    assert 2.0 < general.lower_bound <= general.ceiling < 3 and normal.lower_bound > 5


# --- generators ------------------------------------------------------------------------------------------------


def patients(rng, count, most=3):
    """Smooth images of 16 pixels: a patient's images are alike, patients differ. And whose they are."""
    patient = np.repeat(np.arange(count), rng.integers(1, most + 1, count))
    shapes = np.random.default_rng(9).normal(size=(6, 16, 16))
    traits = rng.normal(size=(count, 6))[patient] + 0.3 * rng.normal(size=(len(patient), 6))
    return np.tanh(0.3 * np.tensordot(traits, shapes, 1))[:, None], patient


def attacked(make, count=300, seed=1, **options):
    """`make(rng, training images, their patients)` is the generator."""
    rng = np.random.default_rng(seed)
    images, patient = patients(rng, 2 * count)
    inside = patient < count
    generated = make(rng, images[inside], patient[inside])
    sides = images[inside], patient[inside], images[~inside], patient[~inside]
    return generator_attacks(generated, *sides, **options)


def independent(rng, images, patient):
    return patients(rng, 400)[0]


def memorising(rng, images, patient):
    return images[rng.integers(0, len(images), 800)] + rng.normal(0, 0.05, (800, 1, 16, 16))


def test_a_generator_of_independent_images_passes():
    findings = attacked(independent)
    assert [f.quantity for f in findings] == ["AUC", "AUC", "AUC", "TPR at 1 % FPR"]
    assert {f.verdict for f in findings} == {"passed"} and gate(findings) == "passed"
    for finding in findings:
        assert finding.lower_bound <= finding.estimate <= finding.numbers["upper_bound"]
        assert finding.lower_bound <= finding.allowed < finding.ceiling < 1


@pytest.mark.parametrize("count", [15, 300])
def test_a_memorising_generator_fails(count):
    findings = attacked(memorising, count=count)
    assert gate(findings) == "failed"
    if count == 300:
        assert {f.verdict for f in findings} == {"failed"}
        assert min(f.estimate for f in findings) > 0.8


def test_one_patient_in_fifteen_is_found_where_averages_are_blind():
    def partly(rng, images, patient):
        return np.concatenate([independent(rng, images, patient), images[patient < 20]])

    *averages, found = attacked(partly)
    assert found.verdict == "failed" and found.numbers["caught"] >= 20
    assert averages[0].lower_bound < 0.5


def test_too_few_patients_are_not_a_pass():
    findings = attacked(independent, count=15)
    assert gate(findings) == "too-few" and "failed" not in {f.verdict for f in findings}
    *_, found = attacked(independent, count=60)
    assert found.verdict == "too-few", "one per cent of sixty patients is nobody"


def test_a_generator_that_makes_one_image_shows_nothing_of_anybody():
    assert gate(attacked(lambda rng, images, patient: np.zeros((9, 1, 16, 16)), count=400)) == "passed"


def test_the_patient_counts_not_the_image():
    """Each training patient has one image or nine copies of it: the same limits."""
    rng = np.random.default_rng(4)
    images, patient = patients(rng, 100, most=1)
    inside, made = patient < 50, patients(rng, 100)[0]
    other = images[~inside], patient[~inside]
    once = generator_attacks(made, images[inside], patient[inside], *other)
    nine = generator_attacks(made, np.repeat(images[inside], 9, 0), np.repeat(patient[inside], 9), *other)
    assert nine[0].numbers["training_images"] == 450
    for a, b in zip(once, nine, strict=True):
        assert (a.estimate, a.lower_bound) == (b.estimate, b.lower_bound)


def test_gan_leaks_takes_another_generators_images_as_reference():
    """Ordinary images lie near everything; a reference takes that away, and the memorised ones stay."""
    reference = patients(np.random.default_rng(7), 400)[0]
    assert attacked(memorising, reference_N1SS=reference)[2].verdict == "failed"
    assert attacked(independent, reference_N1SS=reference)[2].verdict == "passed"


def test_the_same_images_give_the_same_limits():
    first, second = attacked(independent, count=30), attacked(independent, count=30)
    assert [replace(f, seconds=0) for f in first] == [replace(f, seconds=0) for f in second]


def test_no_attack_is_no_pass():
    assert gate([]) == "too-few"


def broken(change):
    rng = np.random.default_rng(0)
    images, patient = patients(rng, 20, most=1)
    parts = [images.copy(), images[:10], patient[:10], images[10:], patient[10:]]
    change(parts)
    return parts


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.__setitem__(4, p[4] - 1),  # a patient on both sides
        lambda p: p.__setitem__(2, p[2][:-1]),  # one image without a patient
        lambda p: p.__setitem__(0, p[0][:, :, :8, :8]),  # another size
        lambda p: p.__setitem__(3, p[3][:, 0]),  # no axis of channels
        lambda p: (p.__setitem__(3, p[3][:0]), p.__setitem__(4, p[4][:0])),  # nobody held out
        lambda p: p[0].__setitem__((0, 0, 0, 0), np.nan),
    ],
)
def test_images_that_prove_nothing_are_refused(change):
    with pytest.raises(DataError, match="DATA_EVALUATION"):
        generator_attacks(*broken(change))
