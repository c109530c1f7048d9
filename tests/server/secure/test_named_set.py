"""Once a set of survivors is named: every repeat names exactly that one, or the run stops until all are back."""

from __future__ import annotations

import pytest

from common.errors import RunStopped
from common.messages import TIMED_OUT, Refused, Reply, Request, TrainRequest
from common.secagg.messages import Inbox, Survivors
from tests.federations import NAMES, Answer, Federation, WiredMembers, told
from tests.server.secure.conftest import (
    FIVE,
    LOG,
    A,
    Ask,
    B,
    C,
    E,
    attempts_of,
    both,
    collect,
    is_the_plain_sum,
    nothing_is_known,
    sets_named,
    who_falls,
    written,
)


@pytest.mark.parametrize("how", ["silent", "lost"])
def test_once_survivors_were_named_a_repeat_names_exactly_them(how: str, seven: Federation) -> None:
    """Alder's vector is not in the set, so alder is not asked again, however well it is by then."""
    left = NAMES[1:]
    answer = both(who_falls("silent", Inbox, A, attempts=1), who_falls(how, Survivors, B, C, attempts=1))
    members = WiredMembers(seven, answer)
    collected = collect(seven, members)
    assert is_the_plain_sum(seven, collected, left)
    assert [plan.cohort for plan in attempts_of(members)] == [NAMES, left]
    assert set(sets_named(members)) == {left}
    assert dict(collected.refused) == {A: TIMED_OUT}


def test_a_named_set_that_is_not_whole_is_asked_again_and_no_smaller_one_is_named(
    five: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    """All five signed, two signatures were lost, and in the repeat elm is away for a while: nobody may sign for four,
    and the sum of five is still there to be had.
    """
    seen = 0

    def answer(name: str, request: Request, ask: Ask) -> Reply:
        nonlocal seen
        if isinstance(request, Inbox) and name == E:
            seen += 1
            if seen == 2:
                return Refused(TIMED_OUT)
        return ask(request)

    members = WiredMembers(five, both(who_falls("lost", Survivors, A, B, attempts=1), answer))
    collected = collect(five, members)
    assert is_the_plain_sum(five, collected, FIVE)
    assert collected.attempts == 3
    assert set(sets_named(members)) == {FIVE}
    assert told(caplog.records, LOG, "attempt 2 gave no sum", "4 of the 5", "without elm", f"elm: {TIMED_OUT}")


def test_a_named_set_of_whom_one_is_gone_stops_the_run_until_it_is_back(five: Federation) -> None:
    gone = WiredMembers(five, both(who_falls("lost", Survivors, A, B, attempts=1), away_after(E, attempts=1)))
    with pytest.raises(RunStopped, match=r"3 attempts gave no sum; .* 4 of the 5 .* \(elm: timed_out\)"):
        collect(five, gone)
    assert written(five)["survivors"] == list(FIVE)
    nothing_is_known(gone, five)
    assert is_the_plain_sum(five, collect(five), FIVE)


def away_after(name: str, attempts: int) -> Answer:
    """A member that is there for so many attempts and then no more."""
    seen = 0

    def answer(asked: str, request: Request, ask: Ask) -> Reply:
        nonlocal seen
        seen += asked == name and isinstance(request, TrainRequest)
        return Refused(TIMED_OUT) if asked == name and seen > attempts else ask(request)

    return answer
