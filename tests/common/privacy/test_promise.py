"""What is told of a run's privacy before it is launched: as much as its rounds will cost, and never nothing."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from common import config_files
from common.config import Config
from common.errors import ConfigError
from common.privacy.accounting import epsilon
from common.privacy.mechanism import round_event
from common.privacy.promise import MOST, promise_of
from common.secagg.terms import Terms

ROUNDS = 3


def asked(mode: str, *more: str) -> Config:
    return config_files.load("smoke", [f"privacy.mode={mode}", f"federation.rounds={ROUNDS}", *more])


def cost(config: Config, parameters: int) -> float:
    """Of all rounds, as institutions spend them."""
    terms = Terms.of(3, 1, 3) if config.privacy.shared_noise else None
    event = round_event(config.privacy, config.quantise, config.train.passes_per_round, ROUNDS, parameters, terms)
    assert event is not None
    return epsilon([event] * ROUNDS, config.privacy.delta).bound


@pytest.mark.parametrize("noise", ["privacy.epsilon=4", "privacy.noise_multiplier=3"])
@pytest.mark.parametrize("mode", ["record", "patient", "institution", "distributed"])
def test_it_is_what_the_rounds_will_cost_and_no_less(mode: str, noise: str) -> None:
    config = asked(mode, noise, "privacy.sampling_rate=0.5")
    found = promise_of(config)
    assert found is not None
    assert all(cost(config, parameters) <= found.epsilon for parameters in (10, 5000))
    # Noise in shares is rounded up to what its scale can be, in at least eight digits of it.
    assert found.epsilon == pytest.approx(cost(config, 5000), rel=2e-3)
    steps = {"record": 2 * ROUNDS, "patient": 2 * ROUNDS}.get(mode, ROUNDS)
    assert (found.mode, found.delta, found.steps) == (mode, config.privacy.delta, steps)


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("record", ["for each record", "6 steps (3 rounds)", "against everybody"]),
        ("patient", ["for each patient", "against everybody"]),
        ("institution", ["for each institution", "3 steps, against whoever sees the sums, one member among them"]),
        ("distributed", ["for each record", "a round that is repeated counts again"]),
    ],
)
def test_the_line_says_for_whom_it_holds_and_against_whom(mode: str, words: Sequence[str]) -> None:
    found = promise_of(asked(mode, "privacy.noise_multiplier=3", "privacy.sampling_rate=0.5"))
    assert found is not None
    for word in [*words, f"mode {mode}:", f"epsilon at most {found.epsilon:g} ", "delta 1e-05", "multiplier of 3 "]:
        assert word in found.told()


def test_more_colluders_are_told() -> None:
    more = ["secure_aggregation.colluders=2", "federation.min_cohort=4", "privacy.noise_multiplier=3"]
    found = promise_of(
        config_files.load("hospitals", ["privacy.mode=institution", "federation.weighting=uniform", *more])
    )
    assert found is not None
    assert "whoever sees the sums, up to 2 members among them" in found.told()


def test_without_a_mode_nothing_is_promised() -> None:
    assert promise_of(config_files.load("smoke")) is None


@pytest.mark.parametrize(("noise", "warned"), [("privacy.epsilon=9.9", False), ("privacy.epsilon=12", True)])
def test_an_epsilon_that_promises_little_is_warned_of(noise: str, warned: bool) -> None:
    found = promise_of(asked("patient", noise, "privacy.sampling_rate=0.5"))
    assert found is not None
    told = found.warning()
    assert (told is not None) == warned == (found.epsilon > MOST)
    if told is not None:
        assert told.startswith(f"privacy: found an epsilon of {found.epsilon:g} over the whole run")
        assert "a single patient; expected at most 10" in told


def test_a_small_epsilon_is_never_told_as_none() -> None:
    found = promise_of(asked("patient", "privacy.epsilon=1e-9", "privacy.sampling_rate=1"))
    assert found is not None
    assert found.epsilon == 1e-4


def test_an_epsilon_that_no_noise_reaches_is_refused() -> None:
    with pytest.raises(ConfigError, match="cost more than epsilon 1e-09 at delta 1e-05, whatever the noise"):
        promise_of(asked("patient", "privacy.epsilon=1e-9"))
