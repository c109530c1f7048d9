"""Noise in shares: every bound against divergences that are computed exactly, roundings by many trials."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import logsumexp

from common.errors import ConfigError
from common.privacy.accounting import Event, epsilon
from common.privacy.distributed import Mode, SharedNoise, honest_members, multiplier, noised, planned, rounded, tau
from common.privacy.noise import NoiseSource, SeededNoise, SystemNoise

DELTA = 1e-5
Floats = NDArray[np.float64]


def plan(mode: Mode = "institution", **changes: object) -> SharedNoise:
    wanted: dict[str, object] = {
        "clip": 1.0,
        "bits": 16,
        "parameters": 1000,
        "members": 6,
        "threshold": 4,
        "colluders": 1,
        "delta": DELTA,
        "rounds": 20,
        "sigma": 2.0,
    }
    return planned(mode=mode, **{**wanted, **changes})  # type: ignore[arg-type]


def sum_of_shares(scale: float, shares: int) -> Floats:
    """log-probabilities of a sum of discrete Gaussians, of -edge to edge, far beyond what any test asks for."""
    edge = math.ceil(16 * scale) + 4
    one = np.exp(-(np.arange(-edge, edge + 1) ** 2) / (2 * scale**2))
    one /= one.sum()
    total = one
    for _ in range(shares - 1):
        total = np.convolve(total, one)
    with np.errstate(divide="ignore"):
        return np.log(total)


def divergence(first: Floats, second: Floats, order: float) -> float:
    """Renyi's, of distributions given by log-probabilities on the same points."""
    return float(logsumexp(order * first + (1 - order) * second)) / (order - 1)


def shifted(logs: Floats, by: int) -> tuple[Floats, Floats]:
    """The distribution and itself moved by `by`, where neither is lost in rounding."""
    still, moved = logs[by:], logs[: len(logs) - by]
    clear = np.isfinite(still) & np.isfinite(moved) & (np.minimum(still, moved) > -600)
    return moved[clear], still[clear]


CASES = list(product((0.5, 0.6, 0.8, 1.0, 3.0), (1, 2, 3, 8)))


@pytest.mark.parametrize(("scale", "shares"), CASES)
def test_the_divergence_of_a_sum_of_shares_is_within_the_bound(scale: float, shares: int) -> None:
    logs = sum_of_shares(scale, shares)
    for shift, order in product((1, 2, 5), (1.1, 1.5, 2, 3, 4)):
        exact = divergence(*shifted(logs, shift), order)
        # In d dimensions noise is independent: divergences of the elements add up, and so do squares of shifts.
        for dimensions in (1, 2, 3):
            m = multiplier(Fraction(scale), shares, dimensions * shift**2, dimensions)
            assert dimensions * exact <= order / (2 * m**2) * (1 + 1e-9)


def test_a_sum_of_few_narrow_shares_is_worse_than_one_wide_one() -> None:
    # So tau is there for a reason: without it the bound would be broken.
    logs = sum_of_shares(0.5, 8)
    assert divergence(*shifted(logs, 1), 1.1) > 1.1 * 1.1 / (2 * 8 * 0.5**2)
    assert tau(Fraction(4), 100) < 1e-60
    assert tau(Fraction(1, 2), 1) == 0


@pytest.mark.parametrize(("scale", "shares"), [(0.6, 3), (1.0, 1), (1.0, 4), (3.0, 2)])
@pytest.mark.parametrize("q", [0.01, 0.1, 0.5, 0.9])
def test_sampling_is_within_the_bound_in_both_directions(scale: float, shares: int, q: float) -> None:
    logs = sum_of_shares(scale, shares)
    for shift in (1, 2):
        there, gone = shifted(logs, shift)
        mixed = np.logaddexp(math.log(q) + there, math.log1p(-q) + gone)
        m = multiplier(Fraction(scale), shares, shift**2, 1)
        for order in (2, 3, 4, 8):
            allowed = log_moment(order, q, m) / (order - 1)
            assert divergence(mixed, gone, order) <= allowed * (1 + 1e-9) + 1e-12
            assert divergence(gone, mixed, order) <= allowed * (1 + 1e-9) + 1e-12


def log_moment(order: int, q: float, m: float) -> float:
    """Of the mixture relative to its greater part, term by term as the module's text has it."""
    terms = [
        math.log(math.comb(order, k)) + (order - k) * math.log1p(-q) + k * math.log(q) + k * (k - 1) / (2 * m**2)
        for k in range(order + 1)
    ]
    return float(logsumexp(terms))


@pytest.mark.parametrize(("m", "q", "steps"), [(0.9, 0.1, 50), (3.0, 0.3, 10)])
def test_an_event_is_accounted_for_by_these_moments(m: float, q: float, steps: int) -> None:
    orders = range(2, 64)
    by_hand = min(
        steps * log_moment(order, q, m) / (order - 1)
        + math.log1p(-1 / order)
        - (math.log(DELTA) + math.log(order)) / (order - 1)
        for order in orders
    )
    found = epsilon([Event("discrete-gaussian", m, q, steps)], DELTA).rdp
    assert found <= by_hand * (1 + 1e-9)
    assert found == pytest.approx(by_hand, rel=0.03)  # orders between whole ones gain a little


@given(
    ratio=st.floats(-20, 20).map(math.exp),
    q=st.floats(0, 1),
    order=st.floats(1, 30),
)
@settings(max_examples=500, deadline=None)
def test_whoever_is_gone_diverges_no_more_than_whoever_is_there(ratio: float, q: float, order: float) -> None:
    # The step of the proof: where a map exchanges P and Q, points pair up, with ratios r and 1 / r and weights 1 and r.
    one, other = 1 - q + q * ratio, 1 - q + q / ratio
    if one == 0 or other == 0:
        return

    def both(power: float) -> float:
        return float(np.logaddexp(power * math.log(one), math.log(ratio) + power * math.log(other)))

    assert both(order) >= both(1 - order) - 1e-9 * (1 + abs(both(order)))


@pytest.mark.parametrize("mode", ["institution", "distributed"])
def test_rounding_is_unbiased_and_moves_no_element_by_a_whole_step(mode: Mode) -> None:
    noise = plan(mode, parameters=50, bits=8)
    vector = np.random.default_rng(1).normal(0, 0.08, 50)
    total, count = np.zeros(50), 2000
    for trial in range(count):
        found = rounded(vector, noise, SeededNoise(trial))
        assert np.abs(found - vector / noise.step).max() < 1
        total += found
    assert total / count == pytest.approx(vector / noise.step, abs=5 * 0.5 / math.sqrt(count))


@pytest.mark.parametrize("parameters", [1, 4, 100, 20_000])
@pytest.mark.parametrize("bits", [2, 5, 12])
def test_an_update_in_whole_steps_is_always_within_its_bound(parameters: int, bits: int) -> None:
    noise = plan(parameters=parameters, bits=bits)
    rng = np.random.default_rng(parameters)
    for vector in (
        np.full(parameters, 1.0),
        np.full(parameters, 1 / math.sqrt(parameters)),
        np.full(parameters, min(0.5 * noise.step, 1 / math.sqrt(parameters))),
        rng.normal(size=parameters),
        rng.normal(size=parameters) * 1e30,
        np.eye(1, parameters).ravel() * -5,
    ):
        for trial in range(10):
            found = rounded(vector, noise, SeededNoise(trial))
            assert sum(int(x) ** 2 for x in found) <= noise.bound
            assert np.abs(found).max() <= noise.levels
    assert noise.bound <= (math.sqrt(noise.levels**2) + math.sqrt(parameters)) ** 2


def test_squares_of_long_elements_are_summed_exactly() -> None:
    noise = plan(parameters=4, bits=24, sigma=0.1)
    # Each element lies between two levels, and four upwards are more than the bound allows.
    vector = np.full(4, 0.5)
    assert 4 * math.ceil(0.5 * noise.levels) ** 2 > noise.bound
    for trial in range(100):
        assert sum(int(x) ** 2 for x in rounded(vector, noise, SeededNoise(trial))) <= noise.bound


@pytest.mark.parametrize(("parameters", "clip"), [(16, 2.0), (400, 1.0), (10_000, 3.5), (50, 40.0)])
def test_a_rounding_meets_the_bound_as_often_as_it_must(parameters: int, clip: float) -> None:
    # Independent of the code: halves are what rounding moves most.
    noise = SharedNoise(parameters, 6, 3, clip, 1 << 14, 1.0, Fraction(5), "institution", 1.0, 1)
    rng = np.random.default_rng(0)
    norm = clip / math.sqrt(parameters)
    vector = np.full(parameters, min(0.5, norm) if norm < 1 else norm)
    whole = np.floor(vector + rng.random((2000, parameters)))
    within = ((whole**2).sum(axis=1) <= noise.bound).mean()
    assert within >= 1 - math.exp(-0.5)
    # And it is needed: the plain bound on the clip itself would often be broken.
    assert ((whole**2).sum(axis=1) <= clip**2).mean() < 0.9


def test_a_clipped_update_keeps_its_direction_and_a_small_one_its_size() -> None:
    noise = plan(bits=20)
    vector = np.random.default_rng(3).normal(size=1000)
    large = rounded(vector, noise, SeededNoise(1)) * noise.step
    assert np.linalg.norm(large) == pytest.approx(1, rel=1e-3)
    assert np.corrcoef(large, vector)[0, 1] > 0.9999
    small = vector / np.linalg.norm(vector) / 2
    assert rounded(small, noise, SeededNoise(1)) * noise.step == pytest.approx(small, abs=noise.step)
    assert not rounded(np.zeros(1000), noise, SeededNoise(1)).any()


@pytest.mark.parametrize("element_clip", [0.05, 1.0, 20.0])
def test_one_unit_changes_a_rounded_sum_by_no_more_than_the_bound(element_clip: float) -> None:
    noise = plan("distributed", q=0.1, element_clip=element_clip, bits=8, parameters=300)
    rng = np.random.default_rng(5)
    for trial in range(200):
        others = rng.normal(0, rng.choice([0.001, 0.05, 1]), 300)
        unit = rng.normal(size=300) * (rng.random(300) < rng.choice([0.01, 0.3, 1]))
        unit /= max(np.linalg.norm(unit), 1e-9)
        # The same choices on both sides, as the proof has it.
        there, gone = (rounded(vector, noise, SeededNoise(trial)) for vector in (others + unit, others))
        assert ((there - gone) ** 2).sum() <= noise.bound


def test_a_sum_over_units_is_not_clipped_as_a_whole() -> None:
    noise = plan("distributed", q=0.1, element_clip=4.0)
    vector = np.full(1000, 3.0)
    assert rounded(vector, noise, SeededNoise(1)) * noise.step == pytest.approx(vector, abs=noise.step)
    assert (rounded(vector * 2, noise, SeededNoise(1)) == noise.levels).all()


@pytest.mark.parametrize("mode", ["institution", "distributed"])
@pytest.mark.parametrize("source", [SystemNoise(), SeededNoise(9)], ids=repr)
def test_noise_is_added_in_full_and_anew_each_time(mode: Mode, source: NoiseSource) -> None:
    noise = plan(mode, parameters=50_000, **({"q": 0.1} if mode == "distributed" else {}))
    vector = np.random.default_rng(1).normal(0, 1e-3, 50_000)
    first, second = (noised(vector, noise, source) - vector / noise.step for _ in range(2))
    for found in (first, second, (first - second) / math.sqrt(2)):
        assert found.std() == pytest.approx(float(noise.scale), rel=6 / math.sqrt(2 * 50_000))
        assert abs(found.mean()) < 6 * float(noise.scale) / math.sqrt(50_000)


def test_the_noise_of_the_honest_alone_has_the_promised_deviation() -> None:
    noise = plan(parameters=100_000)
    assert noise.honest == 3
    total = sum(noised(np.zeros(100_000), noise, SeededNoise(name)) for name in range(noise.honest))
    assert np.std(total * noise.step) == pytest.approx(noise.deviation, rel=0.02)
    assert noise.deviation / noise.sensitivity == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize("mode", ["institution", "distributed"])
@pytest.mark.parametrize("sigma", [0.05, 0.7, 2.0, 30.0])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_plan_has_at_least_the_noise_that_is_asked_for_and_hardly_more(mode: Mode, sigma: float, bits: int) -> None:
    noise = plan(mode, sigma=sigma, bits=bits, parameters=10)
    event = noise.event(3)
    assert (event.mechanism, event.q, event.steps) == ("discrete-gaussian", 1.0, 3)
    assert event.sigma == noise.multiplier >= sigma
    if noise.scale > 4:  # below it tau asks for more
        assert noise.multiplier < sigma * 1.0003
    assert noise.scale >= Fraction(1, 2)


@pytest.mark.parametrize("mode", ["institution", "distributed"])
def test_a_plan_costs_what_was_asked_for_and_its_event_says_so(mode: Mode) -> None:
    noise = plan(mode, target=6.0, sigma=0.0, q=1.0 if mode == "institution" else 0.2)
    assert 5.9 < noise.cost(DELTA).bound <= 6.0
    assert noise.cost(DELTA) == epsilon([noise.event()] * 20, DELTA)


def test_more_honest_members_want_smaller_shares() -> None:
    few, many = plan(threshold=4), plan(members=16, threshold=10)
    assert (few.honest, many.honest) == (3, 9)
    assert float(few.scale / many.scale) == pytest.approx(math.sqrt(3), rel=1e-3)
    assert few.deviation == pytest.approx(many.deviation, rel=1e-3)


def test_coarse_steps_cost_noise() -> None:
    fine, coarse = plan(bits=16), plan(bits=5)
    assert fine.sensitivity == pytest.approx(1, rel=1e-3)
    assert coarse.sensitivity > 1.2
    assert coarse.deviation > 1.2 * fine.deviation


def test_the_ring_holds_every_update_and_the_tail_of_the_noise() -> None:
    noise = plan(parameters=20_000, bits=6, sigma=4.0)
    vector = np.full(20_000, 1.0)
    edge = 1 << (noise.ring_bits - 1)
    largest = 0
    for trial in range(5):
        total = sum(noised(vector, noise, SeededNoise(trial, name)) for name in range(noise.members))
        largest = max(largest, int(np.abs(total).max()))
    assert largest < noise.members * noise.levels + noise.headroom < edge
    # The tail is not there for nothing, and not much larger than it must be.
    assert noise.headroom / 3 < 5 * float(noise.scale) * math.sqrt(noise.members) < noise.headroom


def test_headroom_leaves_the_probability_that_is_stated() -> None:
    noise = plan()
    deviations = noise.headroom / (float(noise.scale) * math.sqrt(noise.members))
    # Union over all elements and rounds, both tails, by the bound for what is no wider than a normal.
    assert 2 * noise.parameters * noise.rounds * math.exp(-(deviations**2) / 2) <= 2.0**-40


@pytest.mark.parametrize(
    ("members", "threshold", "colluders", "honest"), [(4, 3, 1, 2), (6, 4, 1, 3), (3, 3, 2, 1), (5, 5, 0, 5)]
)
def test_the_noise_of_those_who_may_collude_or_be_missing_is_not_counted(
    members: int, threshold: int, colluders: int, honest: int
) -> None:
    assert honest_members(members, threshold, colluders) == honest
    assert plan(members=members, threshold=threshold, colluders=colluders).honest == honest


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"threshold": 1, "colluders": 1}, "honest"),
        ({"threshold": 7}, "honest"),
        ({"colluders": -1}, "honest"),
        ({"sigma": 0.0}, "one of epsilon and noise_multiplier"),
        ({"target": 8.0}, "one of epsilon and noise_multiplier"),
        ({"clip": 0.0}, "clips above 0"),
        ({"clip": math.inf}, "clips above 0"),
        ({"element_clip": -1.0}, "clips above 0"),
        ({"bits": 1}, "2 bits"),
        ({"parameters": 0}, "1 parameter"),
        ({"rounds": 0}, "1 round"),
        ({"q": 0.5}, "not sampled one by one"),
        ({"bits": 32}, "lower quantise.bits"),
        ({"bits": 20, "sigma": 10.0}, "lower quantise.bits"),
    ],
)
def test_what_cannot_be_planned_is_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan(**changes)


def test_what_cannot_be_rounded_is_refused() -> None:
    noise = plan()
    with pytest.raises(ConfigError, match="1000 elements"):
        noised(np.zeros(999), noise, SeededNoise(1))
    for bad in (math.nan, math.inf, 1e300):
        with pytest.raises(ValueError, match="not finite"):
            noised(np.full(1000, bad), noise, SeededNoise(1))


def test_an_attacker_who_knows_all_but_one_update_is_held_to_the_claim() -> None:
    # The best test of one noised element against nothing, at every threshold, over many trials.
    noise = plan(parameters=1, bits=6, rounds=1, target=1.0, sigma=0.0)
    claimed, trials = noise.cost(DELTA).bound, 200_000
    wide = replace(noise, parameters=trials, clip=noise.clip * trials)  # so many trials at once, none of them clipped
    there = sum(noised(np.full(trials, v), wide, SeededNoise("t", i)) for i, v in enumerate((1.0, 0.0, 0.0)))
    gone = sum(noised(np.zeros(trials), wide, SeededNoise("g", i)) for i in range(3))

    def worst(claim: float) -> float:
        return max((there >= edge).mean() - math.exp(claim) * (gone >= edge).mean() for edge in range(0, 200, 5))

    assert worst(claimed) <= DELTA + 5 / math.sqrt(trials)
    assert worst(claimed / 5) > 5 / math.sqrt(trials)
