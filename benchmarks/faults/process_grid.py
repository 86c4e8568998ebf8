"""A grid on which each message to a hospital is answered by a process of its own, as Flower does it, but forked.

A hospital's process may be told to die at one of the crash points, once; the coordinator then hears what Flower would
say (CLIENT_APP_CRASHED). Every update that leaves a hospital is written down, with a hash of all its bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Collection, Iterable
from pathlib import Path

from flwr.app import Error, Message

from fedmedgan.shared import crash
from fedmedgan.shared.messages import Envelope, RoundOpen, Update, parse
from fedmedgan.simulations.local_grid import LocalGrid

CLIENT_APP_CRASHED, CLIENT_APP_RAISED = 8, 2


class ProcessGrid(LocalGrid):
    """LocalGrid with a process a message.

    Args:
        trace: file that gets one line for each update that left a hospital.
        crash_at: (node, crash point): that hospital's process dies there, the first time that it gets there.
        drops: (node, round) pairs in which the hospital does not train.
    """

    def __init__(
        self,
        homes: Iterable[Path],
        trace: Path,
        *,
        crash_at: tuple[int, str] | None = None,
        drops: Collection[tuple[int, int]] = (),
        insecure_seed: int | None = None,
    ) -> None:
        super().__init__(homes, insecure_seed=insecure_seed)
        self.trace, self.crash_at, self.drops = trace, crash_at, set(drops)
        self.crashes = 0

    def call(self, node: int, message: Message) -> Message:
        envelope = Envelope.from_record(message.content, 1 << 30)
        if envelope.kind == RoundOpen.__name__ and (node, parse(envelope.header, RoundOpen).round) in self.drops:
            return Message(Error(code=CLIENT_APP_RAISED, reason="dropped"), reply_to=message)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            self._answer(node, message, write)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            answer = pipe.read()
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) == crash.EXIT_CODE:
            self.crash_at, self.crashes = None, self.crashes + 1
        if not answer:
            return Message(Error(code=CLIENT_APP_CRASHED, reason="the process died"), reply_to=message)
        reply = Envelope.from_bytes(answer)
        self._note(reply)
        return Message(reply.to_record(), reply_to=message)

    def _answer(self, node: int, message: Message, write: int) -> None:
        """The hospital's process. It holds nothing of the coordinator's open, so that it may outlive it."""
        code = 1
        try:
            os.dup2(write, 3)
            os.closerange(4, 1024)
            if self.crash_at and self.crash_at[0] == node:
                os.environ[crash.VARIABLE] = self.crash_at[1]
            else:
                os.environ.pop(crash.VARIABLE, None)
            answer = super().call(node, message)
            if not answer.has_error():
                with os.fdopen(3, "wb") as pipe:
                    pipe.write(Envelope.from_record(answer.content, 1 << 30).to_bytes())
                code = 0
        finally:
            os._exit(code)

    def _note(self, reply: Envelope) -> None:
        if reply.kind == Update.__name__:
            update = parse(reply.header, Update)
            line = {
                "hospital": update.hospital,
                "round": update.round,
                "attempt": update.attempt,
                "sha256": hashlib.sha256(reply.to_bytes()).hexdigest(),
            }
            with self.trace.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def random_drops(hospitals: int, rounds: int, share: float, seed: int) -> set[tuple[int, int]]:
    """(node, round) pairs, each with that chance."""
    chance = random.Random(seed)
    return {(node, number) for node in range(hospitals) for number in range(1, rounds + 1) if chance.random() < share}
