"""A coordinator that was killed or forgot its attempts: it goes on under the same rules, or gets no sum."""

from __future__ import annotations

import json

import pytest

from common.errors import RunStopped, StorageError
from common.messages import Reply, Request, TrainRequest
from common.secagg.messages import Consents, Inbox, Survivors
from common.secagg.terms import Terms
from tests.federations import ADAPTER, Answer, Federation, WiredMembers
from tests.server.secure.conftest import (
    ABCD,
    FIVE,
    PHASES,
    A,
    Ask,
    C,
    attempts_file,
    attempts_of,
    both,
    collect,
    is_the_plain_sum,
    who_falls,
    written,
)


def test_a_set_is_on_disk_before_anybody_is_asked_to_sign_it_and_a_number_before_it_is_used(five: Federation) -> None:
    seen: list[tuple[type[Request], int, list[str] | None]] = []

    def answer(name: str, request: Request, ask: Ask) -> Reply:
        if isinstance(request, TrainRequest | Survivors):
            seen.append((type(request), written(five)["number"], written(five)["survivors"]))
        return ask(request)

    collect(five, answer)
    assert seen == [(TrainRequest, 1, None)] * 5 + [(Survivors, 1, list(FIVE))] * 5


class Killed(BaseException):
    """The coordinator's process ends."""


def killed_at(kind: type[Request], name: str) -> Answer:
    def answer(asked: str, request: Request, ask: Ask) -> Reply:
        if asked == name and type(request) is kind:
            raise Killed
        return ask(request)

    return answer


def test_a_round_that_was_killed_before_a_set_was_named_may_go_on_with_fewer(five: Federation) -> None:
    with pytest.raises(Killed):
        collect(five, killed_at(Inbox, C))
    with pytest.raises(RunStopped, match="3 institutions are left of the 5 that this round began with, 4 are needed"):
        collect(five, cohort=ABCD[:3])
    members = WiredMembers(five)
    collected = collect(five, members, cohort=ABCD)
    assert is_the_plain_sum(five, collected, ABCD)
    (plan,) = attempts_of(members)
    assert plan.secure is not None
    assert (plan.secure.attempt, plan.secure.terms) == (2, Terms.of(5, 1, 3))


@pytest.mark.parametrize("kind", PHASES)
def test_a_coordinator_that_was_killed_goes_on_under_the_same_rules(kind: type[Request], five: Federation) -> None:
    with pytest.raises(Killed):
        collect(five, both(who_falls("silent", Inbox, A), killed_at(kind, C)))
    members = WiredMembers(five)
    collected = collect(five, members)
    named = kind in (Survivors, Consents)
    assert is_the_plain_sum(five, collected, FIVE[1:] if named else FIVE)
    (plan,) = attempts_of(members)
    assert plan.secure is not None
    assert plan.secure.attempt == 2
    assert plan.secure.terms == Terms.of(5, 1, 3)
    assert collected.attempts == 2  # the one that the kill ended spent too


def test_a_coordinator_that_forgot_its_attempts_gets_no_second_sum(five: Federation) -> None:
    """A coordinator that deletes its file, or lies about it, meets the members' own marks."""
    collect(five)
    attempts_file(five).unlink()
    with pytest.raises(RunStopped, match=r"alder: terms_differ, birch: terms_differ"):
        collect(five, cohort=ABCD)
    forged = {"number": 9, "adapter": ADAPTER.digest(), "members": FIVE, "survivors": None, "tries": 9}
    attempts_file(five).write_text(json.dumps([forged]))
    with pytest.raises(RunStopped, match=r"alder: survivors_differ, birch: survivors_differ"):
        collect(five, cohort=ABCD)
    assert is_the_plain_sum(five, collect(five), FIVE)  # the one that they consented to is nothing new


def test_a_file_of_attempts_that_is_damaged_stops_everything(five: Federation) -> None:
    collect(five)
    attempts_file(five).write_text("{")
    sent = len(five.sent)
    with pytest.raises(StorageError, match=r"attempts\.json cannot be read"):
        collect(five)
    assert len(five.sent) == sent
