"""The numbers of an attempt, against the inequalities they must hold and against cases by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError
from common.secagg.terms import Terms, smallest_cohort, threshold


@given(st.integers(3, 200), st.integers(1, 50), st.integers(3, 60))
def test_two_survivor_sets_share_more_honest_signers_than_there_are(
    members: int, colluders: int, smallest: int
) -> None:
    try:
        terms = Terms.of(members, colluders, smallest)
    except ConfigError:
        assert smallest < colluders + 2 or smallest > members
        return
    assert 2 * terms.threshold - members > colluders  # members of both sets, of whom one is honest
    assert 2 * (terms.threshold - 1) - members <= colluders  # no smaller threshold is safe
    assert terms.survivors - colluders >= 2
    assert 0 <= terms.dropouts == members - max(terms.threshold, smallest)


@pytest.mark.parametrize(
    ("members", "colluders", "smallest", "least", "dropouts"),
    [(3, 1, 3, 3, 0), (4, 1, 3, 3, 1), (5, 1, 3, 4, 1), (5, 1, 5, 4, 0), (16, 1, 3, 9, 7), (10, 3, 5, 7, 3)],
)
def test_by_hand(members: int, colluders: int, smallest: int, least: int, dropouts: int) -> None:
    terms = Terms.of(members, colluders, smallest)
    assert (terms.threshold, terms.dropouts) == (least, dropouts)


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((4, 0, 3, 3), "expected at least 1 colluder to be tolerated, found 0"),
        ((4, 1, 3, 2), "expected a smallest cohort of at least 3 with 1 colluders.*found 2"),
        ((6, 2, 5, 3), "expected a smallest cohort of at least 4 with 2 colluders.*found 3"),
        ((3, 1, 3, 4), "expected a cohort of at least 4 members, found 3"),
        ((5, 1, 3, 3), "expected a threshold from 4 to 5 for 5 members and 1 colluders, found 3"),
        ((5, 1, 6, 3), "expected a threshold from 4 to 5 for 5 members and 1 colluders, found 6"),
    ],
)
def test_numbers_that_hide_nobody_are_refused(numbers: tuple[int, int, int, int], said: str) -> None:
    with pytest.raises(ConfigError, match=f"secure aggregation: {said}"):
        Terms(*numbers)


def test_the_smallest_cohort_keeps_two_honest_ones() -> None:
    assert [smallest_cohort(colluders) for colluders in (1, 2, 5)] == [3, 4, 7]
    assert [threshold(4, 1), threshold(5, 1)] == [3, 4]


def test_the_line_at_launch_says_who_may_fall_silent_and_who_may_collude() -> None:
    three, four = Terms.of(3, 1, 3).told(), Terms.of(4, 1, 3).told()
    assert "of 3 institutions a round none may fall silent" in three
    assert "of 4 institutions a round up to 1 may fall silent" in four
    assert "the sum over at least 3 of them and no single update, also when one of them colludes with it" in four
    assert "up to 3 of them collude" in Terms.of(10, 3, 5).told()
    assert "\n" not in four


def test_as_it_stands_in_a_summary() -> None:
    assert Terms.of(4, 1, 3).as_dict() == {
        "cohort": 4, "colluders": 1, "threshold": 3, "smallest_sum": 3, "dropouts": 1,
    }  # fmt: skip
