"""What guesses prove: against sums written out, published intervals and the accountant of every run."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError
from common.privacy.accounting import Event, epsilon
from simulations.attacks.bounds import (
    Rates,
    auc,
    clopper_pearson,
    gaussian_epsilon,
    hits_at,
    one_run,
    one_run_epsilon,
    one_run_p,
    rates,
)


def by_hand(canaries: int, guesses: int, right: int, odds: Fraction, delta: Fraction) -> float:
    """Theorem 5.2, one term after the other in whole numbers. odds: e^epsilon."""
    hit = odds / (1 + odds)
    luck = [math.comb(guesses, k) * hit**k * (1 - hit) ** (guesses - k) for k in range(guesses + 1)]
    certain = sum(luck[right:])
    steepest = max((sum(luck[right - i : right]) / i for i in range(1, right + 1)), default=Fraction(0))
    return float(min(Fraction(1), certain + 2 * canaries * delta * steepest))


@given(st.integers(0, 25), st.integers(0, 25), st.integers(0, 25), st.integers(1, 40), st.sampled_from([0, 1, 30]))
def test_one_run_is_the_theorem(first: int, second: int, third: int, odds: int, delta: int) -> None:
    right, guesses, canaries = sorted((first, second, third))
    found = one_run_p(canaries, guesses, right, math.log(odds), delta / 1000)
    assert found == pytest.approx(by_hand(canaries, guesses, right, Fraction(odds), Fraction(delta, 1000)), rel=1e-9)


@pytest.mark.parametrize("guesses", [10, 100, 1000])
def test_all_right_without_delta_has_a_closed_form(guesses: int) -> None:
    """No mistake in r guesses has probability q^r, so that q = 0.05^(1/r) is where 95 % are left."""
    hit = 0.05 ** (1 / guesses)
    expected = math.log(hit / (1 - hit))
    assert one_run_epsilon(guesses, guesses, guesses, 0.0) == pytest.approx(expected, abs=1e-9)


def test_abstentions_cost_nothing_but_delta() -> None:
    assert one_run_epsilon(1000, 50, 48, 0.0) == one_run_epsilon(50, 50, 48, 0.0)
    assert one_run_epsilon(1000, 50, 48, 1e-4) < one_run_epsilon(50, 50, 48, 1e-4) < one_run_epsilon(50, 50, 48, 0.0)


@pytest.mark.parametrize("claim", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("guesses", [20, 60])
def test_randomised_response_breaks_its_claim_in_one_of_twenty_audits_at_most(claim: float, guesses: int) -> None:
    """It has exactly that epsilon, and its right guesses are binomial: the worst there is, counted out."""
    hit = 1 / (1 + math.exp(-claim))
    luck = [math.comb(guesses, k) * hit**k * (1 - hit) ** (guesses - k) for k in range(guesses + 1)]
    assert sum(p for k, p in enumerate(luck) if one_run_p(guesses, guesses, k, claim, 0.0) < 0.05) <= 0.05


def test_guesses_are_made_at_both_ends() -> None:
    inside = np.arange(200) % 2 == 0
    perfect = one_run(np.where(inside, 1.0, -1.0), inside, 0.0)
    assert (perfect.guesses, perfect.right) == (200, 200)
    assert perfect.epsilon == pytest.approx(one_run_epsilon(200, 200, 200, 0.0, 0.99))  # five numbers of guesses
    # Twenty at each end are known, the rest is a coin toss.
    scores = np.random.default_rng(1).normal(0, 1, 200)
    scores[:40] += np.where(inside[:40], 10, -10)
    some = one_run(scores, inside, 0.0)
    assert (some.guesses, some.right) == (40, 40)
    assert one_run(-scores, inside, 0.0).epsilon == 0


@pytest.mark.parametrize("case", [(10, 11, 5, 1.0, 0.0), (10, 10, 11, 1.0, 0.0), (10, 10, 5, -1.0, 0.0)])
def test_what_cannot_be_is_refused(case: tuple[int, int, int, float, float]) -> None:
    with pytest.raises(ConfigError, match="right <= guesses <= canaries"):
        one_run_p(*case)


def test_clopper_pearson_as_published() -> None:
    """The rule of three's exact form for none, and the usual table for a half of ten."""
    assert clopper_pearson(0, 10) == pytest.approx((0.0, 0.3085), abs=1e-4)
    assert clopper_pearson(10, 10) == pytest.approx((0.6915, 1.0), abs=1e-4)
    assert clopper_pearson(5, 10) == pytest.approx((0.1871, 0.8129), abs=1e-4)


@pytest.mark.parametrize("mu", [0.0, 1.0, 2.0])
def test_two_gaussians_are_told_apart_by_no_more_than_they_are(mu: float) -> None:
    bounds = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        bounds.append(rates(rng.normal(mu, 1, 2000), rng.normal(0, 1, 2000)).mu)
    assert sum(bound > mu for bound in bounds) <= 4  # two ends of 2.5 % each, both would have to be off
    assert np.median(bounds) > mu - 0.35


def test_the_threshold_is_proved_on_scores_that_did_not_choose_it() -> None:
    """Where every other score is told apart and the rest is not, nothing is proved."""
    rng = np.random.default_rng(2)
    inside, outside = rng.normal(0, 1, 1000), rng.normal(0, 1, 1000)
    inside[::2] += 100
    assert rates(inside, outside).mu == 0
    with pytest.raises(ConfigError, match="at least 4 scores"):
        rates(inside[:3], outside)


def test_rates_prove_what_differential_privacy_forbids() -> None:
    assert Rates(0.5, 0.1).epsilon(0.0) == pytest.approx(math.log(5))
    assert Rates(0.5, 0.1).epsilon(0.1) == pytest.approx(math.log(4))
    assert Rates(0.1, 0.5).epsilon(0.0) == 0
    assert Rates(0.0, 1.0).mu == 0


@pytest.mark.parametrize("sigma", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("delta", [1e-5, 1e-2])
def test_a_gaussian_costs_what_the_accountant_says(sigma: float, delta: float) -> None:
    bound = epsilon([Event("gaussian", sigma, 1.0, 1)], delta).bound
    assert gaussian_epsilon(1 / sigma, delta) == pytest.approx(bound, rel=0.02, abs=1e-3)
    assert gaussian_epsilon(0.0, delta) == 0


def test_curves_by_hand() -> None:
    inside, outside = np.array([3.0, 1.0, 2.0]), np.array([2.0, 0.0])
    assert auc(inside, outside) == pytest.approx((1 + 1 + 0 + 1 + 0.5 + 1) / 6)
    others = np.arange(100.0)
    assert hits_at(np.array([98.5, 98.0, 99.5, 50.0]), others, 0.01) == 0.5  # above 98, which one of a hundred is
    assert hits_at(np.array([98.5, 99.5]), others, 0.0) == 0.5
