"""Several studies in one simulation of Flower, one after the other: an engine takes half a minute to start.

    python one_simulation.py FOLDER STUDY.toml...

Of each study FOLDER/NAME is a run folder as `fedmedgan simulate` leaves it, on phantoms that all studies share. A study
that fails leaves FOLDER/NAME/error.txt, and the next one is run, unless the hospitals are gone.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from pathlib import Path

from fedmedgan.client import app as client
from fedmedgan.server import app as server
from fedmedgan.shared.errors import FedMedGanError
from fedmedgan.shared.study import Study, load
from fedmedgan.simulations import consortium, phantoms, report

WEIGHTS = "initial.safetensors"
"""In FOLDER: what studies start from that name weights."""


def prepare(folder: Path, study: Study) -> Path:
    """One study's run folder, as `experiment.run` makes it."""
    run, data = folder / study.name, {}
    for number, site in enumerate(study.sites):
        place = folder / f"phantoms-{'paired' if study.images.paired else 'single'}" / site.name
        if not place.exists():
            vendor = phantoms.vendor_for(number)
            options = {"size": 32, "paired": study.images.paired}
            phantoms.write_hospital(place, patients=site.patients, seed=number, vendor=vendor, **options)
        data[site.name] = place
    weights = folder / WEIGHTS if study.gan.pretrained else None
    consortium.read_data(run, consortium.prepare(study, run, data, weights=weights, device="cpu"))
    return run


def main(folder: Path, studies: list[Study]) -> None:
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    now = folder / "now"
    runs = [prepare(folder, study) for study in studies]

    def home(context: Context) -> Path:
        run = folder / now.read_text()
        return run / "hospitals" / studies[0].sites[int(context.node_config["partition-id"])].name

    server_app = ServerApp()

    @server_app.main()
    def all_of_them(grid: Grid, context: Context) -> None:
        for run in runs:
            now.write_text(run.name)
            try:
                server.run(grid, run)
            except FedMedGanError as error:
                (run / "error.txt").write_text(traceback.format_exc())
                if error.code == "RUN_QUORUM":
                    raise

    logger = logging.getLogger("flwr")
    logger.handlers, logger.propagate = [logging.FileHandler(folder / "flower.log")], False
    init = {"log_to_driver": False, "logging_level": logging.ERROR, "num_cpus": os.cpu_count(), "address": "local"}
    init |= {"object_store_memory": 128 << 20}
    run_simulation(
        server_app=server_app,
        client_app=client.make_app(home),
        num_supernodes=len(studies[0].sites),
        backend_config={"init_args": init, "client_resources": {"num_cpus": 1, "num_gpus": 0}},
    )
    for run in runs:
        report.write(run)


if __name__ == "__main__":
    os.environ.update(RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
    main(Path(sys.argv[1]), [load(Path(path)) for path in sys.argv[2:]])
