"""What the daemon says of itself, as messages come and go."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from client import events
from client.events import Event
from client.status import _PAUSE_S, IDLE, STARTING, Place, Status, StatusBoard
from common.errors import StorageError

FIRST = Status("1", 10, 11, "2020-01-31T12:00:00Z", 0, "coordinator:9443", STARTING, "2020-01-31T12:00:00Z")
PLACE = Place("run-1", 3, 7)


@pytest.fixture
def board() -> Iterator[StatusBoard]:
    made = StatusBoard(FIRST, lambda _: None)
    yield made
    made.close()


def test_the_connection_is_told_with_since_when(board: StatusBoard) -> None:
    board.tell(Event(events.UNREACHABLE, "x" * 10_000))
    assert (board.now.connection, board.now.about) == (events.UNREACHABLE, "x" * 400)
    assert board.now.since > FIRST.since
    board.tell(Event(events.CONNECTED))
    assert (board.now.connection, board.now.about) == (events.CONNECTED, "")


def test_messages_are_counted_and_what_it_is_at_is_told(board: StatusBoard) -> None:
    board.tell(Event(events.RECEIVED, "train.round"))
    assert board.now.doing == "train.round"
    board.heard("TrainRequest", PLACE)
    assert (board.now.doing, board.now.run, board.now.round, board.now.attempt) == ("TrainRequest", "run-1", 3, 7)
    board.leaves("Keys")
    board.tell(Event(events.ANSWERED))
    assert (board.now.doing, board.now.answered, board.now.run) == (IDLE, 1, "run-1")
    board.leaves("Refused", "paused")
    board.tell(Event(events.ANSWERED))
    assert (board.now.answered, board.now.refused, board.now.trouble) == (2, 1, "refused: paused")
    board.tell(Event(events.RECEIVED, "train.round"))
    board.tell(Event(events.LOST, "the disk is full"))
    assert (board.now.doing, board.now.lost, board.now.answered) == (IDLE, 1, 2)
    assert "the disk is full" in board.now.trouble


@pytest.mark.parametrize("last", ["Contribution", "Revealed", "Refused"])
def test_an_attempt_is_under_way_from_its_plan_to_the_last_word(board: StatusBoard, last: str) -> None:
    board.heard("Hello", Place("run-1"))
    assert not board.now.in_attempt
    board.heard("TrainRequest", PLACE)
    for kind in ("Keys", "Shares", "MaskedInput", "Consent"):
        board.leaves(kind)
        assert board.now.in_attempt
    board.heard("Consents", PLACE)
    board.leaves(last)
    assert not board.now.in_attempt


@pytest.mark.parametrize("next_one", ["Hello", "Published"])
def test_an_attempt_that_the_coordinator_gave_up_ends_with_its_next_word(board: StatusBoard, next_one: str) -> None:
    board.heard("TrainRequest", PLACE)
    board.heard(next_one, Place("run-1"))
    assert not board.now.in_attempt


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_many_changes_are_few_writes_and_the_last_is_always_written() -> None:
    written: list[Status] = []
    board = StatusBoard(FIRST, written.append)
    until(lambda: written == [FIRST])
    begin = time.monotonic()
    for number in range(200):
        board.heard("TrainRequest", Place("run-1", number))
        time.sleep(0.002)
    board.close()
    assert written[-1] == board.now
    assert written[-1].round == 199
    assert len(written) <= (time.monotonic() - begin) / _PAUSE_S + 3
    assert not board._thread.is_alive()


def test_one_that_ends_with_nothing_to_write_ends() -> None:
    written: list[Status] = []
    board = StatusBoard(FIRST, written.append)
    until(lambda: written == [FIRST] and not board._changed.is_set())
    time.sleep(2 * _PAUSE_S)  # now it waits for a change
    board.close()
    assert not board._thread.is_alive()


def test_a_disk_that_is_full_delays_a_status_and_nothing_else() -> None:
    full, written = threading.Event(), []
    full.set()

    def write(status: Status) -> None:
        if full.is_set():
            raise StorageError("no space left")
        written.append(status)

    board = StatusBoard(FIRST, write)
    board.heard("TrainRequest", PLACE)
    full.clear()
    board.heard("Consents", PLACE)
    until(lambda: written != [])
    assert written[-1].doing == "Consents"
    board.close()


@pytest.mark.parametrize("change", [{"worker": "11"}, {"more": 1}, {"worker": None}])
def test_a_status_of_another_form_is_none(change: dict[str, Any]) -> None:
    from dataclasses import asdict

    assert Status.from_json(asdict(FIRST)) == FIRST
    with pytest.raises(TypeError):
        Status.from_json({**asdict(FIRST), **change})
