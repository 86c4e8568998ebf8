"""What a private step costs: against Opacus' hooks as they are shipped, and against a step without privacy.

    make bench-private-step

The built-in study's discriminator, the same four times as wide, and with the group norm that a study has by default; a
Poisson batch of its expected size and as many fakes. `plain` is backward and Adam; `hooks` is Opacus' GradSampleModule
and DPOptimizer with our noise; `fast` is the step that a study runs; `watched` is that with a witness. Time is that of
one thread on the processor, medians of turns (all four in each turn): other work on the machine does not count. Memory
is the peak of what torch's allocator handed out in the first step, over what was there before.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from _results import write
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from fedmedgan.cli.study import read_study
from fedmedgan.client.gans.cdcgan import Discriminator
from fedmedgan.client.training.private_step import PrivateStep
from fedmedgan.client.training.randomness import SystemRandom, round_to_grid
from fedmedgan.client.training.witness import Witness
from fedmedgan.shared.study import Images

TURNS, SECONDS = 15, 40.0
"""Of each case: at least so many turns, and turns for at least so long."""
BUILT_IN = read_study(None).gan
WIDTH = BUILT_IN.discriminator_width
NETWORKS: dict[str, dict[str, Any]] = {
    "": {},
    "_wide": {"discriminator_width": 4 * WIDTH},
    "_group_norm": {"norm": "group"},
    "_wide_group_norm": {"norm": "group", "discriminator_width": 4 * WIDTH},
}
"""What is another than in the built-in study, by the end of the figures' names."""
CASES = [(size, patients, network) for size, patients in ((28, 256), (64, 128)) for network in NETWORKS]
"""Pixels, patients in a step, network."""
SIGMA, CLIP_NORM, LEARNING_RATE = 1.0, 1.0, 1e-4

Step = Callable[[], object]


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Full backward hook is firing")  # images need no gradient
    rows = [row for case in CASES for row in _measure(*case)]
    figures: dict[str, float] = {}
    for size, patients, network in CASES:
        name = f"{size}_b{patients}{network}"
        of = {r["step"]: r for r in rows if (r["pixels"], r["network"]) == (size, network)}
        figures[f"hooks_over_fast_{name}"] = of["hooks"]["cpu_s"] / of["fast"]["cpu_s"]
        figures[f"fast_over_plain_{name}"] = of["fast"]["cpu_s"] / of["plain"]["cpu_s"]
        figures[f"fast_over_hooks_memory_{name}"] = of["fast"]["peak_mb"] / of["hooks"]["peak_mb"]
        figures[f"watched_over_fast_{name}"] = of["watched"]["cpu_s"] / of["fast"]["cpu_s"]
    _show(rows, figures)
    write(
        "private-step",
        command="make bench-private-step",
        packages=("fedmedgan", "torch", "opacus"),
        rows=rows,
        figures=figures,
        notes=[
            "cpu_s: processor seconds of one thread, median of turns in which all steps take part",
            "peak_mb: torch's allocator in the first step, over what was there before; Adam's state is in it",
            "wide: four times as wide as the built-in study's discriminator, which has no norm; group_norm: with one",
        ],
    )


def _measure(size: int, patients: int, network: str) -> list[dict]:
    gan = BUILT_IN.model_copy(update=NETWORKS[network])
    discriminator = Discriminator(Images(size=size), gan)
    labels = torch.arange(2 * patients) % 2
    is_real = (torch.arange(2 * patients) < patients).float()
    inputs = [torch.rand(2 * patients, 1, size, size) * 2 - 1, labels, is_real]
    steps = {
        make.__name__.strip("_"): make(copy.deepcopy(discriminator), inputs)
        for make in (_plain, _hooks, _fast, _watched)
    }
    peaks = {name: _peak_bytes(step) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    begun = time.monotonic()
    while len(seconds["plain"]) < TURNS or time.monotonic() - begun < SECONDS:
        for name, step in steps.items():
            start = time.process_time()
            step()
            seconds[name].append(time.process_time() - start)
    weights = sum(p.numel() for p in discriminator.parameters())
    return [
        {
            "step": name,
            "pixels": size,
            "rows": 2 * patients,
            "network": network,
            "width": gan.discriminator_width,
            "norm": gan.norm,
            "weights": weights,
            "turns": len(seconds[name]),
            "cpu_s": statistics.median(seconds[name]),
            "peak_mb": peaks[name] / 1e6,
        }
        for name in steps
    ]


def _losses(network: nn.Module, images: Tensor, labels: Tensor, is_real: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(network(images, labels), is_real, reduction="none")


def _plain(network: nn.Module, inputs: list[Tensor]) -> Step:
    adam = torch.optim.Adam(network.parameters(), LEARNING_RATE)

    def step() -> None:
        adam.zero_grad(set_to_none=True)
        (_losses(network, *inputs).sum() / len(inputs[0])).backward()
        adam.step()

    return step


class _OurNoise(DPOptimizer):
    """Opacus' own noise comes from a 32-bit seed; ours takes longer, so both sides have it."""

    def add_noise(self) -> None:
        for p in self.params:
            noise = SystemRandom().normal(p.summed_grad.shape, self.noise_multiplier * self.max_grad_norm)
            p.grad = round_to_grid(p.summed_grad.double() + noise).to(p.dtype).view_as(p)


def _hooks(network: nn.Module, inputs: list[Tensor]) -> Step:
    module = GradSampleModule(network, loss_reduction="sum")
    adam = torch.optim.Adam(network.parameters(), LEARNING_RATE)
    private = _OurNoise(
        adam, noise_multiplier=SIGMA, max_grad_norm=CLIP_NORM, expected_batch_size=len(inputs[0]), loss_reduction="mean"
    )

    def step() -> None:
        private.zero_grad(set_to_none=True)
        _losses(module, *inputs).sum().backward()
        private.step()

    return step


def _fast(network: nn.Module, inputs: list[Tensor], witness: Witness | None = None) -> Step:
    adam = torch.optim.Adam(network.parameters(), LEARNING_RATE)
    options = {"noise_multiplier": SIGMA, "clip_norm": CLIP_NORM, "divisor": len(inputs[0]), "random": SystemRandom()}
    private = PrivateStep(network, adam, witness=witness, **options)
    assert private.method == "book-keeping"
    return lambda: private.step(_losses, inputs)


def _watched(network: nn.Module, inputs: list[Tensor]) -> Step:
    drawn = torch.arange(len(inputs[0]) // 2)
    witness = Witness(
        noise_multiplier=SIGMA,
        clip_norm=CLIP_NORM,
        sampling_rate=0.1,
        fakes=len(drawn),
        patients=10 * len(drawn),
        declared=10 * len(drawn),
    )
    step = _fast(network, inputs, witness)

    def watched() -> None:
        witness.saw_draw(drawn)
        step()

    return watched


def _peak_bytes(step: Step) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    now = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def _show(rows: list[dict], figures: dict[str, float]) -> None:
    table = Table("pixels", "rows", "width", "norm", "weights", "step", "ms", "peak MB")
    for row in rows:
        shape = (str(row[key]) for key in ("pixels", "rows", "width", "norm", "weights"))
        table.add_row(*shape, row["step"], f"{row['cpu_s'] * 1e3:.0f}", f"{row['peak_mb']:.0f}")
    console = Console()
    console.print(table)
    console.print({name: round(value, 2) for name, value in figures.items()})


if __name__ == "__main__":
    main()
