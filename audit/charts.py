"""The audit report's chart: privacy spent, below its ceilings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.figure import Figure

from fedmedgan.audit import drawing
from fedmedgan.audit.drawing import ALARM, GRID, INK, MUTED
from fedmedgan.audit.words import rounded_up

MOST_STUDIES = 5
"""Of more, the ones that spent most are drawn."""


@dataclass(frozen=True)
class Bar:
    """What one study, or all of them together, spent of a ceiling."""

    label: str
    epsilon: float
    ceiling: float


@matplotlib.rc_context(drawing.STYLE)
def spent(rounds: Sequence[tuple[int, float]], studies: Sequence[Bar], everything: Bar, alt: str) -> str:
    """Left: epsilon after each round of a study, and its ceiling. Right: this and other studies, and all together.

    Args:
        rounds: (round, epsilon after it) in their order, at least one.
        studies: the audited study first; its ceiling is drawn on the left.
        everything: all studies of the same patients, whose epsilons compose to less than their sum.
    """
    bars = [*studies[:1], *sorted(studies[1:], key=lambda bar: -bar.epsilon)[: MOST_STUDIES - 1], everything]
    figure = Figure(figsize=(9.4, 2.6))
    left, right = figure.subplots(1, 2, width_ratios=(5, 4))
    figure.subplots_adjust(left=0.04, right=0.985, top=0.86, bottom=0.18, wspace=0.42)
    ceiling = studies[0].ceiling
    highest = max(ceiling, *(epsilon for _, epsilon in rounds))
    numbers, values = zip(*rounds, strict=True)
    left.plot(numbers, values, color=drawing.stand_in(0), marker=drawing.marker(len(rounds)), clip_on=False)
    left.axhline(ceiling, color=ALARM, linewidth=1.25, dashes=(5, 3))
    left.annotate(
        f"ceiling of the study {ceiling:g}", (0, ceiling), xycoords=("axes fraction", "data"), xytext=(2, 4),
        textcoords="offset points", color=ALARM,
    )  # fmt: skip
    left.set_ylim(0, 1.16 * highest)
    drawing.round_axis(left, sorted(set(numbers)))
    drawing.end_labels(left, [values[-1]], [rounded_up(values[-1])], [drawing.stand_in(0)])
    left.set_title("epsilon after each round of this study")

    longest = max(max(bar.epsilon, bar.ceiling) for bar in bars)
    heights = [len(bars) - 1 - index for index in range(len(bars))]
    for height, bar in zip(heights, bars, strict=True):
        over = bar.epsilon > bar.ceiling
        colour = ALARM if over else INK if bar is everything else drawing.stand_in(0 if bar is studies[0] else 3)
        right.barh(height, bar.ceiling, height=0.5, color=GRID)
        right.barh(height, bar.epsilon, height=0.5, color=colour)
        right.plot([bar.ceiling] * 2, [height - 0.36, height + 0.36], color=ALARM, linewidth=1.5)
        right.annotate(
            f"{rounded_up(bar.epsilon)} of {bar.ceiling:g}", (max(bar.epsilon, bar.ceiling), height), xytext=(6, 0),
            textcoords="offset points", va="center", color=MUTED,
        )  # fmt: skip
    right.set_yticks(heights, [drawing.clean(bar.label, 20) for bar in bars], color=INK)
    right.set_xlim(0, 1.45 * longest)
    right.set_ylim(-0.7, max(len(bars) - 0.3, 2.2))
    right.set_xticks([])
    right.spines["bottom"].set_visible(False)
    right.grid(visible=False)
    right.set_title("epsilon spent, and its ceiling")
    return drawing.svg(figure, "spent", alt)
