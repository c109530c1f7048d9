"""Messages out of turn, and two at once from two threads: one of them counts, or none."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from client import marks as marks_module
from common.errors import Refusal
from common.messages import Refused
from common.secagg import reasons
from common.secagg.identity import Roster
from common.secagg.messages import Consent, Consents, Inbox, KeyList, Keys, Revealed, Survivors
from tests.client.secure.conftest import ABC, ABCD, A, ends_the_attempt, gives_nothing_more
from tests.federations import PARAMETERS, Federation, kept


@pytest.mark.parametrize("phase", ["keys", "shares", "masked", "consents"])
def test_a_message_out_of_turn_ends_the_attempt(
    phase: str, routed: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    """Each message that is not the next one: one that comes again, and those that come too early."""
    messages = {"keys": KeyList, "shares": Inbox, "masked": Survivors, "consents": Consents}
    for number, kind in enumerate(messages.values(), 1):
        coordinator = routed.coordinator(routed.plan(number))
        getattr(coordinator, phase)()
        due = list(messages)[list(messages).index(phase)]
        if kind is messages[due]:
            continue
        digest = coordinator.plan.digest()
        lie = {
            KeyList: coordinator.list,
            Inbox: coordinator.boxes.get(A, Inbox(digest, {})),
            Survivors: Survivors(digest, ABCD),
            Consents: Consents(digest, {}),
        }[kind]
        assert lie is not None
        ends_the_attempt(routed, (coordinator, A, lie), reasons.PHASE_WRONG, caplog)


def test_two_plans_at_once_from_two_threads_are_one_attempt(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An institution trains one plan at a time anyway; the member does not rely on that."""
    meet_at_marks(monkeypatch)
    member, plan = federation.member(A), federation.plan()

    def begin() -> Keys | str:
        try:
            return member.begin(plan, PARAMETERS, lambda former: kept(former, lambda: federation.train(A, plan)))
        except Refusal as refusal:
            return refusal.reason

    answers = at_once(begin, begin)
    assert [answer for answer in answers if not isinstance(answer, Keys)] == [reasons.ATTEMPT_OLD]
    assert federation.trained[A] == 1


def test_two_unmask_requests_at_once_reveal_once(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    coordinator = federation.coordinator()
    signatures = coordinator.consents()
    meeting, verifies = Meeting(), Roster.verifies

    def slowly(roster: Roster, name: str, signature: bytes, said: bytes) -> bool:
        meeting.wait()
        return verifies(roster, name, signature, said)

    monkeypatch.setattr(Roster, "verifies", slowly)
    answers = at_once(lambda: federation.ask(A, signatures), lambda: federation.ask(A, signatures))
    assert sum(isinstance(answer, Revealed) for answer in answers) == 1
    assert Refused(reasons.ATTEMPT_OVER, A) in answers


def test_two_survivor_sets_at_once_are_signed_once(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    coordinator = federation.coordinator()
    coordinator.masked()
    digest = coordinator.plan.digest()
    meet_at_marks(monkeypatch)
    answers = at_once(
        lambda: federation.ask(A, Survivors(digest, ABC)), lambda: federation.ask(A, Survivors(digest, ABCD))
    )
    assert sum(isinstance(answer, Consent) for answer in answers) == 1
    assert Refused(reasons.PHASE_WRONG, A) in answers
    gives_nothing_more(federation, coordinator, A)


class Meeting:
    """Where two threads wait for each other if both come this far; a lock lets only one."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2)

    def wait(self) -> None:
        with suppress(threading.BrokenBarrierError):
            self._barrier.wait(timeout=0.2)


def meet_at_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets two threads that both have read the marks wait for each other before either writes them."""
    meeting, write = Meeting(), marks_module.write_json

    def slowly(file: Path, value: Any) -> None:
        meeting.wait()
        write(file, value)

    monkeypatch.setattr(marks_module, "write_json", slowly)


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """What each call returns, all begun at the same moment in threads of their own."""
    gate = threading.Barrier(len(calls))
    answers: list[Any] = [None] * len(calls)

    def run(index: int) -> None:
        gate.wait()
        answers[index] = calls[index]()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers
