"""Splits by person: nobody in two sets, the same person in the same set everywhere, shares as asked."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import DataError
from common.records import Record
from common.splits import Shares, place_of, split, split_held_out

SETS = ("train", "validation", "test", "central_validation", "central_test")


def records_of(persons: range, each: int = 2, place: str = "") -> list[Record]:
    return [Record("", f"{place} says {n}", f"p{person}") for n in range(each) for person in persons]


def sets_of(shares: Shares) -> dict[str, str]:
    """Each person's set. Fails for one who is in two."""
    found: dict[str, str] = {}
    for name in SETS:
        for person in {record.person for record in getattr(shares, name)}:
            assert person not in found
            found[person] = name
    return found


@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.24), st.booleans())
def test_every_record_is_in_one_set_in_order_and_every_person_too(seed: int, share: float, lends: bool) -> None:
    records = records_of(range(300))
    shares = split(records, share, seed, lends, "notes.csv")
    found = [record for name in SETS for record in getattr(shares, name)]
    assert sorted(found, key=records.index) == records
    assert all(list(part) == sorted(part, key=records.index) for part in (shares.train, shares.test))
    assert len(sets_of(shares)) == 300
    assert bool(shares.central_test) == bool(shares.central_validation) == lends
    for name in SETS[1 : 5 if lends else 3]:
        persons = len({record.person for record in getattr(shares, name)})
        # Five standard deviations of a binomial.
        assert abs(persons - 300 * share) < 5 * math.sqrt(300 * share * (1 - share))


def test_somebody_known_by_the_same_key_is_in_the_same_set_everywhere() -> None:
    one = sets_of(split(records_of(range(200), place="alder"), 0.1, 7, True, ""))
    other = sets_of(split(records_of(range(100, 300), 1, place="birch"), 0.1, 7, True, ""))
    shared = set(one) & set(other)
    assert len(shared) == 100
    assert all(one[person] == other[person] for person in shared)
    assert one != sets_of(split(records_of(range(200)), 0.1, 8, True, ""))


def test_places_are_known_once_and_for_all() -> None:
    """A split must be the same on every machine and in every version."""
    assert [round(place_of(person, 1), 6) for person in ("17", "p0", "é")] == [0.262166, 0.996453, 0.417317]


def test_places_are_even() -> None:
    found = [place_of(str(person), 3) for person in range(4000)]
    for tenth in range(10):
        assert abs(sum(1 for place in found if int(10 * place) == tenth) - 400) < 5 * math.sqrt(400 * 0.9)


@pytest.mark.parametrize("persons", [1, 3])
def test_too_few_persons_are_told_with_what_to_do(persons: int) -> None:
    with pytest.raises(
        DataError, match=r"notes\.csv: .*found \d in \d+ records, of which none falls into .*data\.held_out"
    ):
        split(records_of(range(persons)), 0.1, 1, False, "notes.csv")
    with pytest.raises(DataError, match="none falls into"):
        split_held_out(records_of(range(1)), 1, "central.csv")


def test_the_coordinators_file_is_halved_by_person() -> None:
    validation, test = split_held_out(records_of(range(200)), 1, "central.csv")
    assert not {record.person for record in validation} & {record.person for record in test}
    assert len(validation) + len(test) == 400
    assert 150 < len(validation) < 250
