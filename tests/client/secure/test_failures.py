"""What fails at the member itself: restarts, damaged marks, full disks, an update; nothing is signed twice for it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.messages import INTERNAL_ERROR, STORAGE_FAILED, Plan, Refused
from common.secagg import reasons
from common.secagg.identity import Identity
from common.secagg.messages import KeyList, Keys, Survivors
from tests.client.secure.conftest import (
    ABC,
    ABCD,
    A,
    B,
    C,
    D,
    consented,
    ends_the_attempt,
    gives_nothing_more,
    refuses_plan,
    settings_changed,
)
from tests.federations import ADAPTER, Federation, told


def test_after_a_restart_the_old_attempt_is_unknown_and_its_number_is_spent(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    coordinator = federation.coordinator()
    boxes = coordinator.shares()
    federation.restart(A)
    for request in (boxes[A], coordinator.list, Survivors(coordinator.plan.digest(), ABCD)):
        assert request is not None
        assert federation.ask(A, request) == Refused(reasons.ATTEMPT_UNKNOWN, A)
    assert told(caplog.records, f"silotune.client.{A}", reasons.ATTEMPT_UNKNOWN)
    refuses_plan(federation, coordinator.plan, reasons.ATTEMPT_OLD, caplog)
    repeat = federation.coordinator(federation.plan(2))
    assert repeat.sum().tobytes() == federation.total(repeat.plan, ABCD).tobytes()
    assert federation.trained == {A: 2, B: 1, C: 1, D: 1}  # what it had computed went with the process


def test_after_a_restart_what_a_member_signed_still_binds_it(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    federation.coordinator().consents()
    federation.restart(A)
    refuses_plan(federation, federation.plan(2, ABC, first=4), reasons.SURVIVORS_DIFFER, caplog)
    changed = settings_changed(federation.plan(2), seed=5)
    refuses_plan(federation, changed, reasons.SETTINGS_DIFFER, caplog)
    repeat = federation.coordinator(federation.plan(2))
    repeat.masked()
    lie = Survivors(repeat.plan.digest(), ABC)
    ends_the_attempt(federation, (repeat, A, lie), reasons.SURVIVORS_DIFFER, caplog)


def test_a_mark_is_on_disk_before_the_signature_it_stands_for_exists(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int, Any]] = []
    sign = Identity.sign

    def looking(identity: Identity, said: bytes) -> bytes:
        marks = json.loads(federation.marks(identity.name).read_text())
        for purpose in ("keys", "survivors"):
            if b"s" + len(purpose).to_bytes(8, "big") + purpose.encode() in said:
                seen.append((purpose, marks["attempt"], marks["sums"][ADAPTER.digest()]["survivors"]))
        return sign(identity, said)

    monkeypatch.setattr(Identity, "sign", looking)
    federation.coordinator().sum()
    assert [found for found in seen if found[0] == "survivors"] == [("survivors", 1, list(ABCD))] * 4
    assert all(found[1] == 1 for found in seen)
    assert sum(found[0] == "keys" for found in seen) >= 4


DAMAGE = [
    pytest.param(lambda file: file.write_text(""), id="empty"),
    pytest.param(lambda file: file.write_bytes(file.read_bytes()[:-20]), id="cut short"),
    pytest.param(lambda file: file.write_bytes(b"\xff\xfe\x00"), id="not text"),
    pytest.param(lambda file: file.write_text("7"), id="a number"),
    pytest.param(lambda file: file.write_text("[]"), id="a list"),
    pytest.param(lambda file: file.write_text("{}"), id="an empty object"),
    pytest.param(lambda file: file.write_text('{"attempt": "1", "settings": "", "sums": {}}'), id="text for a number"),
    pytest.param(lambda file: file.write_text('{"attempt": NaN, "settings": "", "sums": {}}'), id="no number"),
    pytest.param(lambda file: file.write_text('{"attempt": 0, "settings": "", "sums": []}'), id="a list of sums"),
    pytest.param(lambda file: (file.unlink(), file.mkdir()), id="a directory"),
    pytest.param(lambda file: (file.unlink(), file.symlink_to(file)), id="a loop"),
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_member_with_damaged_marks_answers_no_plan(
    damage: Callable[[Path], Any], federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    federation.coordinator().sum()
    damage(federation.marks(A))
    trained = federation.trained[A]
    assert federation.announce(A, federation.plan(2, round=2)) == Refused(STORAGE_FAILED, A)
    assert federation.trained[A] == trained
    (line,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert line.name == f"silotune.client.{A}"
    assert line.exc_info is not None
    assert "marks.json cannot be read" in str(line.exc_info[1])
    assert "restore it, or start a new run" in str(line.exc_info[1])


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_member_whose_marks_are_damaged_in_mid_attempt_signs_nothing(
    damage: Callable[[Path], Any], federation: Federation
) -> None:
    coordinator = federation.coordinator()
    named = coordinator.masked()
    damage(federation.marks(A))
    assert federation.ask(A, named) == Refused(STORAGE_FAILED, A)
    gives_nothing_more(federation, coordinator, A)


def test_a_member_whose_marks_are_gone_in_mid_attempt_signs_nothing(federation: Federation) -> None:
    coordinator = federation.coordinator()
    named = coordinator.masked()
    federation.marks(A).unlink()
    assert federation.ask(A, named) == Refused(STORAGE_FAILED, A)
    gives_nothing_more(federation, coordinator, A)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Fills the disk from when it is called."""

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    return lambda: monkeypatch.setattr("os.fsync", full)


def test_on_a_full_disk_no_plan_is_answered(
    federation: Federation, full_disk: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    full_disk()
    assert federation.announce(A, federation.plan()) == Refused(STORAGE_FAILED, A)
    assert federation.trained[A] == 0
    assert list(federation.marks(A).parent.iterdir()) == []
    (line,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert line.name == f"silotune.client.{A}"
    assert "No space left on device" in str(line.exc_info and line.exc_info[1])


def test_on_a_full_disk_no_survivor_set_is_signed(
    federation: Federation, full_disk: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator = federation.coordinator()
    named = coordinator.masked()
    full_disk()
    assert federation.ask(A, named) == Refused(STORAGE_FAILED, A)
    gives_nothing_more(federation, coordinator, A)
    monkeypatch.undo()  # there is room again: a repeat may still be over any set
    assert consented(federation, A) is None
    assert isinstance(federation.announce(A, federation.plan(2, ABC, first=4)), Keys)


def test_an_update_that_fails_leaves_no_attempt_and_spends_the_number(federation: Federation) -> None:
    def fail(name: str, plan: Plan) -> Any:
        raise RuntimeError("the records of patient 4711")

    seat = federation.seats[A]
    federation.seats[A] = replace(seat, train=fail)
    assert federation.announce(A, federation.plan()) == Refused(INTERNAL_ERROR, A)
    assert federation.ask(A, KeyList(federation.plan().digest(), {})) == Refused(reasons.ATTEMPT_UNKNOWN, A)
    federation.seats[A] = seat
    assert federation.announce(A, federation.plan()) == Refused(reasons.ATTEMPT_OLD, A)
    assert isinstance(federation.announce(A, federation.plan(2)), Keys)
