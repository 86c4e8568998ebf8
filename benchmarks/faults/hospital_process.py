"""Hospitals for the network's faults: the real SuperNode, supervisor, gate and ClientApp, without the cost of training.

    python hospital_process.py fork SOCKET             answers messages, each in a process forked from this one
    python hospital_process.py site HOME SOCKET PORT   what `fedmedgan site start` runs, for one hospital

A ClientApp imports torch for 5 s of CPU, for each message. Here Flower's executor starts a small program in place of
the gate's, which hands its arguments to the first process; that one has imported everything, forks, and runs the gate.
In place of training, an update is drawn; its levels are also kept in ``HOME/levels/``, to compare the sum with.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from pathlib import Path

import numpy as np

LEVELS = "levels"
SCALE = 0.015
"""Standard deviation of a drawn update."""

PROGRAM = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as to:
    to.connect({socket!r})
    said = json.dumps({{"arguments": sys.argv[1:], "environment": dict(os.environ), "folder": os.getcwd()}})
    socket.send_fds(to, [len(said).to_bytes(4, "big")], [1, 2])
    to.sendall(said.encode())
    to.recv(1)
"""


def fork(path: str) -> None:
    """Answer messages until SIGTERM; each connection is one message."""
    from flwr.supernode.cli import flwr_clientapp

    from fedmedgan.client import app
    from fedmedgan.deploy import gate

    assert flwr_clientapp and app  # imported here, once, for all of them
    _replace_training()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(16)
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listener.close()
                _become(connection)
                gate.main()
                sys.exit()
            connection.close()


def _become(connection: socket.socket) -> None:
    """Take the place of the process that Flower's executor started; the connection stays open until this one ends."""
    size, descriptors, _, _ = socket.recv_fds(connection, 4, 2)
    with connection.makefile("rb") as stream:
        said = json.loads(stream.read(int.from_bytes(size, "big")))
    for number, descriptor in zip((1, 2), descriptors, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(said["environment"])
    os.chdir(said["folder"])
    sys.argv = ["gate", "flwr-clientapp", *said["arguments"]]


def _replace_training() -> None:
    from fedmedgan.client.cycle import Hospital
    from fedmedgan.client.training.local_round import Losses
    from fedmedgan.shared.messages import RoundOpen

    def draw(self: Hospital, *_: object) -> tuple[Losses, np.ndarray]:
        chance = np.random.default_rng()
        update_P = chance.normal(0, SCALE, self.plan.n_values).astype(np.float32)
        return Losses(generator=float(chance.uniform(0.5, 1.5)), discriminator_on_fakes=1.0), update_P

    seal = Hospital._seal

    def keep_and_seal(self: Hospital, levels_P: np.ndarray, saturated: int, opened: RoundOpen) -> bytes:
        folder = self.home / LEVELS
        folder.mkdir(exist_ok=True)
        np.save(folder / f"round-{opened.round:04d}-attempt-{opened.attempt:02d}.npy", levels_P)
        return seal(self, levels_P, saturated, opened)

    Hospital._train_networks = draw  # type: ignore[method-assign]
    Hospital._seal = keep_and_seal  # type: ignore[method-assign]


def site(home: Path, path: str, port: int) -> None:
    """Run a hospital's SuperNode; its gate's program leads to the process that forks."""
    from fedmedgan.deploy import gate, supernode

    write_programs = gate.write_programs

    def write_forking(folder: Path) -> None:
        write_programs(folder)
        (folder / gate.ALLOWED).write_text(PROGRAM.format(python=sys.executable, socket=path), encoding="utf-8")

    gate.write_programs = write_forking
    supernode.start(home, runtime_port=port, say=lambda line: print(line, flush=True))


if __name__ == "__main__":
    sys.path.pop(0)  # so that nothing in this folder hides a library of the same name
    if sys.argv[1] == "fork":
        fork(sys.argv[2])
    else:
        site(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
