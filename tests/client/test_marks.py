"""What a member never forgets of a run: numbers it answered, settings, and the one set that it consented to."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.marks import Marks
from common.errors import Refusal, StorageError
from common.messages import Plan
from common.secagg import reasons
from tests.federations import NAMES, Federation, adapter_of, federation_config

ONE, TWO = adapter_of(1), adapter_of(2)
FIVE = NAMES[:5]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """For its plans only."""
    return Federation(tmp_path_factory.mktemp("plans"), federation_config(FIVE))


@pytest.fixture
def marks(tmp_path: Path) -> Marks:
    return Marks(tmp_path / "home" / "run" / "marks.json")


def refusal(call: Any, *arguments: Any) -> str:
    with pytest.raises(Refusal) as raised:
        call(*arguments)
    return raised.value.reason


def test_what_a_mark_holds_and_that_it_is_synced(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, synced, fsync = tmp_path / "marks.json", [], os.fsync

    def sync(handle: int) -> None:
        synced.append(Path(f"/proc/self/fd/{handle}").readlink())
        fsync(handle)

    monkeypatch.setattr(os, "fsync", sync)
    Marks(file).accept(federation.plan(3))
    found = json.loads(file.read_text())
    terms = {"members": 5, "colluders": 1, "threshold": 4, "smallest": 3}
    assert found["sums"] == {ONE.digest(): {"round": 1, "cohort": list(FIVE), "terms": terms, "survivors": None}}
    assert (found["attempt"], len(found["settings"])) == (3, 64)
    assert [path.parent for path in synced] == [tmp_path, tmp_path.parent]  # the new file, then its directory
    synced.clear()
    Marks(file).consent(ONE.digest(), FIVE[:4])
    assert json.loads(file.read_text())["sums"][ONE.digest()]["survivors"] == list(FIVE[:4])
    assert len(synced) == 2


@given(st.lists(st.integers(1, 6), min_size=1, max_size=12))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_numbers_only_grow(
    federation: Federation, tmp_path_factory: pytest.TempPathFactory, numbers: list[int]
) -> None:
    marks, highest = Marks(tmp_path_factory.mktemp("home") / "marks.json"), 0
    for number in numbers:
        plan = federation.plan(number)
        if number > highest:
            marks.accept(plan)
            highest = number
        else:
            assert refusal(marks.accept, plan) == reasons.ATTEMPT_OLD


def test_another_object_on_the_same_file_remembers_it_all(federation: Federation, tmp_path: Path) -> None:
    file = tmp_path / "marks.json"
    Marks(file).accept(federation.plan(1))
    Marks(file).consent(ONE.digest(), FIVE)
    assert refusal(Marks(file).accept, federation.plan(1)) == reasons.ATTEMPT_OLD
    assert refusal(Marks(file).accept, federation.plan(2, FIVE[:4], first=5)) == reasons.SURVIVORS_DIFFER
    assert refusal(Marks(file).consent, ONE.digest(), FIVE[:4]) == reasons.SURVIVORS_DIFFER
    Marks(file).accept(federation.plan(2))


def test_the_first_plan_of_a_run_settles_its_settings(federation: Federation, marks: Marks) -> None:
    marks.accept(federation.plan(1))
    later = federation.plan(2, adapter=TWO, round=2)
    for changes in ({"seed": 9}, {"rounds": 5}, {"weighting": "uniform"}, {"evaluate": False}):
        changed = replace(later, settings=replace(later.settings, **changes))
        assert refusal(marks.accept, changed) == reasons.SETTINGS_DIFFER
    marks.accept(later)


@pytest.mark.parametrize(
    ("repeat", "reason"),
    [
        ({"cohort": FIVE[:4]}, reasons.TERMS_DIFFER),
        ({"cohort": FIVE[:3]}, reasons.TERMS_DIFFER),
        ({"cohort": NAMES[:6]}, reasons.TERMS_DIFFER),
        ({"cohort": NAMES[1:6], "first": 5}, reasons.COHORT_UNKNOWN),
        ({"cohort": FIVE[:4], "first": 5}, None),
        ({"cohort": FIVE}, None),
    ],
    ids=["lower n", "lower n and t", "higher n", "a new member", "fewer members", "the same"],
)
@pytest.mark.parametrize("number", [1, 2])
def test_a_repeat_has_the_first_ones_terms_and_no_more_than_its_members(
    repeat: dict[str, Any], reason: str | None, number: int, federation: Federation, marks: Marks
) -> None:
    """A repeat is what has the same global adapter, whatever round it says it is."""
    marks.accept(federation.plan(1))
    plan = federation.plan(2, round=number, **repeat)
    if reason is None:
        marks.accept(plan)
    else:
        assert refusal(marks.accept, plan) == reason


def test_the_first_attempt_counts_not_the_latest(federation: Federation, marks: Marks) -> None:
    for number, cohort in enumerate((FIVE, FIVE[:4], FIVE, FIVE[1:], FIVE), 1):
        marks.accept(federation.plan(number, cohort, first=5))


def test_another_adapter_is_another_sum_and_the_first_stays_settled(federation: Federation, marks: Marks) -> None:
    marks.accept(federation.plan(1))
    marks.consent(ONE.digest(), FIVE)
    marks.accept(federation.plan(2, FIVE[:3], TWO, round=2))
    marks.consent(TWO.digest(), FIVE[:3])
    assert refusal(marks.accept, federation.plan(3, FIVE[:4], first=5)) == reasons.SURVIVORS_DIFFER
    assert refusal(marks.consent, ONE.digest(), FIVE[:3]) == reasons.SURVIVORS_DIFFER
    marks.accept(federation.plan(3))


def test_the_same_set_can_be_consented_to_again(federation: Federation, marks: Marks) -> None:
    marks.accept(federation.plan(1))
    marks.consent(ONE.digest(), FIVE[:4])
    marks.accept(federation.plan(2, FIVE[:4], first=5))
    marks.consent(ONE.digest(), FIVE[:4])


def test_after_consent_only_exactly_that_set_may_be_invited(federation: Federation, marks: Marks) -> None:
    marks.accept(federation.plan(1))
    marks.consent(ONE.digest(), FIVE[:4])
    for cohort in (FIVE, FIVE[1:]):
        assert refusal(marks.accept, federation.plan(2, cohort, first=5)) == reasons.SURVIVORS_DIFFER
    marks.accept(federation.plan(2, FIVE[:4], first=5))


def test_what_is_refused_leaves_no_mark(federation: Federation, tmp_path: Path) -> None:
    file = tmp_path / "marks.json"
    marks = Marks(file)
    marks.accept(federation.plan(5))
    marks.consent(ONE.digest(), FIVE)
    before = file.read_bytes()
    plans: list[Plan] = [
        federation.plan(5),
        federation.plan(9, FIVE[:4]),
        federation.plan(9, FIVE[:4], first=5),
        replace(federation.plan(9), settings=replace(federation.plan(9).settings, seed=9)),
    ]
    for plan in plans:
        refusal(marks.accept, plan)
    refusal(marks.consent, ONE.digest(), FIVE[:4])
    assert file.read_bytes() == before


def test_no_consent_to_a_sum_of_which_no_attempt_was_accepted(federation: Federation, tmp_path: Path) -> None:
    marks = Marks(tmp_path / "marks.json")
    for _ in range(2):
        with pytest.raises(StorageError, match="does not hold the attempt under way"):
            marks.consent(ONE.digest(), FIVE)
        if not (tmp_path / "marks.json").exists():
            marks.accept(federation.plan(1, adapter=TWO))


def test_a_mark_that_cannot_be_kept_is_no_mark(
    federation: Federation, marks: Marks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    marks.accept(federation.plan(1))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        marks.accept(federation.plan(2))
    with pytest.raises(StorageError, match="No space left on device"):
        marks.consent(ONE.digest(), FIVE)
    monkeypatch.undo()
    marks.accept(federation.plan(2, FIVE[:4], first=5))
    marks.consent(ONE.digest(), FIVE[:4])


def test_an_adapter_that_differs_in_a_sign_of_zero_opens_no_second_sum_in_a_round(
    marks: Marks, federation: Federation
) -> None:
    """Its update is the same, so the sum over one member fewer would tell that member's vector exactly."""
    marks.accept(federation.plan(1))
    marks.accept(federation.plan(2, adapter=TWO))  # nothing was consented to yet
    marks.consent(ONE.digest(), FIVE)
    assert refusal(marks.consent, TWO.digest(), FIVE[:4]) == reasons.SURVIVORS_DIFFER
    for number in (1, 2):
        fewer = replace(federation.plan(3, FIVE[:4], adapter=TWO, first=5), round=number)
        assert refusal(marks.accept, fewer) == reasons.SURVIVORS_DIFFER
    marks.accept(replace(federation.plan(4, FIVE[:4], adapter=adapter_of(3)), round=2))
