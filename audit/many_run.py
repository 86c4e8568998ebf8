"""Many small runs, one record: does the training code hide a single record in the worst case?

Jagielski, Ullman, Oprea 2020 (arXiv 2006.07709); Nasr et al. 2021 (arXiv 2101.04535). A toy discriminator of some ten
thousand weights is trained n times by the study's own code, each time with or without one target record. The attacker
knows everything else: the other records, the generated images, the weights before each step. What remains of a step's
noised sum is the target's clipped gradient, or not, plus the noise. The case is the worst there is: the target is drawn
in every step (q = 1) and its gradient has the full clip norm. So theory says exactly what the noise allows, and this is
a test of the code for each release of fedmedgan rather than of one study.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from fedmedgan.audit.bounds import CONFIDENCE, Finding, judge, many_run_epsilon, many_run_epsilon_of_normal_noise
from fedmedgan.audit.mirror import Canaries, MakeTrainer, Seen, watch
from fedmedgan.client.training.local_round import LocalTrainer
from fedmedgan.client.training.randomness import RandomSource, SystemRandom
from fedmedgan.shared.privacy.accounting import calibrate_noise
from fedmedgan.shared.study import Study, from_dict

RUNS = 200
EPSILON = 2.0
DELTA = 1e-5
STEPS = 2
OTHERS = 3
"""Records beside the target."""


def many_run_audit(
    *,
    runs: int = RUNS,
    epsilon: float = EPSILON,
    confidence: float = CONFIDENCE,
    random: RandomSource | None = None,
    make_trainer: MakeTrainer = LocalTrainer,
) -> tuple[Finding, Finding]:
    """Audit the training code at toy size.

    Args:
        runs: half of them with the target, half without.
        epsilon: what is declared, at delta 1e-5; the noise is calibrated for it.
        random: noise; from the operating system unless a test says otherwise.
        make_trainer: called like `LocalTrainer`.

    Raises:
        PrivacyError: PRIVACY_RANGE, epsilon is out of range.

    ==================================================  ===================================================
    case                                                verdict
    ==================================================  ===================================================
    lower bound above the declared epsilon              failed
    ceiling not above it                                too-few: give more runs or a smaller epsilon
    otherwise                                           passed
    an honest code                                      fails with chance 1 - confidence at most
    ==================================================  ===================================================
    """
    started, random = time.perf_counter(), random or SystemRandom()
    study, half = toy_study(epsilon), runs // 2
    sigma = calibrate_noise(epsilon=epsilon, delta=DELTA, sampling_rate=1.0, steps=STEPS)
    with_target = torch.ones(OTHERS + 1, dtype=torch.bool)
    without_target = torch.arange(OTHERS + 1) > 0
    hits = sum(_says_in(study, with_target, sigma, random, make_trainer) for _ in range(half))
    false = sum(_says_in(study, without_target, sigma, random, make_trainer) for _ in range(half))

    def finding(name: str, bound: Callable[..., float], assuming: str) -> Finding:
        numbers = {"with_record": half, "without_record": half, "delta": DELTA, "confidence": confidence}
        found, ceiling = (
            bound(said_in=hits, said_in_wrongly=false, **numbers),
            bound(said_in=half, said_in_wrongly=0, **numbers),
        )
        return Finding(
            name=name,
            quantity="epsilon",
            estimate=None,
            lower_bound=found,
            confidence=confidence,
            ceiling=ceiling,
            allowed=epsilon,
            numbers={
                "runs": 2 * half,
                "said_in": hits,
                "said_in_wrongly": false,
                "steps": STEPS,
                "noise_multiplier": sigma,
                "sampling_rate": 1.0,
                "delta": DELTA,
            },
            seconds=seconds,
            verdict=judge(found, ceiling, epsilon),
            explanation=(
                f"The target was recognised in {hits} of {half} runs with it, and wrongly in {false} of {half} "
                f"without: {assuming} epsilon is at least {found:.2f}, {epsilon:.2f} was declared, and {2 * half} "
                f"runs could have shown at most {ceiling:.2f}."
            ),
        )

    seconds = time.perf_counter() - started
    return (
        finding("many runs at toy size", many_run_epsilon, "whatever the noise is,"),
        finding("many runs at toy size, normal noise", many_run_epsilon_of_normal_noise, "for normal noise"),
    )


def toy_study(epsilon: float = EPSILON) -> Study:
    """28 pixels, a discriminator of 10,000 weights, everybody in every step."""
    return from_dict(
        {
            "name": "many-runs",
            "sites": [{"name": f"toy-{i}", "patients": 10} for i in range(3)],
            "images": {"size": 28},
            "gan": {"latent": 8, "generator_width": 4, "discriminator_width": 16},
            "training": {"rounds": 1, "local_steps": STEPS, "patients_per_step": OTHERS + 1, "discriminator_steps": 1},
            "privacy": {"epsilon": epsilon, "delta": DELTA},
        }
    )


def _says_in(
    study: Study, member_M: torch.Tensor, sigma: float, random: RandomSource, make_trainer: MakeTrainer
) -> bool:
    """One run; is the likelihood ratio for the target, record 0, above one?

    Equal noise in every step makes the ratio one where the steps' dot products sum to half of the squared norms. That
    threshold needs no noise level and no other run, so it is fixed beforehand.
    """
    evidence = []

    def see(seen: Seen) -> None:
        target_D, known_D = seen.rows_MD[0], seen.rows_MD[1:].sum(0) + seen.fakes_ND.sum(0)
        evidence.append(float(target_D @ (seen.noised_D - known_D) - target_D @ target_D / 2))

    watch(
        study,
        Canaries(study, len(member_M), random),
        member_M,
        see,
        noise_multiplier=sigma,
        sampling_rate=1.0,
        steps=STEPS,
        random=random,
        make_trainer=make_trainer,
    )
    return sum(evidence) > 0
