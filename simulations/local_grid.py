"""Flower's grid without Flower: each hospital's real ClientApp is called in this process, and can be told to misbehave.

For tests and fault measurements, where starting Flower's processes for each case would take hours.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from flwr.app import Context, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedmedgan.client import app as client


class LocalGrid:
    """What the coordinator uses of `flwr.serverapp.Grid`.

    Args:
        homes: node -> home folder of the hospital behind it.
        absent: is the node offline at that poll?
        silent: does the node never answer such a message?
        fails: the code of Flower's error that comes in place of an answer; None: the hospital answers.
        insecure_seed: as `fedmedgan simulate --insecure-seed`: repeatable and worthless noise.
    """

    def __init__(
        self,
        homes: Iterable[Path],
        *,
        absent: Callable[[int, int], bool] = lambda node, polls: False,
        silent: Callable[[int, str], bool] = lambda node, kind: False,
        fails: Callable[[int, str], int | None] = lambda node, kind: None,
        insecure_seed: int | None = None,
    ) -> None:
        for name in ("_run_id", "_node_id", "_task_id"):  # what a Message wants to know of the process that makes it
            setattr(TaskIdentity, name, 1)
        self.homes = dict(enumerate(homes))
        self.absent, self.silent, self.fails = absent, silent, fails
        self.app = client.make_app(lambda context: self.homes[context.node_id], insecure_seed=insecure_seed)
        self.polls = 0
        self.answers: dict[str, Message] = {}
        self.sent: list[tuple[int, str]] = []

    def get_node_ids(self) -> list[int]:
        self.polls += 1
        return [node for node in self.homes if not self.absent(node, self.polls)]

    def push_messages(self, messages: Iterable[Message]) -> Iterator[str]:
        for message in messages:
            number = uuid.uuid4().hex
            node, kind = message.metadata.dst_node_id, message.metadata.message_type
            message.metadata.__dict__["_message_id"] = number
            self.sent.append((node, kind))
            code = self.fails(node, kind)
            if code is not None:
                self.answers[number] = Message(Error(code=code, reason=""), reply_to=message)
            elif not self.silent(node, kind):
                self.answers[number] = self.call(node, message)
            yield number

    def call(self, node: int, message: Message) -> Message:
        """One hospital's answer to one message."""
        context = Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={})
        try:
            return self.app(message=message, context=context)
        except Exception as error:  # what Flower's own process does
            return Message(Error(code=2, reason=str(error)), reply_to=message)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self.answers.pop(number) for number in message_ids if number in self.answers]
