"""R13: every bad input of the security design's section 5, and the share that ended in the error of ours it should.

The catalogue is tests/test_bad_input.py; its cases are run by pytest, each by itself, with those of other test files
that it points at. A case holds when the exit code is 2, one line on stderr starts with the expected code, nothing was
written or lost and no marker of a patient is shown (what a person types), or when the function that meets such bytes
raises just that error of ours (everything else).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from faults.figures import Figure, at_least

NAME = "bad_input"
NOTES = ["R13: H12 of the 98 ids cannot happen here (BFV has no scale); cases are sub-cases of the other 97."]
TESTS = Path(__file__).parents[2] / "tests"
OWN = ("test_typed", "test_met", "test_at_home", "test_every_bad_dicom_file_through_the_command_line")


def measure(size: float) -> list[Figure]:
    catalogue = _catalogue()
    elsewhere = sorted({name for names in catalogue.ALREADY.values() for name in names})
    cases = _collected([*(f"test_bad_input.py::{name}" for name in OWN), *elsewhere])
    kept = at_least(size, len(cases))
    passed, run = _run(cases[:: max(1, len(cases) // kept)])
    ids = {case.id for case in catalogue.TYPED + catalogue.MET + catalogue.AT_HOME} | set(catalogue.ALREADY)
    return [
        Figure("R13_cases", run, ">= 80" if size == 1 else ""),
        Figure("R13_typed", passed / run, "== 1"),
        Figure("R13_ids", len(ids), "== 97"),
        Figure("R13_ids_not_ours", len(catalogue.NOT_OURS)),
        Figure("R13_through_the_command_line", len(catalogue.TYPED)),
    ]


def _catalogue():  # type: ignore[no-untyped-def]  # a module of tests, which are not installed
    sys.path.insert(0, str(TESTS))
    try:
        import test_bad_input
    finally:
        sys.path.remove(str(TESTS))
    return test_bad_input


def _pytest(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", *arguments]
    return subprocess.run(command, cwd=TESTS, capture_output=True, text=True, check=False)


def _collected(tests: list[str]) -> list[str]:
    """Each parametrised case by its own name."""
    listed = _pytest("--collect-only", *tests).stdout.splitlines()
    return [line.removeprefix("tests/") for line in listed if "::" in line]


def _run(cases: list[str]) -> tuple[int, int]:
    """How many cases passed, and how many were run. One that was skipped, for want of a file system, is neither."""
    with tempfile.NamedTemporaryFile(suffix=".xml") as report:
        done = _pytest(f"--junitxml={report.name}", *cases)
        results = [list(case) for case in ElementTree.parse(report.name).getroot().iter("testcase")]
    run = [result for result in results if not any(child.tag == "skipped" for child in result)]
    failed = [result for result in run if any(child.tag in ("failure", "error") for child in result)]
    if failed or not run:
        print(done.stdout[-3000:], file=sys.stderr)
    return len(run) - len(failed), max(1, len(run))
