"""Charts of the report: inline SVG, drawn with what fedmedgan.audit.drawing offers.

Every function takes plain numbers and returns one ``<svg>`` element. Charts are 10 inches wide; a page of 960
pixels shows them at full size with 13-pixel text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedmedgan.audit import drawing
from fedmedgan.audit.drawing import ALARM, INK, MANY_ROUNDS, MUTED, PAGE, Series


@dataclass(frozen=True)
class PhaseTimes:
    """Seconds of one round, by phase."""

    round: int
    local: float
    """1: wall time of training and encryption, all hospitals"""
    encrypt: float
    """inside 1: quantise, seal and encrypt at the slowest hospital"""
    aggregate: float
    """2"""
    broadcast: float
    """3: wall time of sending the sum and hearing back, without phase 4"""
    apply: float
    """4: decrypt, check and apply at the slowest hospital"""

    @property
    def total(self) -> float:
        return self.local + self.aggregate + self.broadcast + self.apply


@dataclass(frozen=True)
class UtilityRow:
    """One arm of the comparison."""

    label: str
    colour: str
    """A stand-in colour: INK, MUTED, ALARM or `drawing.stand_in(index)`."""
    auc: tuple[float, float]
    accuracy: tuple[float, float]
    """mean, standard deviation"""


@dataclass(frozen=True)
class SimilarityRow:
    """One arm of an image-to-image comparison, or the inputs as they are."""

    label: str
    colour: str
    psnr: float
    """dB"""
    ssim: float


@dataclass(frozen=True)
class _Panel:
    """One measure of all rows: mean and standard deviation, which is 0 where there is none."""

    title: str
    values: Sequence[tuple[float, float]]
    digits: int
    limits: tuple[float, float]
    floor: float | None = None
    """Drawn as a line, "chance"."""


@matplotlib.rc_context(drawing.STYLE)
def epsilon(series: Series, ceilings: Mapping[str, float], alt: str) -> str:
    """Privacy spent over the rounds, below the ceiling; one dashed line for each distinct ceiling."""
    figure, axes = drawing.wide_figure(3.5)
    highest = max([*ceilings.values(), *(value for points in series.values() for _, value in points)])
    drawing.lines(axes, series, digits=2, top=1.14 * highest)
    for ceiling in sorted(set(ceilings.values())):
        axes.axhline(ceiling, color=ALARM, linewidth=1.25, dashes=(5, 3))
        axes.annotate(
            f"budget {ceiling:g}", (0, ceiling), xycoords=("axes fraction", "data"), xytext=(2, 4),
            textcoords="offset points", color=ALARM,
        )  # fmt: skip
    axes.set_title("epsilon spent on each patient, after each round")
    return drawing.svg(figure, "epsilon", alt)


@matplotlib.rc_context(drawing.STYLE)
def phases(rounds: Sequence[PhaseTimes], alt: str) -> str:
    """Left: whole rounds. Right: the same without training, which would hide the rest."""
    figure = Figure(figsize=(10, 3.4))
    whole, rest = figure.subplots(1, 2, width_ratios=(5, 5))
    numbers = [r.round for r in rounds]
    _stack(
        whole,
        numbers,
        [[r.local for r in rounds], [r.aggregate for r in rounds], [r.broadcast for r in rounds],
         [r.apply for r in rounds]],
    )  # fmt: skip
    _stack(
        rest,
        numbers,
        [[1000 * r.encrypt for r in rounds], [1000 * r.aggregate for r in rounds],
         [1000 * r.broadcast for r in rounds], [1000 * r.apply for r in rounds]],
    )  # fmt: skip
    whole.set_title("whole round, seconds")
    rest.set_title("the same without training, milliseconds")
    last = rounds[-1]
    parts = [1000 * last.encrypt, 1000 * last.aggregate, 1000 * last.broadcast, 1000 * last.apply]
    words = ["1 encrypt", "2 add", "3 send", "4 decrypt, update"]
    middles = [sum(parts[:i]) + part / 2 for i, part in enumerate(parts)]
    figure.subplots_adjust(left=0.045, right=0.855, top=0.88, bottom=0.15, wspace=0.16)
    drawing.end_labels(rest, middles, words, [INK] * 4)
    return drawing.svg(figure, "phases", alt)


@matplotlib.rc_context(drawing.STYLE)
def traffic(up: Series, down: Series, plain: int, alt: str) -> str:
    """Bytes of one hospital in one round, beside the same parameters as plaintext float32."""
    figure, axes = drawing.wide_figure(2.7, right=0.76)
    unit, word = (1e6, "MB") if plain >= 1e6 else (1e3, "kB")
    series = {name: [(r, v / unit) for r, v in points] for name, points in {**up, **down}.items()}
    rounds = sorted({r for points in series.values() for r, _ in points})
    names = [*series, "plaintext float32, each way"]
    colours = [INK] * len(up) + [MUTED] * len(down) + [ALARM]
    values = [*series.values(), [(r, plain / unit) for r in rounds]]
    for points, colour in zip(values, colours, strict=True):
        style = {"dashes": (5, 3), "linewidth": 1.25} if colour == ALARM else {"marker": drawing.marker(len(rounds))}
        axes.plot(*zip(*points, strict=True), color=colour, **style)
    axes.set_ylim(0, 1.2 * max(v for points in values for _, v in points))
    drawing.round_axis(axes, rounds)
    ends = [points[-1][1] for points in values]
    drawing.end_labels(axes, ends, [f"{n} {e:.3g}" for n, e in zip(names, ends, strict=True)], colours)
    axes.set_title(f"one hospital, one round, {word}")
    return drawing.svg(figure, "traffic", alt)


@matplotlib.rc_context(drawing.STYLE)
def saturation(series: Series, alt: str) -> str:
    """Share of an update's values that were limited, in percent."""
    figure, axes = drawing.wide_figure(2.8)
    percent = {name: [(r, 100 * v) for r, v in points] for name, points in series.items()}
    highest = max(v for points in percent.values() for _, v in points)
    drawing.lines(axes, percent, digits=3, top=1.15 * max(highest, 0.1))
    axes.set_title("share of an update's values that were cut, %")
    return drawing.svg(figure, "saturation", alt)


@matplotlib.rc_context(drawing.STYLE)
def losses(generator: Series, discriminator: Series, alt: str) -> str:
    """Two losses on generated images; the second is left out where nothing of it may be told."""
    if not any(discriminator.values()):
        figure, axes = drawing.wide_figure(3.2)
        drawing.lines(axes, generator, digits=2)
        axes.set_title("generator's loss")
        return drawing.svg(figure, "losses", alt)
    figure = Figure(figsize=(10, 3.2))
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.06, right=0.865, top=0.88, bottom=0.15, wspace=0.48)
    drawing.lines(left, generator, digits=2)
    drawing.lines(right, discriminator, digits=2)
    left.set_title("generator's loss")
    right.set_title("discriminator's loss on generated images")
    return drawing.svg(figure, "losses", alt)


def utility(rows: Sequence[UtilityRow], chance: float | None, alt: str) -> str:
    """Train on synthetic, test on real: mean and standard deviation of each arm.

    Args:
        chance: accuracy of always answering the commonest class, if known. The AUC of chance is 0.5.
    """
    panels = []
    for title, floor, values in (
        ("area under the ROC curve", 0.5, [r.auc for r in rows]),
        ("accuracy", chance, [r.accuracy for r in rows]),
    ):
        lowest = min([v - d for v, d in values] + ([] if floor is None else [floor]))
        limits = (min(lowest, 0.5) - 0.02, max(1.0, max(v + d for v, d in values)) + 0.06)
        panels.append(_Panel(title, values, 3, limits, floor))
    return _dots("utility", rows, panels, alt)


def similarity(rows: Sequence[SimilarityRow], alt: str) -> str:
    """Image to image: how near each arm's outputs come to their targets."""
    panels = []
    for title, digits, least, values in (
        ("PSNR, dB", 1, 1.0, [r.psnr for r in rows]),
        ("SSIM", 3, 0.02, [r.ssim for r in rows]),
    ):  # `least` to be seen: what differs by less is not to look different
        span = max(max(values) - min(values), least)
        limits = (min(values) - 0.15 * span, max(values) + 0.3 * span)
        panels.append(_Panel(title, [(v, 0.0) for v in values], digits, limits))
    return _dots("similarity", rows, panels, alt)


# ---- parts


@matplotlib.rc_context(drawing.STYLE)
def _dots(name: str, rows: Sequence[UtilityRow | SimilarityRow], panels: Sequence[_Panel], alt: str) -> str:
    """One line for each row, one panel for each measure."""
    figure = Figure(figsize=(10, 0.9 + 0.34 * len(rows)))
    drawn = figure.subplots(1, len(panels), sharey=True)
    heights = list(range(len(rows)))[::-1]
    for axes, panel in zip(drawn, panels, strict=True):
        for height, row, (mean, deviation) in zip(heights, rows, panel.values, strict=True):
            axes.errorbar(mean, height, xerr=deviation or None, color=row.colour, marker="o", markersize=5)
            axes.annotate(
                f"{mean:.{panel.digits}f}", (mean + deviation, height), xytext=(6, 0),
                textcoords="offset points", va="center",
                bbox={"facecolor": PAGE, "edgecolor": "none", "pad": 0.5},
            )  # fmt: skip
        axes.set_xlim(*panel.limits)
        if panel.floor is not None:
            axes.axvline(panel.floor, color=MUTED, linewidth=1, dashes=(2, 3))
            axes.annotate(
                "chance", (panel.floor, 1), xycoords=("data", "axes fraction"), xytext=(4, -8),
                textcoords="offset points", color=MUTED,
            )  # fmt: skip
        axes.set_ylim(-0.6, len(rows) - 0.1)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.grid(visible=False)
        axes.set_title(panel.title)
    drawn[0].set_yticks(heights, [drawing.clean(row.label, 36) for row in rows], color=INK)
    for axes in drawn[1:]:
        axes.tick_params(left=False)
    top = 1 - 0.4 / figure.get_figheight()
    figure.subplots_adjust(left=0.27, right=0.99, top=top, bottom=0.3 / figure.get_figheight(), wspace=0.08)
    return drawing.svg(figure, name, alt)


def _stack(axes: Axes, rounds: Sequence[int], layers: Sequence[Sequence[float]]) -> None:
    """Stacked bars in the colours of the phases; areas where there are many rounds."""
    if len(rounds) > MANY_ROUNDS:
        axes.stackplot(rounds, *layers, colors=drawing.PHASES, linewidth=0)
    else:
        base = [0.0] * len(rounds)
        for layer, colour in zip(layers, drawing.PHASES, strict=True):
            axes.bar(rounds, layer, bottom=base, color=colour, width=0.72, edgecolor=PAGE, linewidth=0.5)
            base = [b + v for b, v in zip(base, layer, strict=True)]
    drawing.round_axis(axes, rounds, edge=0.5)
