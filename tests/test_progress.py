"""Progress follows a run that is written while it looks, and never stands in its way."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_record import RunWriter, append, make_study

from fedmedgan.simulations import progress
from fedmedgan.simulations.progress import Progress

STUDY = make_study(rounds=5, images={"size": 28})


@pytest.fixture
def run(tmp_path: Path) -> RunWriter:
    return RunWriter(tmp_path / "run", STUDY)


def plain() -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, width=80, highlight=False), text


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within 10 s"
        time.sleep(0.02)


def test_a_line_for_each_finished_round(run: RunWriter) -> None:
    console, text = plain()
    shown = Progress(run.folder, STUDY, console)
    shown.start()
    run.open()
    for number in range(1, 5):
        run.round(number)
    run.round(5, apply=False)
    run.close(4, "quorum")
    shown.stop()
    lines = text.getvalue().splitlines()
    assert lines[0] == (
        "round 1/5  local 4.2 s  sum 0.023 s  apply 0.31 s  up 4 x 412 kB  down 820 kB"
        "  epsilon north 3.56, south 3.51, east 3.46, west 3.41 of 8"
    )
    assert lines[3].startswith("round 4/5  local 4.2 s  sum 0.021 s  apply 0.31 s  up 3 x 412 kB  down")
    assert lines[3].endswith("missing east")
    assert lines[4:] == ["closed after 4 of 5 rounds (quorum)"]


def test_a_round_is_shown_while_the_run_goes_on(run: RunWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "POLL_SECONDS", 0.01)
    console, text = plain()
    shown = Progress(run.folder, STUDY, console)
    shown.start()
    try:
        run.open()
        run.round(1)
        wait_until(lambda: "round 1/5" in text.getvalue())
        run.round(2)
        wait_until(lambda: "round 2/5" in text.getvalue())
    finally:
        shown.stop()
    assert text.getvalue().count("round 1/5") == 1


def test_rounds_that_are_read_together_keep_their_own_epsilon(run: RunWriter) -> None:
    run.open()
    for number in (1, 2, 3):
        run.round(number)
    console, text = plain()
    shown = Progress(run.folder, STUDY, console)
    shown.start()
    shown.stop()
    ends = [line.split("epsilon ")[1].split(",")[0] for line in text.getvalue().splitlines()]
    assert ends == ["north 3.56", "north 5.03", "north 6.16"]


def test_different_ceilings_and_sizes_are_told_apart(run: RunWriter) -> None:
    for site, epsilon, ceiling in (("north", 1.0, 2.0), ("south", 1.5, 8.0), ("west", 0.5, 8.0)):
        fields = {"steps": 30, "seconds": 1.0, "generator_loss": 1.0, "discriminator_fake_loss": 1.0}
        fields |= {"epsilon": epsilon, "ceiling": ceiling, "noise_multiplier": 1.0, "sampling_rate": 0.1}
        fields["checks"] = dict.fromkeys(("noise", "clipping", "rows", "sampling"), "passed")
        fields["method"] = "hooks"
        run.say_at(site, "trained", round=1, **fields)
    cohort = ["north", "south", "west"]
    run.say("round_opened", round=1, attempt=1, cohort=cohort)
    for site, size in zip(cohort, (1000, 2000, 3000), strict=True):
        run.say("update_accepted", round=1, attempt=1, site=site, bytes_up=size, generator_loss=1.0)
    seconds = {"local": 75.2, "aggregation": 0.0}
    run.say("round_aggregated", round=1, attempt=1, cohort=cohort, bytes_down=2_500_000, seconds=seconds)
    end: dict[str, Any] = {"model_hash": "ab" * 32, "generator_loss": 1.0, "seconds": {"broadcast": 0.0001}}
    run.say("round_applied", round=1, sites=cohort, **end)
    console, text = plain()
    shown = Progress(run.folder, STUDY, console)
    shown.start()
    shown.stop()
    assert text.getvalue() == (
        "round 1/5  local 75 s  sum 0 s  apply under 0.001 s  up 6 kB from 3  down 2.5 MB"
        "  epsilon north 1.00 of 2, south 1.50 of 8, west 0.50 of 8\n"
    )


def test_a_terminal_gets_bars(run: RunWriter) -> None:
    text = io.StringIO()
    shown = Progress(run.folder, STUDY, Console(file=text, force_terminal=True, width=120))
    shown.start()
    run.open()
    run.round(1)
    run.say("round_opened", round=2, attempt=1, cohort=["north", "south", "west"])
    run.accept("north", 2, 1)
    fields = {"round": 2, "attempt": 1, "site": "west", "reason": "RUN_TIMEOUT"}
    run.say("site_missing", **fields)
    shown.stop()
    drawn = text.getvalue()
    assert "round 1/5" in drawn
    assert "1 local gradients, encrypted: 1 of 3" in drawn
    assert "epsilon 3.56 of 8" in drawn
    assert "missing" in drawn
    assert "up 4 x 412 kB  down 820 kB" in drawn
    assert "━" in drawn
    assert drawn.endswith("\x1b[?25h"), "the cursor is shown again"


@pytest.mark.parametrize("terminal", [True, False])
def test_without_privacy_that_is_said_and_no_epsilon(tmp_path: Path, terminal: bool) -> None:
    study = make_study(rounds=2, images={"size": 28}, privacy="none")
    run, text = RunWriter(tmp_path / "run", study), io.StringIO()
    shown = Progress(run.folder, study, Console(file=text, force_terminal=terminal, width=120, highlight=False))
    shown.start()
    run.open()
    run.round(1)
    shown.stop()
    assert "WITHOUT privacy" in text.getvalue()
    assert "epsilon" not in text.getvalue()


def test_a_damaged_log_ends_the_display_but_not_the_run(run: RunWriter) -> None:
    console, text = plain()
    append(run.folder / "events.jsonl", "unheard_of", 1.0)
    shown = Progress(run.folder, STUDY, console)
    shown.start()
    shown.stop()
    assert text.getvalue().startswith("progress is not shown any further: error[RUN_RECORD]")


def test_nothing_to_see_and_never_started(tmp_path: Path) -> None:
    console, text = plain()
    shown = Progress(tmp_path / "nowhere", STUDY, console)
    shown.start()
    shown.stop()
    shown.stop()
    Progress(tmp_path, STUDY, console).stop()
    assert text.getvalue() == ""
