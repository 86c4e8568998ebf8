"""Charts of the report: inline SVG that follows the page's colour scheme and needs no script.

Matplotlib draws with stand-in colours, and `_svg` puts CSS variables in their place: one drawing serves the light
page, the dark page and print. Text stays text. Equal input gives equal bytes.

Every function takes plain numbers and returns one ``<svg>`` element. Charts are 10 inches wide; a page of 960
pixels shows them at full size with 13-pixel text.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Series = Mapping[str, Sequence[tuple[int, float]]]
"""name -> (round, value) in the order of the rounds"""

N_COLOURS = 8
"""Hospitals beyond the eighth take the colours again, with a dashed line."""
MANY_ROUNDS = 40
"""From here on lines carry no markers, and bars become areas."""

INK, MUTED, GRID, ALARM, PAGE = "#010101", "#010102", "#010103", "#010104", "#010105"
_SITES = tuple(f"#0201{i:02x}" for i in range(N_COLOURS))
_PHASES = tuple(f"#0301{i:02x}" for i in range(1, 5))
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    ALARM: "--alarm",
    PAGE: "--page",
    **{colour: f"--site-{i}" for i, colour in enumerate(_SITES)},
    **{colour: f"--phase-{i}" for i, colour in enumerate(_PHASES, 1)},
}

_STYLE = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9.75,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9.75,
    "axes.titlesize": 9.75,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.linewidth": 0.75,
    "grid.color": GRID,
    "grid.linewidth": 0.75,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.75,
    "lines.markersize": 4,
    "figure.facecolor": "none",
    "hatch.linewidth": 0.6,
}


def site_colour(index: int) -> str:
    """CSS colour of a hospital, by its place in the roster; the same everywhere in the report."""
    return f"var(--site-{index % N_COLOURS})"


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
    """A stand-in colour: INK, MUTED, ALARM or `stand_in(index)`."""
    auc: tuple[float, float]
    accuracy: tuple[float, float]
    """mean, standard deviation"""


def stand_in(index: int) -> str:
    """Stand-in colour of a hospital, for `UtilityRow`."""
    return _SITES[index % N_COLOURS]


@matplotlib.rc_context(_STYLE)
def epsilon(series: Series, ceilings: Mapping[str, float], alt: str) -> str:
    """Privacy spent over the rounds, below the ceiling; one dashed line for each distinct ceiling."""
    figure, axes = _figure(3.5)
    highest = max([*ceilings.values(), *(value for points in series.values() for _, value in points)])
    _lines(axes, series, digits=2, top=1.14 * highest)
    for ceiling in sorted(set(ceilings.values())):
        axes.axhline(ceiling, color=ALARM, linewidth=1.25, dashes=(5, 3))
        axes.annotate(
            f"budget {ceiling:g}", (0, ceiling), xycoords=("axes fraction", "data"), xytext=(2, 4),
            textcoords="offset points", color=ALARM,
        )  # fmt: skip
    axes.set_title("epsilon spent on each patient, after each round")
    return _svg(figure, "epsilon", alt)


@matplotlib.rc_context(_STYLE)
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
    _end_labels(rest, middles, words, [INK] * 4)
    return _svg(figure, "phases", alt)


@matplotlib.rc_context(_STYLE)
def traffic(up: Series, down: Series, plain: int, alt: str) -> str:
    """Bytes of one hospital in one round, beside the same parameters as plaintext float32."""
    figure, axes = _figure(2.7, right=0.76)
    unit, word = (1e6, "MB") if plain >= 1e6 else (1e3, "kB")
    series = {name: [(r, v / unit) for r, v in points] for name, points in {**up, **down}.items()}
    rounds = sorted({r for points in series.values() for r, _ in points})
    names = [*series, "plaintext float32, each way"]
    colours = [INK] * len(up) + [MUTED] * len(down) + [ALARM]
    values = [*series.values(), [(r, plain / unit) for r in rounds]]
    for points, colour in zip(values, colours, strict=True):
        style = {"dashes": (5, 3), "linewidth": 1.25} if colour == ALARM else {"marker": _marker(len(rounds))}
        axes.plot(*zip(*points, strict=True), color=colour, **style)
    axes.set_ylim(0, 1.2 * max(v for points in values for _, v in points))
    _round_axis(axes, rounds)
    ends = [points[-1][1] for points in values]
    _end_labels(axes, ends, [f"{n} {e:.3g}" for n, e in zip(names, ends, strict=True)], colours)
    axes.set_title(f"one hospital, one round, {word}")
    return _svg(figure, "traffic", alt)


@matplotlib.rc_context(_STYLE)
def saturation(series: Series, alt: str) -> str:
    """Share of an update's values that were limited, in percent."""
    figure, axes = _figure(2.8)
    percent = {name: [(r, 100 * v) for r, v in points] for name, points in series.items()}
    highest = max(v for points in percent.values() for _, v in points)
    _lines(axes, percent, digits=3, top=1.15 * max(highest, 0.1))
    axes.set_title("share of an update's values that were cut, %")
    return _svg(figure, "saturation", alt)


@matplotlib.rc_context(_STYLE)
def losses(generator: Series, discriminator: Series, alt: str) -> str:
    """Two losses on generated images."""
    figure = Figure(figsize=(10, 3.2))
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.045, right=0.865, top=0.88, bottom=0.15, wspace=0.45)
    _lines(left, generator, digits=2)
    _lines(right, discriminator, digits=2)
    left.set_title("generator's loss")
    right.set_title("discriminator's loss on generated images")
    return _svg(figure, "losses", alt)


@matplotlib.rc_context(_STYLE)
def utility(rows: Sequence[UtilityRow], chance: float | None, alt: str) -> str:
    """Train on synthetic, test on real: mean and standard deviation of each arm.

    Args:
        chance: accuracy of always answering the commonest class, if known. The AUC of chance is 0.5.
    """
    figure = Figure(figsize=(10, 0.9 + 0.34 * len(rows)))
    panels = figure.subplots(1, 2, sharey=True)
    heights = list(range(len(rows)))[::-1]
    for axes, title, floor, values in (
        (panels[0], "area under the ROC curve", 0.5, [r.auc for r in rows]),
        (panels[1], "accuracy", chance, [r.accuracy for r in rows]),
    ):
        for height, row, (mean, deviation) in zip(heights, rows, values, strict=True):
            axes.errorbar(mean, height, xerr=deviation, color=row.colour, marker="o", markersize=5)
            axes.annotate(
                f"{mean:.3f}", (mean + deviation, height), xytext=(6, 0),
                textcoords="offset points", va="center",
                bbox={"facecolor": PAGE, "edgecolor": "none", "pad": 0.5},
            )  # fmt: skip
        lowest = min([v - d for v, d in values] + ([] if floor is None else [floor]))
        axes.set_xlim(min(lowest, 0.5) - 0.02, max(1.0, max(v + d for v, d in values)) + 0.06)
        if floor is not None:
            axes.axvline(floor, color=MUTED, linewidth=1, dashes=(2, 3))
            axes.annotate(
                "chance", (floor, 1), xycoords=("data", "axes fraction"), xytext=(4, -8),
                textcoords="offset points", color=MUTED,
            )  # fmt: skip
        axes.set_ylim(-0.6, len(rows) - 0.1)
        axes.grid(visible=False)
        axes.set_title(title)
    panels[0].set_yticks(heights, [_clean(row.label, 36) for row in rows], color=INK)
    panels[1].tick_params(left=False)
    top = 1 - 0.4 / figure.get_figheight()
    figure.subplots_adjust(left=0.27, right=0.99, top=top, bottom=0.3 / figure.get_figheight(), wspace=0.08)
    return _svg(figure, "utility", alt)


# ---- parts


def _figure(height: float, right: float = 0.855) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(10, height))
    axes = figure.subplots()
    figure.subplots_adjust(left=0.045, right=right, top=1 - 0.4 / height, bottom=0.5 / height)
    return figure, axes


def _marker(n_rounds: int) -> str:
    return "o" if n_rounds <= MANY_ROUNDS else ""


def _lines(axes: Axes, series: Series, *, digits: int, top: float | None = None) -> None:
    """One line a hospital, named at its end. With more hospitals than colours only the highest is named."""
    drawn = {name: (i, points) for i, (name, points) in enumerate(series.items()) if points}
    rounds = sorted({r for _, points in drawn.values() for r, _ in points})
    for index, points in drawn.values():
        axes.plot(
            *zip(*points, strict=True), color=stand_in(index), marker=_marker(len(rounds)),
            linestyle="-" if index < N_COLOURS else "--", linewidth=1.75 if len(drawn) <= N_COLOURS else 1.0,
        )  # fmt: skip
    if top is not None:
        axes.set_ylim(0, top)
    _round_axis(axes, rounds)
    named = list(drawn)
    if len(named) > N_COLOURS:
        named = [max(named, key=lambda name: drawn[name][1][-1][1])]
    ends = [drawn[name][1][-1][1] for name in named]
    words = [f"{_clean(name, 12)} {end:.{digits}f}" for name, end in zip(named, ends, strict=True)]
    _end_labels(axes, ends, words, [stand_in(drawn[name][0]) for name in named])


def _stack(axes: Axes, rounds: Sequence[int], layers: Sequence[Sequence[float]]) -> None:
    """Stacked bars in the colours of the phases; areas where there are many rounds."""
    if len(rounds) > MANY_ROUNDS:
        axes.stackplot(rounds, *layers, colors=_PHASES, linewidth=0)
    else:
        base = [0.0] * len(rounds)
        for layer, colour in zip(layers, _PHASES, strict=True):
            axes.bar(rounds, layer, bottom=base, color=colour, width=0.72, edgecolor=PAGE, linewidth=0.5)
            base = [b + v for b, v in zip(base, layer, strict=True)]
    _round_axis(axes, rounds, edge=0.5)


def _round_axis(axes: Axes, rounds: Sequence[int], edge: float = 0.0) -> None:
    edge = edge or max(0.1, 0.02 * (rounds[-1] - rounds[0]))
    axes.set_xlim(rounds[0] - edge, rounds[-1] + edge)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    axes.set_xlabel("round", loc="left")


def _end_labels(axes: Axes, ends: Sequence[float], words: Sequence[str], colours: Sequence[str]) -> None:
    """Write each line's name right of the axes at its end's height, pushed apart where they would overlap."""
    bottom, top = axes.get_ylim()
    inches = axes.get_window_extent().height / axes.figure.dpi
    gap = 0.19 * (top - bottom) / inches
    for index, height in _spread(ends, gap).items():
        lift = 72 * inches * (height - ends[index]) / (top - bottom)
        axes.annotate(
            words[index], (1, ends[index]), xycoords=("axes fraction", "data"), xytext=(6, lift),
            textcoords="offset points", color=colours[index], va="center", annotation_clip=False,
        )  # fmt: skip


def _spread(values: Sequence[float], gap: float) -> dict[int, float]:
    """Places for labels: at least `gap` apart, in the order of the values, as near as a shift allows."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    places: list[float] = []
    for index in order:
        places.append(max(values[index], places[-1] + gap) if places else values[index])
    shift = sum(p - values[i] for p, i in zip(places, order, strict=True)) / len(values)
    return {index: place - shift for place, index in zip(places, order, strict=True)}


def _clean(text: str, longest: int) -> str:
    """One printable line, cut to a length."""
    line = "".join(c if c.isprintable() else " " for c in text)
    return line if len(line) <= longest else line[: longest - 1] + "…"


def _svg(figure: Figure, name: str, alt: str) -> str:
    """Render to one ``<svg>`` element for use inside a page."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # Matplotlib needs the glyph for the layout alone; the browser has fonts of its own.
        warnings.filterwarnings("ignore", message="Glyph")
        with matplotlib.rc_context({"svg.hashsalt": name}):
            nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
            figure.savefig(buffer, format="svg", metadata=nothing)
    svg = buffer.getvalue()
    svg = re.sub(r"<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # Several drawings share a page: their ids must differ.
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = svg.replace("font-family: 'DejaVu Sans'; ", "")
    width, height = figure.get_figwidth() * 72, figure.get_figheight() * 72
    opening = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(alt)}" class="chart">'
    return opening + svg[svg.index(">") + 1 :].strip()
