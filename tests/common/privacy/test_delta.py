"""How small a delta must be: told exactly where it is too large, with a number that is not."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from common.config import PrivacyConfig
from common.privacy.delta import about_institutions, delta_warning, largest_delta


@pytest.mark.parametrize(("units", "largest"), [(1, 0.1), (3, 0.033), (60, 0.0016), (1000, 1e-4), (1022, 9.7e-5)])
def test_the_largest_delta_is_one_in_ten_times_the_units_rounded_down(units: int, largest: float) -> None:
    assert largest_delta(units) == largest


@given(st.integers(1, 10**9))
@example(400)
def test_what_is_told_is_small_enough_and_hardly_smaller_than_it_must_be(units: int) -> None:
    told = largest_delta(units)
    assert 0.9 / (10 * units) < told <= 1 / (10 * units)
    assert delta_warning("delta", told, units, "patient", "here") is None


@given(st.integers(1, 10**9))
def test_exactly_a_larger_one_is_warned_of(units: int) -> None:
    most = 1 / (10 * units)
    assert delta_warning("delta", most, units, "patient", "here") is None
    assert delta_warning("delta", math.nextafter(most, 1), units, "patient", "here") is not None


def test_a_warning_says_what_was_found_what_was_expected_and_what_to_do() -> None:
    told = delta_warning("privacy.delta", 0.01, 60, "patient", "here")
    assert told is not None
    assert told.startswith(
        "privacy.delta: found 0.01 for 60 patients here; expected at most 0.0016, which is 1 / (10 x 60)"
    )
    assert told.endswith("set it to 0.0016 or less")
    one = delta_warning("privacy.delta", 0.2, 1, "institution", "here")
    assert one is not None
    assert "for 1 institution here" in one


def test_institutions_are_counted_where_they_are_the_unit_and_only_there() -> None:
    asked = PrivacyConfig(mode="institution", noise_multiplier=1.0, delta=0.01)
    assert about_institutions(asked, 10) is None
    told = about_institutions(asked, 11)
    assert told is not None
    assert "found 0.01 for 11 institutions in the run; expected at most 0.009," in told
    assert about_institutions(replace(asked, mode="patient"), 1000) is None
