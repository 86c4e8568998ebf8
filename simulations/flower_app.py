"""The simulated consortium as a Flower app: run by `fedmedgan simulate`, and by ``flwr run .``.

Messages, crypto and ledger are the deployed ones; only the place of the home folders differs.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedmedgan.client import app as client
from fedmedgan.server import app as server
from fedmedgan.shared.agreement import Agreement
from fedmedgan.shared.errors import RunError
from fedmedgan.shared.eventlog import EventLog
from fedmedgan.shared.messages import Envelope, RoundOpen, parse
from fedmedgan.shared.study import Study, load
from fedmedgan.simulations import DEFAULT_STUDY, consortium, report


def client_app_for(
    run_folder: Path, study: Study, *, insecure_seed: int | None = None, drops: Collection[tuple[str, int]] = ()
) -> ClientApp:
    """A ClientApp that plays hospital number ``partition-id`` of the roster.

    Args:
        drops: (site, round) pairs in which the hospital's process dies instead of answering.
    """
    names = [site.name for site in study.sites]

    def site_of(context: Context) -> str:
        return names[int(context.node_config["partition-id"])]

    def placed(message: Message, context: Context, call_next: Callable) -> Message:
        """Note which Ray node answers for which hospital, and die where the simulation was told to."""
        envelope = Envelope.from_record(message.content, client.MAX_PAYLOAD_BYTES)
        if envelope.kind == RoundOpen.__name__:
            import ray

            site, number = site_of(context), parse(envelope.header, RoundOpen).round
            node = ray.get_runtime_context().get_node_id()
            EventLog(run_folder / "placement.jsonl").write("placed", site=site, round=number, node=node)
            if (site, number) in drops:
                raise RuntimeError("dropped, as the simulation was told")
        return call_next(message, context)

    def home(context: Context) -> Path:
        return consortium.home_of(run_folder, site_of(context))

    return client.make_app(home, insecure_seed=insecure_seed, mods=[placed])


def run(
    run_folder: Path,
    study: Study,
    *,
    ray_address: str | None = None,
    insecure_seed: int | None = None,
    drops: Collection[tuple[str, int]] = (),
) -> None:
    """Run a prepared consortium on Flower's simulation engine (Ray), to the end.

    Args:
        ray_address: an existing Ray cluster; its nodes must see the run folder and have fedmedgan installed.

    Raises:
        RunError, ModelError: see fedmedgan.server.cycle.Coordinator.
    """
    from flwr.simulation import run_simulation  # takes seconds to import, and nobody else needs it

    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # the behaviour that Ray announces, without the announcement
    _log_to(run_folder / "flower.log")
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        server.run(grid, run_folder)

    init: dict = {"log_to_driver": False, "logging_level": logging.ERROR}
    if ray_address is None:
        init |= {"num_cpus": os.cpu_count(), "object_store_memory": 256 << 20, "address": "local"}
    else:
        init["address"] = ray_address
    try:
        run_simulation(
            server_app=server_app,
            client_app=client_app_for(run_folder, study, insecure_seed=insecure_seed, drops=drops),
            num_supernodes=len(study.sites),
            backend_config={"init_args": init, "client_resources": _resources(len(study.sites))},
        )
    except (RuntimeError, ConnectionError) as error:
        raise RunError("RUN_FLOWER", f"Flower's engine stopped: {error}", str(run_folder / "flower.log")) from error


def _resources(n_sites: int) -> dict[str, int | float]:
    """One core a hospital, and a fair share of the GPUs that there are."""
    import torch

    gpus = torch.cuda.device_count()
    at_once = min(n_sites, os.cpu_count() or 1)
    return {"num_cpus": 1, "num_gpus": min(1.0, round(gpus / at_once, 2))}


def _log_to(path: Path) -> None:
    """Flower's own log goes to a file: the console belongs to the progress display."""
    logger = logging.getLogger("flwr")
    logger.handlers = [logging.FileHandler(path)]
    logger.propagate = False


# ---- `flwr run .`: settings are in pyproject.toml, [tool.flwr.app.config]


def _flwr_run_folder(context: Context) -> Path:
    base = str(context.run_config.get("runs-folder") or Path.home() / "fedmedgan-runs")
    return Path(base) / f"flwr-{context.run_id}"


def _flwr_home(context: Context) -> Path:
    run_folder = _flwr_run_folder(context)
    study = Agreement.load(run_folder / "study.json").study
    return consortium.home_of(run_folder, study.sites[int(context.node_config["partition-id"])].name)


server_app = ServerApp()
client_app = client.make_app(_flwr_home)


@server_app.main()
def _main(grid: Grid, context: Context) -> None:
    study = load(Path(str(context.run_config.get("study") or DEFAULT_STUDY)))
    nodes, sites = len(list(grid.get_node_ids())), len(study.sites)
    if nodes < sites:
        hint = f"flwr run . --federation-config 'num-supernodes={sites} client-resources-num-cpus=1'"
        raise RunError("RUN_QUORUM", f"{nodes} SuperNodes for {sites} hospitals", "flwr run", hint=hint)
    run_folder = _flwr_run_folder(context)
    study = consortium.prepare(study, run_folder, {})
    consortium.read_data(run_folder, study)
    server.run(grid, run_folder)
    print(f"report: {report.write(run_folder)}")
