"""A SuperLink and SuperNodes of a test's own: TLS, node authentication, free ports, ended by their process ids."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedmedgan.deploy import certificates, kits
from fedmedgan.deploy.environment import BIN, environment
from fedmedgan.deploy.kit_config import Consortium
from fedmedgan.simulations.ports import free_port


def make_kits(folder: Path, *names: str, port: int, superlink_port: int) -> Path:
    """Kits of a consortium on this machine. Returns the coordinator's."""
    hospitals = tuple({"name": name} for name in names or ("north", "south", "west"))
    coordinator = {"host": "127.0.0.1", "port": port, "superlink_port": superlink_port}
    kits.make(Consortium.model_validate({"name": "t", "coordinator": coordinator, "hospitals": hospitals}), folder)
    return folder / "coordinator"


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.3)
    raise AssertionError(f"not within {seconds:g} s: {what}")


class Flower:
    """A SuperLink and SuperNodes of our own, ended by their process ids."""

    def __init__(self, folder: Path, port: int, kit: Path) -> None:
        self.folder, self.port = folder, port
        self.processes: list[subprocess.Popen] = []
        self.flower = environment(folder / "flwr")
        for name in ("ca.crt", "server.crt", "server.key"):
            shutil.copy(kit / name, folder / name)
        (folder / "flwr").mkdir()
        (folder / "flwr" / "config.toml").write_text(
            f'[superlink.test]\naddress = "127.0.0.1:{self.port}"\nroot-certificates = "{folder / "ca.crt"}"\n'
        )

    def start(self, name: str, command: list[str], env: dict[str, str]) -> subprocess.Popen:
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command, env=env, cwd=self.folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        self.processes.append(process)
        return process

    def start_superlink(self) -> None:
        tls = ["--ssl-ca-certfile", "ca.crt", "--ssl-certfile", "server.crt", "--ssl-keyfile", "server.key"]
        command = [str(BIN / "flower-superlink"), "--host", "127.0.0.1", "--port", str(self.port), *tls]
        command += ["--enable-supernode-auth", "--disable-runtime-dependency-installation", "--database", "state.db"]
        process = self.start("superlink", command, self.flower)
        context = ssl.create_default_context(cafile=str(self.folder / "ca.crt"))

        def healthy() -> bool:
            assert process.poll() is None, (self.folder / "superlink.log").read_text()
            try:
                with urllib.request.urlopen(f"https://127.0.0.1:{self.port}/health", context=context, timeout=2) as r:
                    return bool(r.status == 200)
            except OSError:
                return False

        until(healthy, 60, "the SuperLink is up")

    def flwr(self, *arguments: str) -> str:
        command = [str(BIN / "flwr"), *arguments]
        done = subprocess.run(command, env=self.flower, cwd=self.folder, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start_supernode(self, name: str, *first: Path, port: int | None = None) -> Path:
        """Start one, on another port where something stands before the SuperLink. Returns the hospital's home."""
        home = self.folder / name
        home.mkdir()
        private, public = certificates.supernode_pair()
        certificates.write_secret(home / "supernode.key", private)
        (home / "supernode.pub").write_bytes(public)
        self.flwr("supernode", "register", str(home / "supernode.pub"), "test")
        command = [str(BIN / "flower-supernode"), "--superlink", f"127.0.0.1:{port or self.port}"]
        command += ["--root-certificates", "ca.crt", "--auth-supernode-private-key", str(home / "supernode.key")]
        command += ["--port", str(free_port()), "--node-config", f'home="{home}"']
        self.start(name, command, environment(home / "flwr", *first))
        return home

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.terminate()
        for process in reversed(self.processes):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
