"""Instructions out, answers in. Flower delivers an instruction at most once; hospitals answer it the same each time.

case                                          what happens
no answer yet                                 sent again after 60 s, then after 120, 240, ... s
the hospital's process died (code 8)          sent again, twice at most
the node is gone (codes 3, 4, 5)              sent again when it is back, if it comes back in time
the app refused or failed in an ordered way   that is the answer
an answer comes twice                         the second one is not asked for
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import TypeVar

from flwr.app import Message
from flwr.serverapp import Grid

from fedmedgan.shared.errors import FedMedGanError, MessageError
from fedmedgan.shared.messages import Envelope, Refusal
from fedmedgan.shared.study import Study

K = TypeVar("K")

POLL_SECONDS = 0.05
RESEND_SECONDS = 60.0
AGAIN_SECONDS = 1.0
"""Two messages to a node whose errors come at once are never nearer to each other than this."""
MAX_RESTARTS = 2
AWAY_SECONDS = 180.0
"""How long a node may be gone: Flower notices within a minute, and lets a killed one back in after another."""
MAX_REPLY_BYTES = 4 << 30
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


class Wire:
    """The coordinator's side of Flower's grid."""

    def __init__(self, grid: Grid, study: Study) -> None:
        self.grid, self.study = grid, study

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
        while pending:
            now = time.monotonic()
            for key, state in list(pending.items()):
                answer = self._answer(state, now)
                if answer is None and state.gone_since is not None and now - state.gone_since > away_seconds:
                    answer = NoAnswer("RUN_NODE")
                if answer is None and now > deadline:
                    answer = NoAnswer("RUN_TIMEOUT")
                if answer is not None:
                    del pending[key]
                    yield key, self._without_refusal(key, answer)
                elif now >= state.resend_at and (state.gone_since is None or state.node in self.online()):
                    self._send(state, requests[key][1], message_type, now)
            time.sleep(POLL_SECONDS)

    def _send(self, state: _Pending, envelope: Envelope, message_type: str, now: float) -> None:
        message = Message(envelope.to_record(), dst_node_id=state.node, message_type=message_type)
        state.ids.update(self.grid.push_messages([message]))
        state.gone_since, state.sent_at = None, now
        state.resend_at, state.interval = now + state.interval, 2 * state.interval

    def _answer(self, state: _Pending, now: float) -> Envelope | NoAnswer | None:
        """The answer, if there is one; notes a node that is gone."""
        for message_id in list(state.ids):  # one at a time: at most one answer is in memory here
            for message in self.grid.pull_messages([message_id]):
                state.ids.discard(message_id)
                if not message.has_error():
                    return _opened(message)
                code = message.error.code
                restart = code == _DIED and state.restarts < MAX_RESTARTS
                if code not in _GONE and not restart:
                    return NoAnswer("RUN_NODE")
                state.restarts += restart
                if not state.ids and state.gone_since is None:
                    state.gone_since, state.resend_at = now, max(now, state.sent_at + AGAIN_SECONDS)
        return None

    def _without_refusal(self, key: object, answer: Envelope | NoAnswer) -> Envelope | NoAnswer:
        """A no counts only when it is signed by the hospital that was asked."""
        if isinstance(answer, NoAnswer) or answer.kind != Refusal.__name__:
            return answer
        try:
            refusal = answer.open(Refusal, self.study)
        except MessageError as error:
            return NoAnswer(error.code)
        return NoAnswer(refusal.code if key == refusal.hospital or not isinstance(key, str) else "MSG_SENDER")


def _opened(answer: Message) -> Envelope | NoAnswer:
    try:
        return Envelope.from_record(answer.content, MAX_REPLY_BYTES)
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
