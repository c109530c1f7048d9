"""Groups that take turns: none is too small, and no two cohorts overlap without being the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import Config
from common.errors import RunStopped
from common.secagg.terms import Terms
from server.rounds import cohort_of, groups_of
from tests.federations import NAMES, Federation, WiredMembers, adapter_of, federation_config, fitting
from tests.server.secure.conftest import attempts_of, collect, is_the_plain_sum


def grouped(count: int, fraction: float, least: int, seed: int = 4) -> Config:
    names = tuple(f"clinic-{number:02d}" for number in range(count))
    return replace(federation_config(names, fraction=fraction, min_cohort=least), seed=seed)


@given(st.integers(3, 40), st.floats(0.05, 1.0), st.integers(3, 8), st.integers(0, 9))
@settings(deadline=None, derandomize=True, max_examples=100)
def test_groups_part_all_institutions_and_none_is_too_small(count: int, fraction: float, least: int, seed: int) -> None:
    if count < least:
        return
    config = grouped(count, fraction, least, seed)
    groups = groups_of(config)
    assert sorted(name for group in groups for name in group) == sorted(config.data.names)
    assert all(len(group) >= max(least, round(fraction * count)) for group in groups)
    assert groups == groups_of(replace(config, name="another", federation=replace(config.federation, rounds=9)))


def test_the_whole_federation_is_one_group_unless_a_fraction_is_asked_for() -> None:
    config = grouped(9, 1.0, 3)
    assert {cohort_of(config, config.data.names, number) for number in range(1, 9)} == {config.data.names}


def test_groups_take_turns_and_two_cohorts_are_the_same_or_have_nobody_in_common() -> None:
    """The sums of two cohorts that differ by one member would differ by its update."""
    config = grouped(12, 0.34, 3)
    cohorts = [cohort_of(config, config.data.names, number) for number in range(1, 10)]
    assert len(set(cohorts)) == 3
    assert cohorts == cohorts[:3] * 3
    assert all(one == other or not set(one) & set(other) for one in cohorts for other in cohorts)


@given(st.sets(st.integers(0, 11), max_size=9), st.integers(1, 6))
@settings(deadline=None, derandomize=True, max_examples=100)
def test_who_is_away_moves_nobody_to_another_group(away: set[int], number: int) -> None:
    config = grouped(12, 0.34, 3)
    groups = groups_of(config)
    present = tuple(name for index, name in enumerate(config.data.names) if index not in away)
    able = [group for group in groups if len(set(group) & set(present)) >= 3]
    if not able:
        with pytest.raises(RunStopped, match=f"{len(present)} institutions are present, but no group"):
            cohort_of(config, present, number)
        return
    cohort = cohort_of(config, present, number)
    (group,) = [group for group in able if set(cohort) <= set(group)]
    assert cohort == tuple(name for name in group if name in present)
    assert len(cohort) >= 3


def test_in_the_clear_cohorts_are_drawn_anew() -> None:
    config = grouped(12, 0.34, 3)
    config = replace(config, secure_aggregation=replace(config.secure_aggregation, enabled=False))
    assert len({cohort_of(config, config.data.names, number) for number in range(1, 10)}) > 3


def test_a_group_sums_under_terms_of_its_own(tmp_path: Path) -> None:
    federation = Federation(tmp_path, federation_config(NAMES, fraction=0.45))
    for number in (1, 2):
        adapter = adapter_of(number)
        cohort = cohort_of(federation.config, NAMES, number)
        members = WiredMembers(federation)
        collected = collect(federation, members, adapter, number, cohort)
        assert is_the_plain_sum(federation, collected, cohort, members=len(cohort), adapter=adapter)
        (plan,) = attempts_of(members)
        assert plan.secure is not None
        assert plan == fitting(plan)
        assert plan.secure.terms == Terms.of(len(cohort), 1, 3)
    assert sum(federation.trained.values()) == len(NAMES)
