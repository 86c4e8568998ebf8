"""The docs say what is: every error has its runbook entry, links lead somewhere, commands and tests exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
import typer
from test_recipes import recipe_of_the_page, study_of, trainer_of, weights_of

from fedmedgan.cli.main import app
from fedmedgan.client import gans
from fedmedgan.client.training.estimate import refuse_mixing
from fedmedgan.shared.errors import HINTS
from fedmedgan.shared.privacy.records import failed_checks

ROOT = Path(__file__).parents[1]
DOCS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
COMMAND_PAGES = [*DOCS, *sorted((ROOT / "deploy" / "templates").glob("*"))]
COMMANDS = typer.main.get_command(app)
CODE_BLOCK = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
END_OF_COMMAND = {"&&", "||", "|", ";", "&", ">", "<"}


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


# ---- the runbook


def runbook_codes(text: str) -> list[str]:
    return re.findall(r"^### ([A-Z][A-Z_]+)$", text, re.MULTILINE)


def test_every_code_has_one_entry_in_the_runbook_in_the_order_of_errors():
    assert runbook_codes((ROOT / "docs" / "runbook.md").read_text()) == list(HINTS)


def test_an_entry_says_who_sees_it_and_what_to_do():
    text = (ROOT / "docs" / "runbook.md").read_text()
    text = re.sub(r"\*Seen\s+by\*", "*Seen by*", text)
    entries = dict(zip(runbook_codes(text), re.split(r"^### .*\n", text, flags=re.MULTILINE)[1:], strict=True))
    of_data = ("DATA_", "DICOM_")  # who sees these is said once, above them
    assert not [code for code, entry in entries.items() if "*Do:*" not in entry]
    assert not [code for code, entry in entries.items() if "*Seen by*" not in entry and not code.startswith(of_data)]


# ---- links


def anchors(text: str) -> set[str]:
    """As GitHub makes them: lower case, punctuation gone, spaces to hyphens."""
    titles = re.findall(r"^#+ (.+)$", CODE_BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", DOCS, ids=named)
def test_every_relative_link_leads_somewhere(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        target, _, anchor = link.partition("#")
        if "://" in link:
            continue
        path = (page.parent / target) if target else page
        if not path.exists() or (anchor and anchor not in anchors(path.read_text())):
            broken.append(link)
    assert not broken


def test_every_page_can_be_found_from_another():
    linked = set()
    for page in DOCS:
        for link in re.findall(r"\]\(([^)\s#]+)", page.read_text()):
            linked.add((page.parent / link).resolve())
    pages = [page for page in DOCS if page.name != "README.md" and "decisions" not in page.parts]
    assert not [named(page) for page in pages if page.resolve() not in linked and page.parent.resolve() not in linked]


# ---- commands


def commands_of(text: str) -> list[list[str]]:
    """The words of every ``fedmedgan ...`` in code blocks, in code spans and in the lines of units and containers."""
    blocks = CODE_BLOCK.findall(text)
    spans = re.findall(r"`([^`\n]+)`", CODE_BLOCK.sub("", text))
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()] + spans
    lines += re.findall(r"^ExecStart=(.*)$", text, re.MULTILINE)
    if entry := re.search(r"^CMD \[(.*)\]$", text, re.MULTILINE):
        lines.append("fedmedgan " + entry.group(1).replace(",", ""))
    return [words for line in lines if "fedmedgan" in line and (words := words_of(line))]


def words_of(line: str) -> list[str]:
    """What stands behind the program in one line of shell, [] if the program is not called in it."""
    try:
        tokens = shlex.split(line, comments=True)
    except ValueError:  # not a line of shell
        return []
    for i, token in enumerate(tokens):
        first = i == 0 or tokens[i - 1] in {*END_OF_COMMAND, "sudo"} or "=" in tokens[i - 1]
        if token.endswith("/bin/fedmedgan") or (token == "fedmedgan" and first):
            rest = tokens[i + 1 :]
            return rest[: next((k for k, word in enumerate(rest) if word in END_OF_COMMAND), len(rest))]
    return []


def problem_with(words: list[str], whole: bool) -> str:
    """Why a command would not parse, "" if it would. Unless it is a `whole` one, what is required may be left out."""
    command: click.Command = COMMANDS
    arguments = list(words)
    while isinstance(command, click.Group):
        while arguments and arguments[0].startswith("--"):
            known = {option for p in command.params for option in p.opts} | {"--help"}
            if arguments[0] not in known:
                return f"no option {arguments[0]}"
            arguments = arguments[1 if arguments[0] == "--help" else 2 :]
        if not arguments or arguments[0] in ("COMMAND", "..."):
            return ""
        name = arguments.pop(0)
        if name not in command.commands:
            return f"no command {name}"
        command = command.commands[name]
    if "--help" in arguments:
        return ""
    try:
        command.make_context(command.name, list(arguments))
    except (click.MissingParameter, click.exceptions.NoArgsIsHelpError) as error:
        return str(error) if whole else ""
    except click.UsageError as error:
        if not whole and "requires an argument" in error.format_message():
            return ""
        return error.format_message()
    return ""


@pytest.mark.parametrize("page", COMMAND_PAGES, ids=named)
def test_every_command_that_is_named_parses(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # nothing is run; a path that an option checks would be looked for here
    text = page.read_text()
    in_blocks = {tuple(words) for block in CODE_BLOCK.findall(text) for words in commands_of(f"```\n{block}```\n")}
    wrong = {}
    for words in commands_of(text):
        if problem := problem_with(words, whole=tuple(words) in in_blocks):
            wrong[" ".join(words)] = problem
    assert not wrong


def test_a_wrong_command_would_be_found():
    block = 'sudo -u fedmedgan "$VENV/bin/fedmedgan" site start --hom x   # words\nfedmedgan sites && echo fedmedgan\n'
    found = commands_of(f"```bash\n{block}sudo userdel fedmedgan\n```\n`fedmedgan site sign` by the user `fedmedgan`")
    assert found == [["site", "start", "--hom", "x"], ["sites"], ["site", "sign"]]
    assert all(problem_with(words, True) for words in found)
    assert problem_with(["site", "start"], True)
    assert not problem_with(["site", "start"], False)
    assert not problem_with(["site", "start", "--home", "h"], True)


def test_commands_are_found_where_they_should_be():
    counted = {page.name: len(commands_of(page.read_text())) for page in COMMAND_PAGES}
    for name in ("deployment.md", "runbook.md", "site.README.md", "coordinator.README.md", "fedmedgan-site.service"):
        assert counted[name] > 0, name
    assert counted["deployment.md"] >= 20


# ---- how a recipe is written


def test_the_recipe_of_the_page_is_one_file_that_trains_privately(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(recipe_of_the_page())
    monkeypatch.setattr(gans, "__path__", [*gans.__path__, str(tmp_path)])
    study = study_of("mine")
    refuse_mixing(study)
    one = trainer_of(study)
    before = weights_of(one)
    one.train(3)
    assert not any((a == b).all() for a, b in zip(before, weights_of(one), strict=True))
    assert one.checks["rows"] == one.checks["clipping"] == "passed"
    assert not failed_checks(one.checks)


# ---- the threat model


def test_the_threat_model_has_every_threat_once():
    text = (ROOT / "docs" / "threat-model.md").read_text()
    numbers = [f"T{number}" for number in range(1, 23)]
    assert re.findall(r"^### (T\d+)$", text, re.MULTILINE) == numbers
    assert re.findall(r"^\| \[(T\d+)\]", text, re.MULTILINE) == numbers


def test_every_test_that_the_threat_model_names_is_there():
    text = (ROOT / "docs" / "threat-model.md").read_text()
    wanted = re.findall(r"`(test_\w+\.py)::(test_\w+)`", text)
    assert len(wanted) >= 30
    missing = [
        f"{file}::{name}"
        for file, name in wanted
        if f"\ndef {name}(" not in (ROOT / "tests" / file).read_text(encoding="utf-8")
    ]
    assert not missing
