"""``fedmedgan``: parse, call, print. Each command group is one file beside this one."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from typing import Annotated

# Nobody outside learns that a study runs: set before anything imports Flower or Ray.
os.environ.update(FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1", RAY_USAGE_STATS_ENABLED="0")

import click
import typer

from fedmedgan.cli import (
    agreement,
    anomaly,
    audit,
    consortium,
    dataset,
    evaluate,
    extractor,
    kit,
    output,
    owner,
    pretrain,
    server,
    simulate,
    site,
    study,
)
from fedmedgan.shared.errors import FedMedGanError, RunError

app = typer.Typer(
    name="fedmedgan",
    help="Hospitals train one generator of synthetic medical images together, and share no image.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
study.app.command()(agreement.assemble)
study.app.command()(agreement.sign)
study.app.command()(agreement.collect)
app.add_typer(study.app, name="study")
app.add_typer(kit.app, name="kit")
app.add_typer(server.app, name="server")
site.app.command()(evaluate.evaluate)
site.app.command()(extractor.extractor)
site.app.command()(anomaly.anomaly)
app.add_typer(site.app, name="site")
app.add_typer(owner.app, name="owner")
app.add_typer(dataset.app, name="dataset")
app.add_typer(audit.app, name="audit")
app.command()(simulate.simulate)
app.command()(consortium.consortium)
app.command()(pretrain.pretrain)


class Format(StrEnum):
    human = "human"
    json = "json"


@app.callback()
def options(
    format: Annotated[Format, typer.Option(help="Text for people, or one JSON envelope.")] = Format.human,
) -> None:
    output.use_format(format.value)


def run() -> None:
    """Entry point: an error of ours, a mistyped command, or a missing part is one line and exit code 2."""
    try:
        sys.exit(app(standalone_mode=False))
    except click.exceptions.NoArgsIsHelpError:  # the help was printed already
        sys.exit(2)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "fedmedgan"
        hint = f"`{command} --help` shows what can be given"
        output.emit_error(RunError("RUN_USAGE", error.format_message().rstrip("."), command, hint))
        sys.exit(2)
    except click.exceptions.Abort:  # Ctrl-C, or no answer to a question
        sys.exit(1)
    except FedMedGanError as error:
        output.emit_error(error)
        sys.exit(2)
    except ModuleNotFoundError as error:
        hint = "pip install 'fedmedgan[simulation]'"
        output.emit_error(RunError("RUN_EXTRA", f"{error.name} is not installed", hint=hint))
        sys.exit(2)
