"""Instructions are sent again when that can help, not more often than that, and never after a plain failure."""

from __future__ import annotations

import pytest
from conftest import tiny_study
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Message

from fedmedgan.server import wire
from fedmedgan.server.wire import NoAnswer, Wire
from fedmedgan.shared.messages import Envelope, Present, Refusal, RoundOpen
from fedmedgan.shared.study import from_dict
from fedmedgan.simulations.local_grid import LocalGrid

KEYS = [Ed25519PrivateKey.generate() for _ in range(4)]
PUBLIC = [key.public_key().public_bytes_raw().hex() for key in KEYS]
_VALUES = tiny_study().model_dump()
STUDY = from_dict(
    _VALUES | {"sites": [site | {"signing_key": key} for site, key in zip(_VALUES["sites"], PUBLIC, strict=True)]}
)
OPENED = RoundOpen(study=STUDY.hash, round=1, attempt=1, cohort=("site-0",), epoch=1, key_id="ab" * 16)
REQUEST = Envelope.seal(OPENED, KEYS[3])
FAST = {"RESEND_SECONDS": 0.2, "AGAIN_SECONDS": 0.05, "POLL_SECONDS": 0.01}


class Grid(LocalGrid):
    """Its hospitals say who they are, whatever they are asked; `codes` are the errors that come before that."""

    def __init__(self, *codes: int, answer: Envelope | None = None, **misbehaves) -> None:
        left = list(codes)
        super().__init__([], fails=lambda node, kind: left.pop(0) if left else None, **misbehaves)
        self.homes = dict.fromkeys(range(4))
        self.reply = answer

    def call(self, node: int, message: Message) -> Message:
        present = Present(
            study=STUDY.hash,
            hospital=f"site-{node}",
            epoch=0,
            key_id="",
            parameters=1,
            applied_round=0,
            model_hash="0" * 64,
        )
        reply = self.reply or Envelope.seal(present, KEYS[node])
        return Message(reply.to_record(), reply_to=message)


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    for name, seconds in FAST.items():
        monkeypatch.setattr(wire, name, seconds)


def ask(grid: Grid, seconds: float = 5.0, away: float = 5.0) -> str:
    """What site-0 answers: "Present", or the code of why there is no answer."""
    ((name, answer),) = Wire(grid, STUDY).ask({"site-0": (0, REQUEST)}, "train", seconds=seconds, away_seconds=away)
    assert name == "site-0"
    return str(answer) if isinstance(answer, NoAnswer) else answer.kind


@pytest.mark.parametrize(
    ("codes", "answer", "sent"),
    [
        ((), "Present", 1),
        ((5,), "Present", 2),
        ((3, 4, 5, 5), "Present", 5),
        ((8,), "Present", 2),
        ((8, 8), "Present", 3),
        ((8, 8, 8), "RUN_NODE", 3),
        ((2,), "RUN_NODE", 1),
        ((0,), "RUN_NODE", 1),
        ((1,), "RUN_NODE", 1),
        ((6,), "RUN_NODE", 1),
        ((7,), "RUN_NODE", 1),
        ((5, 2), "RUN_NODE", 2),
        ((5, 8, 8, 5), "Present", 5),
    ],
)
def test_what_is_sent_again_and_what_is_not(codes, answer, sent):
    grid = Grid(*codes)
    assert ask(grid) == answer
    assert len(grid.sent) == sent


def test_a_node_that_is_gone_is_sent_nothing_until_it_is_back():
    grid = Grid(5, absent=lambda node, polls: polls < 10)
    assert ask(grid) == "Present"
    assert grid.polls >= 10
    assert len(grid.sent) == 2


def test_a_node_that_stays_away_is_waited_for_no_longer_than_agreed():
    grid = Grid(5, absent=lambda node, polls: True)
    assert ask(grid, seconds=60.0, away=0.3) == "RUN_NODE"
    assert len(grid.sent) == 1


def test_a_silent_node_is_sent_the_same_again_after_ever_longer_times():
    """At 0, 0.2, 0.6 and 1.4 s; the end comes at 2 s."""
    grid = Grid(silent=lambda node, kind: True)
    assert ask(grid, seconds=2.0) == "RUN_TIMEOUT"
    assert len(grid.sent) == 4


def test_an_answer_to_a_later_copy_counts(monkeypatch):
    silent = [True, True, False]
    grid = Grid(silent=lambda node, kind: silent.pop(0))
    assert ask(grid) == "Present"
    assert len(grid.sent) == 3


def test_errors_that_come_at_once_are_not_answered_by_a_flood():
    grid = Grid(*[5] * 1000)
    assert ask(grid, seconds=1.0) == "RUN_TIMEOUT"
    assert 3 < len(grid.sent) < 25


def test_each_answer_comes_once_and_one_bad_node_holds_up_nobody():
    grid = Grid(silent=lambda node, kind: node == 2)
    requests = {f"site-{node}": (node, REQUEST) for node in range(4)}
    answers = list(Wire(grid, STUDY).ask(requests, "train", seconds=0.5))
    assert [name for name, _ in answers] == ["site-0", "site-1", "site-3", "site-2"]
    assert str(answers[3][1]) == "RUN_TIMEOUT"


def refusal(signer: int, name: str = "site-0") -> Envelope:
    return Envelope.seal(Refusal(study=STUDY.hash, hospital=name, code="BUDGET_EXHAUSTED"), KEYS[signer])


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (refusal(0), "BUDGET_EXHAUSTED"),
        (refusal(1), "MSG_SIGNATURE"),
        (refusal(1, "site-1"), "MSG_SENDER"),
    ],
    ids=["its own", "signed by another", "of another"],
)
def test_a_no_counts_only_from_the_hospital_that_was_asked(said, answer):
    assert ask(Grid(answer=said)) == answer
