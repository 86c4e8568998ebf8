"""A hospital's SuperNode: TLS, its own key, the gate first in PATH, and nothing that the coordinator could change.

home/kit/                the start-up kit
home/flwr/               FLWR_HOME
home/flwr/gate/          the programs that Flower's executor finds first (fedmedgan.deploy.gate)
home/supernode.log       Flower's own words; what the hospital did is in events.jsonl
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from fedmedgan.deploy import gate, kits, processes
from fedmedgan.deploy.environment import BIN, environment
from fedmedgan.deploy.site_config import SiteConfig
from fedmedgan.shared.agreement import Agreement, Identity
from fedmedgan.shared.errors import RunError, StudyError

BOOK = "fedmedgan-budget-book"
KIT, LOG, LOCK = "kit", "supernode.log", "flwr/site.lock"
RESTART_SECONDS = 20.0
"""Flower refuses a key for up to 60 s after its connection was cut, and one that is not registered yet: then its
SuperNode ends, and is started again after this time, for as long as it takes."""


def init(
    kit: Path,
    home: Path,
    *,
    data: Path,
    max_epsilon: float,
    budget_book: Path | None = None,
    device: str = "auto",
    passphrase: bytes | None = None,
) -> Identity:
    """Make a hospital's home from its kit: rules, keys, and the kit itself. Writes NAME.identity.json into it.

    Args:
        budget_book: folder that all homes of this hospital share; `BOOK` beside the home by default.

    Raises:
        RunError: KIT_*, RUN_PATH. StudyError: CONFIG_TYPE.
    """
    from fedmedgan.client import joining

    kits.require_unchanged(kit)
    site = SiteConfig.load(kit).site
    if not data.is_dir():
        raise RunError("SITE_DATA", "the data folder is not there", str(data), hint="give the folder with DICOM files")
    identity = joining.init_home(
        home,
        site=site,
        data=str(data.resolve()),
        max_epsilon=max_epsilon,
        budget_book=(budget_book or home.resolve().parent / BOOK).resolve(),
        device=device,
        passphrase=passphrase,
    )
    kits.copy(kit, home / KIT)
    identity.save(home / f"{site}.identity.json")
    return identity


def start(home: Path, *, runtime_port: int | None = None, say: Callable[[str], None] = lambda line: None) -> None:
    """Run the SuperNode until this process is asked to stop (SIGTERM, Ctrl-C); where it ends by itself, start it again.

    Args:
        runtime_port: loopback port of Flower's local interface, in place of the kit's.
        say: gets a line for people now and then.

    Raises:
        RunError: KIT_*, RUN_PATH; RUN_FLOWER, Flower is not the one that the gate was made for.
        StudyError, CryptoError: the home is not ready.
    """
    home = home.resolve()
    config = _require_ready(home)
    flower_home = home / "flwr"
    gate.write_programs(flower_home / "gate")
    command = [
        str(BIN / "flower-supernode"),
        *("--superlink", config.address),
        *("--root-certificates", str(home / KIT / config.ca)),
        *("--auth-supernode-private-key", str(home / KIT / config.supernode_key)),
        *("--host", "127.0.0.1"),
        *("--port", str(runtime_port or config.runtime_port)),
        *("--node-config", f'home="{home}"'),
    ]
    env = environment(flower_home, flower_home / "gate")
    with processes.only_one(home / LOCK) as lock, processes.stoppable():
        try:
            while True:
                process = processes.spawn(command, env=env, folder=flower_home, log=home / LOG, lock=lock)
                say(f"{config.site}: SuperNode {process.pid} for {config.address}; log {home / LOG}")
                try:
                    code = process.wait()
                finally:
                    processes.stop(process)
                say(f"{config.site}: the SuperNode ended ({code}): {processes.last_error(home / LOG)}")
                say(f"{config.site}: it is started again in {RESTART_SECONDS:g} s")
                time.sleep(RESTART_SECONDS)
        except processes.Stopped:
            say(f"{config.site}: stopped")


def _require_ready(home: Path) -> SiteConfig:
    """What a round needs and a person has to mend is noticed now, not in the middle of a round."""
    from fedmedgan.client.policy import Policy
    from fedmedgan.shared.secure_sum.keys import HospitalKeys

    if '"' in str(home) or "'" in str(home):  # Flower's own notation for settings cannot carry them
        raise RunError("RUN_PATH", "the home's path contains a quotation mark", str(home), hint="choose another folder")
    kits.require_unchanged(home / KIT)
    config, policy = SiteConfig.load(home / KIT), Policy.load(home / "policy.toml")
    if policy.site != config.site:
        raise RunError("KIT_CONFIG", f"the kit is for {config.site}, this home is {policy.site}", str(home / KIT))
    HospitalKeys.load(home / "keys")
    agreement = Agreement.load(home / "study.json")
    if policy.site not in agreement.signatures:
        raise StudyError("STUDY_SIGNATURE", "this hospital has not signed the study", "study.json")
    return config
