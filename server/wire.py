"""Instructions out, answers in. Flower delivers an instruction at most once; hospitals answer it the same each time.

case                                          what happens
no answer yet                                 sent again after 60 s, then after 120, 240, ... s
the hospital's process died (code 8)          sent again, twice at most
the node is gone (codes 3, 4, 5)              sent again when it is back, if it comes back in time
the app refused or failed in an ordered way   that is the answer
an answer comes twice                         the second one is not asked for
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import TypeVar

from flwr.app import Message
from flwr.serverapp import Grid

from fedmedgan.shared.errors import FedMedGanError, MessageError
from fedmedgan.shared.messages import Envelope, Refusal
from fedmedgan.shared.study import Study

K = TypeVar("K")
R = TypeVar("R")

POLL_SECONDS = 0.05
RESEND_SECONDS = 60.0
AGAIN_SECONDS = 1.0
"""Two messages to a node whose errors come at once are never nearer to each other than this."""
MAX_RESTARTS = 2
AWAY_SECONDS = 180.0
"""How long a node may be gone: Flower notices within a minute, and lets a killed one back in after another."""
PULLS = 4
"""Answers that are fetched at once: one that was cut half way blocks its fetch for minutes, and so nobody else's."""
MAX_REPLY_BYTES = 16 << 20
"""Of any answer but an update: the largest is a key offer, a wrapped key for each of a hundred hospitals."""
_GONE, _DIED = (3, 4, 5), 8


class NoAnswer(Exception):
    """A hospital did not answer, or said no; the text is the reason's code."""


class _Pending:
    """One instruction to one node: the messages that carry it, and when it is due to be sent again."""

    def __init__(self, node: int, now: float) -> None:
        self.node, self.ids = node, set[str]()
        self.resend_at, self.interval = now, RESEND_SECONDS
        self.sent_at = now
        self.restarts = 0
        self.gone_since: float | None = None
        self.pull: Future[list[tuple[str, Message]]] | None = None


class Wire:
    """The coordinator's side of Flower's grid."""

    def __init__(self, grid: Grid, study: Study) -> None:
        self.grid, self.study = grid, study
        self.max_reply_bytes = MAX_REPLY_BYTES
        """A larger answer is refused before its parts are joined."""
        self._pulls = threading.BoundedSemaphore(PULLS)

    def online(self) -> set[int]:
        return set(self.grid.get_node_ids())

    def ask(
        self,
        requests: Mapping[K, tuple[int, Envelope]],
        message_type: str,
        *,
        seconds: float,
        away_seconds: float = AWAY_SECONDS,
    ) -> Iterator[tuple[K, Envelope | NoAnswer]]:
        """Ask each node once, and yield each answer as soon as it is there, so that it can be forgotten.

        Args:
            requests: hospital, or the node itself before its hospital is known -> (node, message).
            seconds: how long to wait for all of them.
            away_seconds: how long to wait for a node that is gone.
        """
        now = time.monotonic()
        deadline = now + seconds
        pending = {key: _Pending(node, now) for key, (node, _) in requests.items()}
        try:
            while pending:
                now = time.monotonic()
                for key, state in list(pending.items()):
                    pending[key] = pending.pop(key)  # to the end of the row: everybody's answer is looked for in turn
                    answer = self._answer(state, now)
                    if answer is None and state.gone_since is not None and now - state.gone_since > away_seconds:
                        answer = NoAnswer("RUN_NODE")
                    if answer is None and now > deadline:
                        answer = NoAnswer("RUN_TIMEOUT")
                    if answer is not None:
                        self._give_up(pending.pop(key))
                        yield key, self._without_refusal(key, answer)
                    elif now >= state.resend_at and (state.gone_since is None or state.node in self.online()):
                        self._send(state, requests[key][1], message_type, now)
                time.sleep(POLL_SECONDS)
        finally:
            for state in pending.values():
                self._give_up(state)

    def _give_up(self, state: _Pending) -> None:
        """A pull that is still under way gives its place back when it ends."""
        if state.pull is not None:
            state.pull.add_done_callback(lambda _: self._pulls.release())

    def _send(self, state: _Pending, envelope: Envelope, message_type: str, now: float) -> None:
        message = Message(envelope.to_record(), dst_node_id=state.node, message_type=message_type)
        state.ids.update(self.grid.push_messages([message]))
        state.gone_since, state.sent_at = None, now
        state.resend_at, state.interval = now + state.interval, 2 * state.interval

    def _answer(self, state: _Pending, now: float) -> Envelope | NoAnswer | None:
        """The answer, if there is one; notes a node that is gone."""
        if state.pull is None and state.ids and self._pulls.acquire(blocking=False):
            state.pull = _in_background(self._pull, tuple(state.ids))
        if state.pull is None or not state.pull.done():
            return None
        pull, state.pull = state.pull, None
        self._pulls.release()
        for message_id, message in pull.result():
            state.ids.discard(message_id)
            if not message.has_error():
                return _opened(message, self.max_reply_bytes)
            code = message.error.code
            restart = code == _DIED and state.restarts < MAX_RESTARTS
            if code not in _GONE and not restart:
                return NoAnswer("RUN_NODE")
            state.restarts += restart
            if not state.ids and state.gone_since is None:
                state.gone_since, state.resend_at = now, max(now, state.sent_at + AGAIN_SECONDS)
        return None

    def _pull(self, ids: tuple[str, ...]) -> list[tuple[str, Message]]:
        """The first of these messages that has an answer, with the answer."""
        for message_id in ids:
            for message in self.grid.pull_messages([message_id]):
                return [(message_id, message)]
        return []

    def _without_refusal(self, key: object, answer: Envelope | NoAnswer) -> Envelope | NoAnswer:
        """A no counts only when it is signed by the hospital that was asked."""
        if isinstance(answer, NoAnswer) or answer.kind != Refusal.__name__:
            return answer
        try:
            refusal = answer.open(Refusal, self.study)
        except MessageError as error:
            return NoAnswer(error.code)
        return NoAnswer(refusal.code if key == refusal.hospital or not isinstance(key, str) else "MSG_SENDER")


def _in_background(work: Callable[..., R], *arguments: object) -> Future[R]:
    """Run in a thread that does not keep the process from ending."""
    future: Future[R] = Future()

    def run() -> None:
        try:
            future.set_result(work(*arguments))
        except BaseException as error:  # told where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _opened(answer: Message, max_bytes: int) -> Envelope | NoAnswer:
    try:
        return Envelope.from_record(answer.content, max_bytes)
    except MessageError as error:
        return NoAnswer(error.code)


def sent(answer: Envelope | NoAnswer) -> Envelope:
    """The answer itself. Raises NoAnswer."""
    if isinstance(answer, NoAnswer):
        raise answer
    return answer


def reason(problem: Exception) -> str:
    """The code of what went wrong with one hospital."""
    return problem.code if isinstance(problem, FedMedGanError) else str(problem)
