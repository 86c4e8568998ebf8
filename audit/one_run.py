"""One run, many canaries: does the study's own code hide whether a record was in the training set?

Steinke, Nasr, Jagielski 2023 (arXiv 2305.08846). A fair coin decides for each canary whether it is in a mirror run
(audit/mirror.py: the study's code, noise, sampling rate and clip norm, on made-up patients). An attacker who sees every
step then names the canaries it is surest of; how many of them were in bounds epsilon from below.

The attacker: let y be a step's noised sum less the generated images' part, G the canaries' clipped gradients. Then
y = G'b + noise, where b says which canaries were drawn. b is taken as normal with the mean and variance of its coins,
which gives each canary's likelihood ratio "drawn / not drawn" with the others as interference; a member is drawn with
chance q, so its ratio is 1 - q + q * ratio, multiplied over the steps. The noise is measured from what of y lies
outside the canaries' gradients, and b's variance from what lies inside, so the attack uses noise that is too weak,
rows that are too long and batches that are too large. A plain dot product of y with each gradient is far weaker: the
other canaries drown it (measured at 64 pixels: AUC 0.44 to 0.63 WITHOUT noise, where this attack makes no error).

Measured at 28 pixels, 500 canaries, study of epsilon 8 (8 steps, declared 2.30, ceiling 3.50), bounds of six runs each,
twenty for the honest code:

    noise x 1     0.00 to 0.46      noise x 0.3   1.10 to 1.84
    noise x 0.5   0.13 to 0.73      noise x 0.2   2.34 to 3.50  all failed
    noise x 0.7   0.00 to 0.54      noise x 0.1   3.50          all failed

So it is a smoke detector for gross faults of the whole; noise that is a tenth too weak is the noise test's to find.

Only "in" is ever guessed: a member that was never drawn cannot be told from an outsider, and both are then left out.

How many steps: with every step the attack sees more members, but the noise also allows a larger epsilon. The mirror
runs for the number of steps where the ceiling is farthest above the epsilon that the accountant declares for just
these steps; never above the study's. A study of large epsilon could not fail otherwise: the ceiling is ln(guesses / 3).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmedgan.audit.bounds import CONFIDENCE, Finding, judge, one_run_epsilon
from fedmedgan.audit.mirror import Canaries, MakeTrainer, Seen, require_auditable, watch
from fedmedgan.client.training.local_round import LocalTrainer
from fedmedgan.client.training.randomness import RandomSource, SystemRandom
from fedmedgan.shared.privacy.accounting import epsilon_pld
from fedmedgan.shared.privacy.events import TrainingSteps
from fedmedgan.shared.study import Site, Study

CANARIES = 500
MOST_GRADIENTS = 24_000
"""Of canaries, over all steps: about a minute at 64 x 64 pixels and the default widths."""
MOST_BYTES = 1 << 30
"""Of the canaries' gradients; a wide discriminator gets fewer canaries."""
MOST_FAKES = 256
"""Directions of generated images that are left out."""
LEAST_NOISE = 0.01
"""The attacker takes the noise for at least this much of C: below it, rounding errors are what it would measure."""


@dataclass(frozen=True)
class Plan:
    """What a mirror run will be, fixed before any coin is tossed."""

    canaries: int
    steps: int
    guesses: int
    """Canaries that will be called members: as many as were drawn at least once, less two standard deviations."""
    ceiling: float
    epsilon: float
    """What the accountant (PLD) declares for these steps at the study's delta."""


def plan(study: Study, site: Site, *, noise_multiplier: float, canaries: int, confidence: float) -> Plan:
    """The number of steps, a power of two or the most there are, with the widest room between epsilon and ceiling."""
    q, delta = study.sampling_rate(site), study.privacy.delta
    weights = sum(p.numel() for p in require_auditable(study).networks()[1].parameters())
    m = max(1, min(canaries, MOST_BYTES // (4 * weights), weights // 2 - MOST_FAKES))

    def with_steps(steps: int) -> Plan:
        share = (1 - (1 - q) ** steps) / 2
        guesses = max(1, math.floor(m * share - 2 * math.sqrt(m * share * (1 - share))))
        ceiling = one_run_epsilon(canaries=m, guesses=guesses, correct=guesses, delta=delta, confidence=confidence)
        return Plan(m, steps, guesses, ceiling, epsilon_pld([TrainingSteps(noise_multiplier, q, steps)], delta))

    most = max(1, min(study.total_steps, MOST_GRADIENTS // m))
    candidates = {most} | {2**k for k in range(most.bit_length())}
    return max((with_steps(steps) for steps in sorted(candidates)), key=lambda p: p.ceiling - p.epsilon)


def one_run_audit(
    study: Study,
    site: Site,
    *,
    noise_multiplier: float,
    canaries: int = CANARIES,
    confidence: float = CONFIDENCE,
    random: RandomSource | None = None,
    make_trainer: MakeTrainer = LocalTrainer,
) -> Finding:
    """Audit one hospital's training code by a mirror run.

    Args:
        site: whose sampling rate is used.
        noise_multiplier: sigma that the hospital's ledger declares.
        canaries: more raise the ceiling and the time.
        random: noise, sampling and coins; from the operating system unless a test says otherwise.
        make_trainer: called like `LocalTrainer`.

    Raises:
        PrivacyError: PRIVACY_RANGE, the noise multiplier is out of range.
        ModelError: as `LocalTrainer.train`.

    =============================================  ==========================================
    case                                           verdict
    =============================================  ==========================================
    lower bound above the declared epsilon         failed: at `confidence`, the claim is false
    ceiling not above the declared epsilon         too-few: give more canaries
    otherwise                                      passed: nothing was found, nothing is proved
    an honest run                                  fails with chance 1 - confidence at most
    noise, but for example only half of it         mostly passes: the test of the noise finds that
    =============================================  ==========================================
    """
    started, random = time.perf_counter(), random or SystemRandom()
    p = plan(study, site, noise_multiplier=noise_multiplier, canaries=canaries, confidence=confidence)
    q, cards = study.sampling_rate(site), Canaries(study, p.canaries, random)
    member_M = random.bernoulli(p.canaries, 0.5)
    score_M = torch.zeros(p.canaries, dtype=torch.float64)

    def see(seen: Seen) -> None:
        drawn_M = log_ratio_drawn(*without_fakes(seen), sampling_rate=q, clip_norm=study.privacy.clip_norm)
        score_M.add_(torch.logaddexp(torch.tensor(1 - q).double().log(), math.log(q) + drawn_M))

    watch(
        study,
        cards,
        member_M,
        see,
        noise_multiplier=noise_multiplier,
        sampling_rate=q,
        steps=p.steps,
        random=random,
        make_trainer=make_trainer,
    )
    correct = int(member_M[score_M.topk(p.guesses).indices].sum())
    bound = one_run_epsilon(
        canaries=p.canaries, guesses=p.guesses, correct=correct, delta=study.privacy.delta, confidence=confidence
    )
    return Finding(
        name="one run with canaries",
        quantity="epsilon",
        estimate=None,
        lower_bound=bound,
        confidence=confidence,
        ceiling=p.ceiling,
        allowed=p.epsilon,
        numbers={
            "canaries": p.canaries,
            "guesses": p.guesses,
            "correct": correct,
            "steps": p.steps,
            "noise_multiplier": noise_multiplier,
            "sampling_rate": q,
            "delta": study.privacy.delta,
        },
        seconds=time.perf_counter() - started,
        verdict=judge(bound, p.ceiling, p.epsilon),
        explanation=(
            f"{correct} of {p.guesses} guesses were right in {p.steps} steps of the study's own code on made-up "
            f"patients: epsilon of these steps is at least {bound:.2f}, {p.epsilon:.2f} was declared, and this test "
            f"could have shown at most {p.ceiling:.2f}."
        ),
    )


def without_fakes(seen: Seen) -> tuple[Tensor, Tensor, int]:
    """The canaries' rows and the noised sum without the directions of the generated images' gradients.

    Their part of the sum is known and is taken off. It is known only if they were clipped as agreed, so what they could
    have added to the sum otherwise is left out as well.

    Returns:
        rows (M, D), rest (D,), and the number of directions in which `rest` still varies.
    """
    rest_D = seen.noised_D - seen.fakes_ND.sum(0)
    hidden_DK = torch.linalg.qr(seen.fakes_ND[:MOST_FAKES].T).Q
    rows_MD = seen.rows_MD - (seen.rows_MD @ hidden_DK) @ hidden_DK.T
    return rows_MD, rest_D - hidden_DK @ (hidden_DK.T @ rest_D), len(rest_D) - hidden_DK.shape[1]


def log_ratio_drawn(
    rows_MD: Tensor, rest_D: Tensor, directions: int, *, sampling_rate: float, clip_norm: float
) -> Tensor:
    """For each canary log P(rest | drawn) - log P(rest | not drawn), (M,) float64.

    The noise's variance s^2 is what lies outside the rows, a direction. b has independent coins of mean p = q / 2 (the
    member's coin and the drawing) and variance P = p (1 - p), or more if the energy inside the rows says so: then
    more patients were drawn, or their rows clipped to more than C, than was agreed. With a normal prior of these
    moments the posterior has covariance V = (G G' / s^2 + I / P)^-1 and mean V (G rest / s^2 + p / P); dividing the
    prior out again leaves each canary's own likelihood ratio.
    """
    m, energy = len(rows_MD), rest_D.double().square().sum()
    unit = torch.eye(m, dtype=torch.float64)
    kernel_MM, seen_M = (rows_MD @ rows_MD.T).double(), (rows_MD @ rest_D).double()
    inside = seen_M @ torch.linalg.solve(kernel_MM + 1e-6 * clip_norm**2 * unit, seen_M)
    variance = ((energy - inside) / (directions - m)).clamp(min=(LEAST_NOISE * clip_norm) ** 2)
    mean = sampling_rate / 2
    beyond = rest_D.double() - mean * rows_MD.double().sum(0)
    prior = ((beyond.square().sum() - variance * directions) / kernel_MM.trace()).clamp(min=mean * (1 - mean))
    posterior_MM = torch.linalg.inv(kernel_MM / variance + unit / prior)
    posterior_mean_M = posterior_MM @ (seen_M / variance + mean / prior)
    spread_M = posterior_MM.diagonal()
    return posterior_mean_M / spread_M - mean / prior - (1 / spread_M - 1 / prior) / 2
