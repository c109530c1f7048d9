"""The coordinator's file of attempts: numbers are never used twice, and a set that was named once stays named."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError, RunStopped, StorageError
from common.secagg.aggregator import AttemptFailed
from common.secagg.terms import Terms
from server.attempts import Attempts, Begun

FOUR = ("alder", "birch", "cedar", "dogwood")
FIVE = (*FOUR, "elm")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run" / "attempts.json"


def begun(attempts: Attempts, adapter: str = "one", invited: tuple[str, ...] = FOUR) -> Begun:
    return attempts.begin(adapter, invited, colluders=1, smallest=3)[0]


def test_the_first_attempt_of_a_run_is_number_one(file: Path) -> None:
    assert not file.exists()
    found, terms = Attempts(file).begin("one", FOUR, 1, 3)
    assert found == Begun(1, "one", FOUR, None)
    assert terms == Terms.of(4, 1, 3)


def test_numbers_count_through_adapters_and_processes(file: Path) -> None:
    found = [begun(Attempts(file), adapter) for adapter in ("one", "one", "two", "one", "three")]
    assert [one.number for one in found] == [1, 2, 3, 4, 5]
    assert [one.tries for one in found] == [1, 2, 1, 3, 1]


def test_an_attempt_is_on_disk_before_anybody_can_be_told(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    fsync = os.fsync

    def sync(handle: int) -> None:
        synced.append(Path(f"/proc/self/fd/{handle}").readlink())
        fsync(handle)

    monkeypatch.setattr(os, "fsync", sync)
    attempts = Attempts(file)
    begun(attempts)
    assert json.loads(file.read_text()) == [
        {"number": 1, "adapter": "one", "members": list(FOUR), "survivors": None, "tries": 1},
    ]  # fmt: skip
    assert [path.parent.name for path in synced] == ["run", file.parent.parent.name]
    synced.clear()
    attempts.name(FOUR[:3])
    assert json.loads(file.read_text())[0]["survivors"] == list(FOUR[:3])
    assert len(synced) == 2  # the new file, and the directory that names it


@pytest.mark.parametrize("resumed", [False, True])
def test_a_repeat_keeps_the_terms_of_the_first_attempt(resumed: bool, file: Path) -> None:
    attempts = Attempts(file)
    attempts.begin("one", FIVE, 1, 3)
    found, terms = (Attempts(file) if resumed else attempts).begin("one", FOUR, 1, 3)
    assert (found.number, found.members) == (2, FOUR)
    assert terms == Terms.of(5, 1, 3)


def test_a_repeat_invites_nobody_new(file: Path) -> None:
    attempts = Attempts(file)
    begun(attempts, invited=FOUR)
    assert begun(attempts, invited=FIVE).members == FOUR


def test_who_was_left_out_may_be_invited_again(file: Path) -> None:
    attempts = Attempts(file)
    assert [begun(attempts, invited=names).members for names in (FIVE, FOUR, FIVE)] == [FIVE, FOUR, FIVE]


@pytest.mark.parametrize("resumed", [False, True])
def test_once_a_set_is_named_exactly_that_set_is_invited(resumed: bool, file: Path) -> None:
    attempts = Attempts(file)
    begun(attempts, invited=FIVE)
    attempts.name(FOUR)
    if resumed:
        attempts = Attempts(file)
    for invited in (FIVE, FIVE[1:], ("elm",)):
        assert begun(attempts, invited=invited).members == FOUR


@pytest.mark.parametrize("resumed", [False, True])
def test_once_a_set_is_named_no_other_is(resumed: bool, file: Path) -> None:
    """Whoever consented to the first would refuse the second; the first one can still be completed."""
    attempts = Attempts(file)
    begun(attempts, invited=FIVE)
    attempts.name(FIVE)
    if resumed:
        attempts = Attempts(file)
    with pytest.raises(
        AttemptFailed,
        match=r"4 of the 5 members whose sum was named are left \(without dogwood\).*consent to no other set",
    ):
        attempts.name((*FOUR[:3], "elm"))
    assert begun(attempts, invited=FOUR).members == FIVE
    attempts.name(FIVE)


def test_another_adapter_begins_anew(file: Path) -> None:
    attempts = Attempts(file)
    begun(attempts, "one", FIVE)
    attempts.name(FOUR)
    found, terms = attempts.begin("two", FIVE[:3], 1, 3)
    assert found == Begun(2, "two", FIVE[:3], None)
    assert terms == Terms.of(3, 1, 3)


@pytest.mark.parametrize("resumed", [False, True])
def test_an_older_sum_is_gone_back_to_as_it_was(resumed: bool, file: Path) -> None:
    """A damaged checkpoint makes a coordinator repeat a round whose members remember what they consented to."""
    attempts = Attempts(file)
    begun(attempts, "one", FIVE)
    attempts.name(FOUR)
    begun(attempts, "two", FIVE)
    if resumed:
        attempts = Attempts(file)
    found, terms = attempts.begin("one", FIVE, 1, 3)
    assert found == Begun(3, "one", FOUR, FOUR, 2)
    assert terms == Terms.of(5, 1, 3)


def test_only_the_latest_sums_are_kept(file: Path) -> None:
    attempts = Attempts(file)
    for adapter in ("one", "two", "three", "four", "five", "four"):
        begun(attempts, adapter)
    assert [(one["adapter"], one["number"]) for one in json.loads(file.read_text())] == [
        ("four", 6), ("five", 5), ("three", 3), ("two", 2),
    ]  # fmt: skip


def test_a_group_that_shares_nobody_with_the_first_begins_a_sum_of_its_own(file: Path) -> None:
    """Sums over sets that do not meet tell nothing of each other."""
    attempts = Attempts(file)
    begun(attempts, "one", FIVE)
    attempts.name(FIVE)
    others = ("fir", "gorse", "hazel")
    assert begun(attempts, "one", others) == Begun(2, "one", others, None)


def test_too_few_for_a_repeat_stop_the_run_and_spend_no_number(file: Path) -> None:
    attempts = Attempts(file)
    begun(attempts, invited=FIVE)
    with pytest.raises(RunStopped, match="3 institutions are left of the 5 that this round began with, 4 are needed"):
        begun(attempts, invited=FOUR[:3])
    assert json.loads(file.read_text())[0]["number"] == 1
    assert begun(attempts, invited=FOUR).number == 2


def test_a_cohort_that_cannot_hide_its_members_is_refused_and_spends_no_number(file: Path) -> None:
    with pytest.raises(ConfigError, match="expected a cohort of at least 3 members, found 2"):
        begun(Attempts(file), invited=FOUR[:2])
    assert not file.exists()


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda file: file.write_text(""), id="empty"),
        pytest.param(lambda file: file.write_bytes(file.read_bytes()[:-12]), id="cut short"),
        pytest.param(lambda file: file.write_bytes(b"\xff"), id="not text"),
        pytest.param(lambda file: file.write_text("[]"), id="nothing in it"),
        pytest.param(lambda file: file.write_text("{}"), id="an object"),
        pytest.param(lambda file: file.write_text("3"), id="a number"),
        pytest.param(lambda file: file.write_text('[{"number": 3}]'), id="a part of it"),
        pytest.param(
            lambda file: file.write_text('[{"number": null, "adapter": "", "members": [], "survivors": null}]'),
            id="no number",
        ),
        pytest.param(lambda file: (file.unlink(), file.mkdir()), id="a directory"),
    ],
)
def test_a_damaged_file_is_refused_with_a_remedy(damage: Callable[[Path], Any], file: Path) -> None:
    """A run that began to count anew would be refused by every member, and might name another set."""
    begun(Attempts(file))
    damage(file)
    with pytest.raises(StorageError, match=r"attempts\.json cannot be read.*Restore it, or start a new run"):
        Attempts(file)


@pytest.mark.parametrize("step", ["begin", "name"])
def test_on_a_full_disk_nothing_is_begun_and_no_set_is_named(
    step: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = Attempts(file)
    begun(attempts)
    before = file.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        begun(attempts) if step == "begin" else attempts.name(FOUR)
    assert file.read_bytes() == before
    monkeypatch.undo()
    assert begun(attempts) == Begun(2, "one", FOUR, None, 2)
