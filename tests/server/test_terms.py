"""The numbers of a run: every configuration that can be meant has them, and they hold for its smallest group."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import Config, DataConfig, FederationConfig, PrivacyConfig, SecureAggregationConfig, named
from common.config_files import validate
from common.errors import ConfigError
from common.privacy import promise
from common.secagg.terms import OFF, Terms
from server.rounds import cohort_of
from server.terms import launch_line, launch_lines, terms_of


def configured(
    institutions: int, fraction: float = 1.0, least: int = 3, colluders: int = 1, enabled: bool = True
) -> Config:
    return Config(
        data=DataConfig(institutions=named(*(f"i{n}" for n in range(institutions))), train_records=[1] * institutions),
        federation=FederationConfig(fraction=fraction, min_cohort=least),
        secure_aggregation=SecureAggregationConfig(enabled=enabled, colluders=colluders),
    )


@given(st.integers(1, 40), st.floats(0.05, 1.0), st.integers(2, 12), st.integers(1, 10), st.booleans())
def test_a_configuration_that_can_be_meant_has_terms_and_every_round_keeps_them(
    institutions: int, fraction: float, least: int, colluders: int, enabled: bool
) -> None:
    config = configured(institutions, fraction, least, colluders, enabled)
    try:
        validate(config)
    except ConfigError:
        return
    terms = terms_of(config)
    assert (terms is not None) == enabled
    if terms is not None:
        cohorts = [cohort_of(config, config.data.names, number) for number in range(1, 15)]
        assert min(len(cohort) for cohort in cohorts) == terms.members
        assert terms.survivors - colluders >= 2


def test_the_smallest_group_that_can_have_a_round_counts() -> None:
    assert terms_of(configured(4)) == Terms.of(4, 1, 3)
    assert terms_of(configured(10, fraction=0.6)) == Terms.of(10, 1, 3)  # two groups of six would share members
    assert terms_of(configured(10, fraction=0.3)) == Terms.of(3, 1, 3)
    assert terms_of(configured(4), absent={"i2": "base_model_differs"}) == Terms.of(3, 1, 3)
    assert terms_of(configured(4, enabled=False)) is None


def test_a_group_that_misses_too_many_has_no_round() -> None:
    config = configured(10, fraction=0.5)
    absent = cohort_of(config, config.data.names, 1)[:3]
    assert terms_of(config, absent) == Terms.of(5, 1, 3)


@pytest.mark.parametrize(("enabled", "style"), [(True, ""), (False, "red")])
def test_without_secure_aggregation_the_line_is_red(enabled: bool, style: str) -> None:
    line = launch_line(configured(4, enabled=enabled))
    assert line.style == style
    assert line.plain == (Terms.of(4, 1, 3).told() if enabled else OFF)


@pytest.mark.parametrize(
    ("mode", "delta", "warned"), [("institution", 0.025, False), ("institution", 0.03, True), ("patient", 0.03, False)]
)
def test_a_coordinator_is_warned_of_a_delta_that_says_nothing_to_an_institution(
    mode: str, delta: float, warned: bool
) -> None:
    asked = replace(configured(4), privacy=PrivacyConfig(mode=mode, noise_multiplier=4.0, delta=delta))
    first, promised, *more = launch_lines(asked)
    assert first == launch_line(asked)
    assert (promised.style, f"is on, mode {mode}: epsilon at most" in promised.plain) == ("", True)
    assert [(line.style, "found 0.03 for 4 institutions" in line.plain) for line in more] == [("yellow", True)] * warned


def test_a_coordinator_is_told_that_there_is_no_differential_privacy() -> None:
    _, line = launch_lines(configured(4))
    assert (line.style, line.plain) == ("red", promise.OFF)


def test_a_coordinator_is_warned_of_an_epsilon_that_promises_little() -> None:
    asked = replace(configured(4), privacy=PrivacyConfig("patient", noise_multiplier=0.4))
    _, promised, warning = launch_lines(asked)
    assert warning.style == "yellow"
    assert "promises little to a single patient" in warning.plain
    assert promised.plain.split("at most ")[1].split()[0] in warning.plain
