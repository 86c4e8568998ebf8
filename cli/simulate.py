"""``fedmedgan simulate``: a consortium here, on phantoms or on folders of DICOM."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedmedgan.cli import agreement, output
from fedmedgan.cli.study import read_study
from fedmedgan.shared.errors import RunError, StudyError


def simulate(
    study_file: Annotated[
        Path | None, typer.Argument(metavar="[STUDY]", help="Study file; without one, three hospitals of phantoms.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="site=FOLDER with that site's DICOM files; sites without one get phantoms."),
    ] = None,
    data_pool: Annotated[
        Path | None, typer.Option(help="Folder of public labelled DICOM, split among all sites by patient.")
    ] = None,
    partition: Annotated[
        str | None, typer.Option(help="How --data-pool is split: iid (default), dirichlet:0.3 or quantity:1.2.")
    ] = None,
    partition_seed: Annotated[int, typer.Option(min=0, help="Another split of the same kind.")] = 0,
    test: Annotated[
        list[Path] | None, typer.Option(help="Folder of labelled DICOM of other patients, to judge images by.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder, new or empty; default runs/NAME-TIME.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Instead of the study's number of rounds.")] = None,
    arms: Annotated[
        bool | None,
        typer.Option(help="Train comparison arms, one of them WITHOUT privacy. Default: on phantoms alone."),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Initial weights, where the study names some: `fedmedgan pretrain`.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    ray_address: Annotated[
        str | None, typer.Option(help="Use this Ray cluster, e.g. 127.0.0.1:6379, instead of a local one.")
    ] = None,
    drop: Annotated[
        list[str] | None, typer.Option(help="site@round: that hospital dies in that round, to see what happens.")
    ] = None,
    insecure_seed: Annotated[
        int | None, typer.Option(min=0, help="Repeatable noise. The result is NOT private, and is marked so.")
    ] = None,
) -> None:
    """Run a whole consortium on this machine and write a report.

    Every hospital has its own folder, keys, ledger and process; messages, encryption and noise are the real ones.
    """
    # Imports of seconds (torch, Ray), so that `fedmedgan --help` answers at once.
    from fedmedgan.simulations import experiment
    from fedmedgan.simulations.partitions import Partition, Pool

    study = read_study(study_file)
    if rounds is not None:
        values = study.model_dump()
        values["training"]["rounds"] = rounds
        from fedmedgan.shared.study import from_dict

        study = from_dict(values, "--rounds")
    if device not in ("auto", "cpu", "cuda"):
        raise RunError("RUN_DEVICE", f"{device!r} is not auto, cpu or cuda", "--device")
    folders = {site: Path(folder) for site, folder in (_pair(d, "=", "--data") for d in data or [])}
    pool = None
    if data_pool is not None:
        if folders:
            raise RunError("RUN_USAGE", "both were given", "--data, --data-pool", hint="give one of them")
        pool = Pool(data_pool, Partition.parse(partition or "iid"), partition_seed)
    elif partition is not None or partition_seed:
        raise RunError("RUN_USAGE", "there is no pool to split", "--partition", hint="give --data-pool FOLDER, too")
    agreement.refuse_needless_weights(study, weights)
    drops = []
    for site, number in (_pair(d, "@", "--drop") for d in drop or []):
        study.index(site)
        if not number.isdecimal():
            raise StudyError("CONFIG_TYPE", f"{number!r} is not a round", "--drop", hint="give site@round, like west@3")
        drops.append((site, int(number)))
    run_folder = out or Path("runs") / f"{study.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    done = experiment.run(
        study,
        run_folder,
        folders,
        test_folders=test or [],
        pool=pool,
        weights=weights,
        arms=not (folders or pool) if arms is None else arms,
        device=device,
        ray_address=ray_address,
        drops=drops,
        insecure_seed=insecure_seed,
        console=Console(stderr=True, highlight=False),
    )

    def human(console: Console) -> None:
        for line in done.lines():
            console.print(line, soft_wrap=True)

    output.emit(done.as_dict(), human)


def _pair(text: str, separator: str, option: str) -> tuple[str, str]:
    left, found, right = text.partition(separator)
    if not found or not left or not right:
        form = "site=FOLDER" if separator == "=" else "site@round"
        raise StudyError("CONFIG_TYPE", f"{text!r} is not {form}", option, hint=f"give {form}")
    return left, right
