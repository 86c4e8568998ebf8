"""Shows a run while it goes on, by following the event files that the parties write anyway.

On a terminal: a bar for the rounds, what the cycle is doing, a bar for each hospital's epsilon, and the last
round's figures. Anywhere else: one plain line for each finished round. Of a study without privacy it says that.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedmedgan.shared.errors import FedMedGanError
from fedmedgan.shared.study import Study
from fedmedgan.simulations.events import (
    CoordinatorEvent,
    RoundAggregated,
    RoundApplied,
    RoundOpened,
    RunClosed,
    RunOpened,
    SiteMissing,
    Trained,
    UpdateAccepted,
)
from fedmedgan.simulations.record import EventFile, bytes_text, seconds_text

POLL_SECONDS = 0.3
NO_PRIVACY = "WITHOUT privacy"


class Progress:
    """Follows a run folder in a thread of its own. It only reads, and whatever it meets, the run goes on.

    Args:
        run_folder: need not hold any file yet.
        study: the study of the run.
        console: where to write; stderr if not given.
    """

    def __init__(self, run_folder: Path, study: Study, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._state = _State(study)
        self._coordinator = EventFile.of_coordinator(run_folder)
        self._hospitals = {s.name: EventFile.of_hospital(run_folder, s.name) for s in study.sites}
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)

    def start(self) -> None:
        """Begin to follow."""
        if self._live:
            self._live.start()
        self._thread.start()

    def stop(self) -> None:
        """Show what was written until now, and end. May be called again, or without `start`."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        if self._live:
            self._live.stop()

    def _follow(self) -> None:
        try:
            while not self._stop.wait(POLL_SECONDS):
                self._show_news()
            self._show_news()
        except (FedMedGanError, OSError) as error:
            self._console.print(f"progress is not shown any further: {error}", markup=False, soft_wrap=True)

    def _show_news(self) -> None:
        # The coordinator speaks of a round after the hospitals did. Read in this order, their part is there.
        news = self._coordinator.new()
        for name, file in self._hospitals.items():
            for own in file.new():
                if isinstance(own, Trained):
                    self._state.trained.setdefault(name, {})[own.round] = own
        for event in news:
            line = self._state.take(event)
            if line and not self._live:
                self._console.print(line, markup=False, soft_wrap=True)
        if self._live:
            self._live.update(self._state.drawing(), refresh=True)


@dataclass
class _State:
    """What is known of the run at this moment."""

    study: Study
    phase: str = "waiting for the hospitals"
    rounds_done: int = 0
    trained: dict[str, dict[int, Trained]] = field(default_factory=dict)
    """site -> round -> event"""
    bytes_up: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    cohort: int = 0
    aggregated: RoundAggregated | None = None
    last_round: str = ""

    def take(self, event: CoordinatorEvent) -> str:
        """Note an event; returns the line to print, if it ends something."""
        if isinstance(event, RunOpened):
            self.phase = "all hospitals are there"
        elif isinstance(event, RoundOpened):
            if event.attempt == 1:
                self.missing = []
            self.bytes_up, self.cohort = {}, len(event.cohort)
            self.phase = f"1 local gradients, encrypted: 0 of {self.cohort}"
        elif isinstance(event, UpdateAccepted):
            self.bytes_up[event.site] = event.bytes_up
            self.phase = f"1 local gradients, encrypted: {len(self.bytes_up)} of {self.cohort}"
        elif isinstance(event, SiteMissing):
            self.missing.append(event.site)
        elif isinstance(event, RoundAggregated):
            self.aggregated = event
            self.phase = "3 broadcast, 4 decrypt and update"
        elif isinstance(event, RoundApplied):
            return self._finish(event)
        elif isinstance(event, RunClosed):
            self.phase = f"closed ({event.reason})"
            return f"closed after {self.rounds_done} of {self.study.training.rounds} rounds ({event.reason})"
        return ""

    def _finish(self, event: RoundApplied) -> str:
        self.rounds_done = event.round
        self.phase = "round finished"
        parts = [f"round {event.round}/{self.study.training.rounds}"]
        if self.aggregated:
            seconds = self.aggregated.seconds
            parts += [f"local {seconds_text(seconds.local)}", f"sum {seconds_text(seconds.aggregation)}"]
        parts.append(f"apply {seconds_text(event.seconds.broadcast)}")
        if self.aggregated:
            parts += [f"up {self._up()}", f"down {bytes_text(self.aggregated.bytes_down)}"]
        self.last_round = "  ".join(parts)
        spent = {s.name: t for s in self.study.sites if (t := self._spent(s.name, event.round))}
        if not self.study.is_private:
            parts.append(NO_PRIVACY)
        elif spent:
            parts.append(f"epsilon {_epsilons(spent)}")
        if self.missing:
            parts.append("missing " + ", ".join(sorted(set(self.missing))))
        return "  ".join(parts)

    def _up(self) -> str:
        sizes = set(self.bytes_up.values())
        if len(sizes) == 1:
            return f"{len(self.bytes_up)} x {bytes_text(sizes.pop())}"
        return f"{bytes_text(sum(self.bytes_up.values()))} from {len(self.bytes_up)}"

    def _spent(self, site: str, number: int) -> tuple[float, float] | None:
        """Epsilon and ceiling after the latest training up to that round; later ones may have been read already."""
        events = [e for e in self.trained.get(site, {}).values() if e.round <= number]
        last = max(events, key=lambda e: e.round, default=None)
        if last is None or last.epsilon is None or last.ceiling is None:
            return None
        return last.epsilon, last.ceiling

    def drawing(self) -> RenderableType:
        """The display of a terminal."""
        rounds = self.study.training.rounds
        table = Table.grid(padding=(0, 2))
        table.add_row(
            Text(self.study.name, style="bold"),
            ProgressBar(rounds, self.rounds_done, 30, complete_style="cyan", finished_style="green"),
            Text(f"round {self.rounds_done}/{rounds}"),
            Text(self.phase, style="dim"),
        )
        for site in self.study.sites:
            note = Text("missing", style="red") if site.name in self.missing else Text("")
            if not self.study.is_private:
                table.add_row(Text(f"  {site.name}"), Text(""), Text(NO_PRIVACY, style="bold red"), note)
                continue
            spent, ceiling = self._spent(site.name, rounds) or (0.0, self.study.privacy.epsilon)
            bar = ProgressBar(total=ceiling, completed=spent, width=30, complete_style="yellow", finished_style="red")
            table.add_row(Text(f"  {site.name}"), bar, Text(f"epsilon {spent:.2f} of {ceiling:g}"), note)
        return Group(table, Text(self.last_round, style="dim")) if self.last_round else table


def _epsilons(spent: dict[str, tuple[float, float]]) -> str:
    """``north 2.10, south 2.05 of 8``"""
    ceilings = {ceiling for _, ceiling in spent.values()}
    if len(ceilings) == 1:
        words = ", ".join(f"{name} {epsilon:.2f}" for name, (epsilon, _) in spent.items())
        return f"{words} of {ceilings.pop():g}"
    return ", ".join(f"{name} {epsilon:.2f} of {ceiling:g}" for name, (epsilon, ceiling) in spent.items())
