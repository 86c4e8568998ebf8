"""Drawing for the pages of this project: inline SVG that follows a page's colour scheme and needs no script.

Matplotlib draws with stand-in colours, and `svg` puts CSS variables in their place: one drawing serves the light
page, the dark page and print. Text stays text. Equal input gives equal bytes. What is drawn is decided in
simulations/charts.py and audit/report.py.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

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
SITES = tuple(f"#0201{i:02x}" for i in range(N_COLOURS))
PHASES = tuple(f"#0301{i:02x}" for i in range(1, 5))
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    ALARM: "--alarm",
    PAGE: "--page",
    **{colour: f"--site-{i}" for i, colour in enumerate(SITES)},
    **{colour: f"--phase-{i}" for i, colour in enumerate(PHASES, 1)},
}

STYLE: dict[str, Any] = {
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


def stand_in(index: int) -> str:
    """Stand-in colour of a hospital, by its place in the roster."""
    return SITES[index % N_COLOURS]


def wide_figure(height: float, right: float = 0.855) -> tuple[Figure, Axes]:
    """One drawing over the whole width of the page; `height` in inches."""
    figure = Figure(figsize=(10, height))
    axes = figure.subplots()
    figure.subplots_adjust(left=0.045, right=right, top=1 - 0.4 / height, bottom=0.5 / height)
    return figure, axes


def marker(n_rounds: int) -> str:
    """A dot on each value, as long as there are few."""
    return "o" if n_rounds <= MANY_ROUNDS else ""


def lines(axes: Axes, series: Series, *, digits: int, top: float | None = None) -> None:
    """One line a hospital, named at its end. With more hospitals than colours only the highest is named."""
    drawn = {name: (i, points) for i, (name, points) in enumerate(series.items()) if points}
    rounds = sorted({r for _, points in drawn.values() for r, _ in points})
    for index, points in drawn.values():
        axes.plot(
            *zip(*points, strict=True), color=stand_in(index), marker=marker(len(rounds)),
            linestyle="-" if index < N_COLOURS else "--", linewidth=1.75 if len(drawn) <= N_COLOURS else 1.0,
        )  # fmt: skip
    if top is not None:
        axes.set_ylim(0, top)
    round_axis(axes, rounds)
    named = list(drawn)
    if len(named) > N_COLOURS:
        named = [max(named, key=lambda name: drawn[name][1][-1][1])]
    ends = [drawn[name][1][-1][1] for name in named]
    words = [f"{clean(name, 12)} {end:.{digits}f}" for name, end in zip(named, ends, strict=True)]
    end_labels(axes, ends, words, [stand_in(drawn[name][0]) for name in named])


def round_axis(axes: Axes, rounds: Sequence[int], edge: float = 0.0) -> None:
    """Whole rounds along the bottom."""
    edge = edge or max(0.1, 0.02 * (rounds[-1] - rounds[0]))
    axes.set_xlim(rounds[0] - edge, rounds[-1] + edge)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    axes.set_xlabel("round", loc="left")


def end_labels(axes: Axes, ends: Sequence[float], words: Sequence[str], colours: Sequence[str]) -> None:
    """Write each line's name right of the axes at its end's height, pushed apart where they would overlap."""
    bottom, top = axes.get_ylim()
    inches = axes.get_window_extent().height / axes.figure.dpi
    gap = 0.19 * (top - bottom) / inches
    for index, height in spread(ends, gap).items():
        lift = 72 * inches * (height - ends[index]) / (top - bottom)
        axes.annotate(
            words[index], (1, ends[index]), xycoords=("axes fraction", "data"), xytext=(6, lift),
            textcoords="offset points", color=colours[index], va="center", annotation_clip=False,
        )  # fmt: skip


def spread(values: Sequence[float], gap: float) -> dict[int, float]:
    """Places for labels: at least `gap` apart, in the order of the values, as near as a shift allows."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    places: list[float] = []
    for index in order:
        places.append(max(values[index], places[-1] + gap) if places else values[index])
    shift = sum(p - values[i] for p, i in zip(places, order, strict=True)) / len(values)
    return {index: place - shift for place, index in zip(places, order, strict=True)}


def clean(text: str, longest: int) -> str:
    """One printable line, cut to a length."""
    line = "".join(c if c.isprintable() else " " for c in text)
    return line if len(line) <= longest else line[: longest - 1] + "…"


def svg(figure: Figure, name: str, alt: str) -> str:
    """Render to one ``<svg>`` element for use inside a page.

    Args:
        name: put before the ids inside, so that several drawings can share a page.
        alt: what a reader who cannot see the drawing is told.
    """
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # Matplotlib needs the glyph for the layout alone; the browser has fonts of its own.
        warnings.filterwarnings("ignore", message="Glyph")
        with matplotlib.rc_context({"svg.hashsalt": name}):
            nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
            figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = re.sub(r"<style.*?</style>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # Several drawings share a page: their ids must differ.
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    text = text.replace("font-family: 'DejaVu Sans'; ", "")
    width, height = figure.get_figwidth() * 72, figure.get_figheight() * 72
    opening = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(alt)}" class="chart">'
    return opening + text[text.index(">") + 1 :].strip()
