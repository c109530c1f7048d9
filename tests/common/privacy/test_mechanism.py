"""From settings to the mechanism of a run: steps, noise and what a round costs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.config import PrivacyConfig, QuantiseConfig
from common.errors import ConfigError
from common.privacy.accounting import Event, epsilon
from common.privacy.mechanism import noise_multiplier, round_event, shared_noise, steps_per_round
from common.secagg.terms import Terms

DELTA = 1e-5
TERMS = Terms.of(5, 1, 3)
QUANTISE = QuantiseConfig()


@pytest.mark.parametrize(("passes", "rate", "steps"), [(1.0, 0.1, 10), (2.5, 0.5, 5), (0.1, 1.0, 1), (3.0, 1.0, 3)])
def test_a_round_has_the_steps_in_which_a_unit_is_expected_that_often(passes: float, rate: float, steps: int) -> None:
    assert steps_per_round(passes, rate) == steps


def test_the_noise_that_is_solved_for_keeps_the_whole_run_within_its_epsilon_and_is_little_more() -> None:
    privacy = PrivacyConfig("record", epsilon=3.0, delta=DELTA, sampling_rate=0.1)
    sigma = noise_multiplier(privacy, rounds=4, steps=10)
    assert 2.9 < epsilon([Event("gaussian", sigma, 0.1, 40)], DELTA).bound <= 3.0
    assert noise_multiplier(privacy, rounds=8, steps=10) > sigma
    assert noise_multiplier(replace(privacy, epsilon=0.0, noise_multiplier=0.7), rounds=8, steps=10) == 0.7


@pytest.mark.parametrize("mode", ["record", "patient"])
def test_a_round_of_dp_sgd_costs_its_steps_at_its_rate(mode: str) -> None:
    privacy = PrivacyConfig(mode, noise_multiplier=1.5, sampling_rate=0.25)
    assert round_event(privacy, QUANTISE, 2.0, 7, 100, None) == Event("gaussian", 1.5, 0.25, 8)


@pytest.mark.parametrize(("mode", "rate"), [("institution", 1.0), ("distributed", 0.25)])
def test_a_round_of_noise_in_shares_is_one_step_and_sampled_only_where_units_are(mode: str, rate: float) -> None:
    privacy = PrivacyConfig(mode, noise_multiplier=1.5, sampling_rate=0.25)
    event = round_event(privacy, QUANTISE, 2.0, 7, 100, TERMS)
    assert event is not None
    assert (event.mechanism, event.q, event.steps) == ("discrete-gaussian", rate, 1)
    assert 1.5 <= event.sigma < 1.501
    assert event == shared_noise(privacy, QUANTISE, 100, 7, TERMS).event()


def test_only_the_noise_of_members_that_stay_and_do_not_collude_is_counted_on() -> None:
    privacy = PrivacyConfig("institution", noise_multiplier=1.0)
    noise = shared_noise(privacy, QUANTISE, 100, 7, TERMS)
    assert (noise.members, noise.honest) == (5, TERMS.threshold - TERMS.colluders)


def test_without_differential_privacy_nothing_is_spent() -> None:
    assert round_event(PrivacyConfig(), QUANTISE, 1.0, 7, 100, TERMS) is None


@pytest.mark.parametrize("mode", ["institution", "distributed"])
def test_noise_in_shares_without_secure_aggregation_has_no_cost_to_tell(mode: str) -> None:
    with pytest.raises(ConfigError, match=f"expected secure aggregation with {mode}"):
        round_event(PrivacyConfig(mode, noise_multiplier=1.0), QUANTISE, 1.0, 7, 100, None)


@pytest.mark.parametrize("mode", ["institution", "distributed"])
def test_noise_that_no_ring_can_hold_is_refused(mode: str) -> None:
    privacy = PrivacyConfig(mode, noise_multiplier=1e6)
    with pytest.raises(ConfigError, match=r"quantise: .*lower quantise\.bits or ask for less noise"):
        round_event(privacy, QUANTISE, 1.0, 7, 100, TERMS)
