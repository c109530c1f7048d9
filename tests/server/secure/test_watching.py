"""What whoever watches a round is told: every question, every answer, and of which attempt."""

from __future__ import annotations

import pytest

from common.messages import Request
from common.secagg.messages import KeyList
from server.collect import Heard
from tests.federations import Federation
from tests.server.secure.conftest import FIVE, PHASES, B, D, collect, who_falls

WORDS = ("train", "shares", "masked input", "consent", "unmask")
"""What is told of each of PHASES."""


def asked_and_answered(number: int, attempt: int, phase: str, names: tuple[str, ...]) -> list[Heard]:
    """What is told of a question to `names` which all answer in order, with what they were asked for or a refusal."""
    return [Heard(number, attempt, phase, names[:count], names[count:]) for count in range(len(names) + 1)]


def test_whoever_watches_is_told_of_every_question_and_every_answer(five: Federation) -> None:
    seen: list[Heard] = []
    collect(five, on_heard=seen.append, number=3)
    assert seen == [heard for phase in WORDS for heard in asked_and_answered(3, 1, phase, FIVE)]


@pytest.mark.parametrize(("place", "kind"), list(enumerate(PHASES)))
def test_who_leaves_at_a_question_is_waited_for_at_none_that_follows(
    place: int, kind: type[Request], five: Federation
) -> None:
    seen: list[Heard] = []
    collect(five, who_falls("silent", kind, B), on_heard=seen.append, number=3)
    left = tuple(name for name in FIVE if name != B)
    # The set that consents is named when all vectors are in; who leaves then is asked no more either.
    assert seen == [
        heard
        for number, phase in enumerate(WORDS)
        for heard in asked_and_answered(3, 1, phase, FIVE if number <= place else left)
    ]


def test_whoever_watches_is_told_which_attempt_it_is(five: Federation) -> None:
    seen: list[Heard] = []
    collect(five, who_falls("silent", KeyList, B, D, attempts=1), on_heard=seen.append)
    # With two of five gone at the second question, and one who may be, nobody is asked the third.
    assert seen == [
        *asked_and_answered(1, 1, "train", FIVE),
        *asked_and_answered(1, 1, "shares", FIVE),
        *(heard for phase in WORDS for heard in asked_and_answered(1, 2, phase, FIVE)),
    ]
