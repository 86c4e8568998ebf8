"""A real consortium on this machine: each party a process, a folder and the commands of its own.

    FOLDER/consortium.toml, study.toml     what people agree on by telephone
    FOLDER/kits/                           as `fedmedgan kit make` wrote them
    FOLDER/coordinator/                    the coordinator's folder
    FOLDER/hospitals/NAME/                 a hospital's home
    FOLDER/data/NAME/                      its DICOM files: phantoms
    FOLDER/post/                           what was sent by mail: identities, signatures, the study

Each party is spoken to through ``fedmedgan`` commands, which are printed. Every hospital speaks to the SuperLink over
TLS with its own SuperNode key; there is no nginx, because nothing leaves this machine.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmedgan.client import checkpoint
from fedmedgan.client.training.accountant import ENFORCED
from fedmedgan.deploy import coordinator, processes
from fedmedgan.deploy.environment import BIN
from fedmedgan.deploy.kit_config import Consortium
from fedmedgan.shared.errors import RunError
from fedmedgan.shared.privacy.budget import preview
from fedmedgan.shared.privacy.history import read as read_ledger
from fedmedgan.shared.secure_sum.key_file import PASSPHRASE_VARIABLE
from fedmedgan.shared.study import Study, load
from fedmedgan.simulations import phantoms
from fedmedgan.simulations.ports import free_ports

SHORT_STUDY = Path(__file__).with_name("short_study.toml")
COMMAND_SECONDS = 300.0
Say = Callable[[str], None]


@dataclass(frozen=True)
class Party:
    """Where one hospital ended."""

    name: str
    home: Path
    rounds: int
    epsilon: float
    """What its ledger says was spent in this study."""
    model_hash: str


class Deployed:
    """A consortium in a folder; its processes are ended by their process ids.

    Args:
        folder: new or empty.
        study: file of a study without keys.
        say: gets every command and what it printed.
    """

    def __init__(self, folder: Path, study: Path = SHORT_STUDY, say: Say = lambda line: None) -> None:
        self.folder, self.say = folder.resolve(), say
        self.study: Study = load(study)
        self.server: subprocess.Popen[bytes] | None = None
        self.sites: dict[str, subprocess.Popen[bytes]] = {}
        self.port, *ports = free_ports(1 + len(self.study.sites))
        self.runtime_ports = dict(zip((site.name for site in self.study.sites), ports, strict=True))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if any(self.folder.iterdir()):
                raise RunError("RUN_PATH", "the folder is not empty", str(self.folder))
            for name in ("post", "logs"):
                (self.folder / name).mkdir()
            shutil.copy(study, self.folder / "study.toml")
        except OSError as error:
            raise RunError("RUN_PATH", f"cannot be written ({error.strerror})", str(self.folder)) from None

    # ---- places

    @property
    def coordinator(self) -> Path:
        return self.folder / "coordinator"

    def home(self, name: str) -> Path:
        return self.folder / "hospitals" / name

    @property
    def agreed(self) -> Path:
        return self.folder / "post" / "study.json"

    def _log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    # ---- before the study

    def prepare(self) -> None:
        """Kits, homes, keys, the study, and everybody's signature under it: what people do before anything runs."""
        names, post = [site.name for site in self.study.sites], self.folder / "post"
        consortium = Consortium.model_validate(
            {
                "name": self.study.name,
                "coordinator": {"host": "127.0.0.1", "port": self.port, "superlink_port": self.port},
                "hospitals": tuple({"name": name} for name in names),
            }
        )
        (self.folder / "consortium.toml").write_text(consortium.to_toml(), encoding="utf-8")
        self._run("kit", "make", self.folder / "consortium.toml", "--out", self.folder / "kits")
        for name in ("coordinator", *names):
            self._run("kit", "verify", self.folder / "kits" / name)
        self._run("server", "init", "--kit", self.folder / "kits" / "coordinator", "--folder", self.coordinator)
        shutil.copy(self.coordinator / "coordinator.identity.json", post)
        for number, site in enumerate(self.study.sites):
            home, data = self.home(site.name), self.folder / "data" / site.name
            vendor, paired = phantoms.vendor_for(number), self.study.images.paired
            phantoms.write_hospital(data, patients=site.patients, seed=number, vendor=vendor, size=64, paired=paired)
            self._passphrase(site.name)
            options: list[str | Path] = [
                "--home",
                home,
                "--data",
                data,
                "--max-epsilon",
                str(self.study.privacy.epsilon),
                "--budget-book",
                self.folder / "budget-books" / site.name,
            ]
            self._run("site", "init", "--kit", self.folder / "kits" / site.name, *options, site=site.name)
            shutil.copy(home / f"{site.name}.identity.json", post)
        identities = sorted(post.glob("*.identity.json"))
        self._run("study", "assemble", self.folder / "study.toml", *identities, "--out", self.agreed)
        for name in names:
            self._run("study", "sign", self.agreed, "--home", self.home(name), "--yes", site=name)
            shutil.copy(self.home(name) / f"{name}.signature.json", post)
        self._run("study", "collect", self.agreed, *sorted(post.glob("*.signature.json")))

    # ---- the study

    def start_server(self, **environment: str) -> None:
        command: list[str | Path] = ["server", "start", "--folder", self.coordinator, "--study", self.agreed]
        self.server = self._spawn("coordinator", command, environment)

    def start_site(self, name: str, **environment: str) -> None:
        port = str(self.runtime_ports[name])
        command: list[str | Path] = ["site", "start", "--home", self.home(name), "--runtime-port", port]
        self.sites[name] = self._spawn(name, command, {**self._sealed(name), **environment})

    def run(self, seconds: float) -> None:
        """Start everybody and wait for the study's end.

        Raises:
            RunError: RUN_FLOWER, the server failed; RUN_TIMEOUT.
        """
        self.start_server()
        for site in self.study.sites:
            self.start_site(site.name)
        self.wait(seconds)

    def wait(self, seconds: float) -> None:
        """Wait for the server to end, and tell what happens meanwhile.

        Raises:
            RunError: RUN_FLOWER, the server failed, or a hospital's process ended by itself; RUN_TIMEOUT.
        """
        assert self.server is not None
        deadline, seen = time.monotonic() + seconds, 0
        told = dict.fromkeys(self.sites, 0)
        while self.server.poll() is None:
            for offset, event in coordinator.events(self.coordinator, seen):
                seen = offset
                self.say(f"coordinator: {_line(event)}")
            for name, process in self.sites.items():
                lines = self._log(name).read_text(encoding="utf-8", errors="replace").splitlines()
                for line in lines[told[name] :]:
                    self.say(f"    {line}")
                told[name] = len(lines)
                if process.poll() is not None:
                    what = f"{name}'s process ended: {processes.last_error(self._log(name))}"
                    raise RunError("RUN_FLOWER", what, str(self._log(name)))
            if time.monotonic() > deadline:
                raise RunError("RUN_TIMEOUT", f"the study has not ended after {seconds:g} s", str(self.folder))
            time.sleep(0.5)
        if self.server.returncode != 0:
            log = self._log("coordinator")
            raise RunError("RUN_FLOWER", f"the server ended: {processes.last_error(log)}", str(log))

    def stop(self) -> None:
        """End the processes of this consortium, in good order."""
        running = [*self.sites.values(), *([self.server] if self.server else [])]
        processes.stop(*running, seconds=2 * processes.STOP_SECONDS)

    def parties(self) -> list[Party]:
        """Where every hospital ended, read from its own files."""
        return [self._party(site.name) for site in self.study.sites]

    def _party(self, name: str) -> Party:
        home = self.home(name)
        history, (arrays, notes) = read_ledger(home / "ledger.jsonl"), checkpoint.read(home / "model.safetensors")
        privacy = self.study.privacy
        spent = preview(
            history.spent(str(notes["study"])), [], delta=privacy.delta, ceiling=privacy.epsilon, accountants=ENFORCED
        )
        return Party(name, home, int(notes["round"]), spent.spent_epsilon, checkpoint.content_hash(arrays))

    # ---- commands

    def _run(self, *arguments: str | Path, site: str = "") -> None:
        command = _command(arguments)
        self.say(f"$ {_shown(command, self.folder)}")
        env = {**os.environ, **(self._sealed(site) if site else {})}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=COMMAND_SECONDS)
        if done.returncode != 0:
            raise RunError("RUN_FLOWER", f"`{' '.join(command[1:4])}` failed: {done.stderr.strip()}", str(self.folder))
        for line in done.stdout.splitlines():
            self.say(f"    {line}")

    def _spawn(
        self, name: str, arguments: Sequence[str | Path], environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        command = _command(arguments)
        self.say(f"$ {_shown(command, self.folder)} &")
        with self._log(name).open("ab") as log:
            return subprocess.Popen(
                command,
                env={"OMP_NUM_THREADS": "1", **os.environ, **environment},  # several hospitals share this machine
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _passphrase(self, name: str) -> None:
        path = self.folder / "hospitals" / f"{name}.passphrase"
        path.parent.mkdir(exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(24) + "\n")

    def _sealed(self, name: str) -> dict[str, str]:
        return {PASSPHRASE_VARIABLE: str(self.folder / "hospitals" / f"{name}.passphrase")}


def _command(arguments: Sequence[str | Path]) -> list[str]:
    return [str(BIN / "fedmedgan"), *map(str, arguments)]


def _shown(command: Sequence[str], folder: Path) -> str:
    return " ".join(["fedmedgan", *(shlex.quote(a.replace(f"{folder}/", "")) for a in command[1:])])


def _line(event: dict[str, Any]) -> str:
    fields = {key: value for key, value in event.items() if key not in ("time", "event", "seconds")}
    return f"{event.get('event')} {json.dumps(fields)}"
