"""Exact draws from the discrete Gaussian of Canonne, Kamath and Steinke (2020), many at a time.

The discrete Gaussian of scale s gives each whole number y a probability proportional to exp(-y^2 / (2 s^2)). Their
algorithms 1 to 3 draw it by comparing whole numbers with uniform whole numbers. Nothing here is rounded or
approximated, so that, other than with a rounded normal, the distribution is the one that the bounds on privacy are
about. Algorithm 3 runs on whole vectors: each of its rounds draws for all numbers that are not decided yet.

How long a draw takes depends on what is rejected on the way; for a vector that is one sum over all of its elements.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from common.errors import ConfigError
from common.privacy.noise import NoiseSource, Words, uniform_below

Integers = NDArray[np.int64]
Choices = NDArray[np.bool_]

LARGEST = 1 << 40  # of numerator and denominator of the square of a scale: all products below fit 64 bits
_FARTHEST = 1 << 10  # times the proposal's scale: what is farther out, of probability e^-1024, is drawn anew
_BLOCK = 1 << 14  # proposals at a time; they stay in the core's own cache


def discrete_gaussian(scale: Fraction, count: int, source: NoiseSource) -> Integers:
    """`count` independent draws [count] of the discrete Gaussian of scale `scale`.

    Algorithm 3: a proposal y of the two-sided geometric distribution of scale s^2 / c is kept with probability
    exp(-(|y| - c)^2 / (2 s^2)). Any c gives the right distribution, since the product is exp(-y^2 / (2 s^2)) but for
    a constant; a whole c near s keeps most and makes both scales quotients of small whole numbers.
    Raises ConfigError for a scale that is not above 0 or whose square is no quotient of numbers up to 2^40.
    """
    square = scale * scale
    a, b = square.numerator, square.denominator
    if scale <= 0 or max(a, b) > LARGEST:
        raise ConfigError(
            f"expected the scale of a discrete Gaussian to be a quotient above 0 of numbers up to 2^20, found {scale}"
        )
    centre = max(1, math.isqrt(a // b))
    drawn, have = np.empty(count, np.int64), 0
    while have < count:
        # A good half of all proposals is rejected on the way.
        size = min(_BLOCK, 5 * (count - have) // 2 + 16)
        found = _two_sided(a, b * centre, size, source)
        distance = np.abs(found) - centre
        found = found[_with_exp(np.uint64(b) * (distance * distance).astype(np.uint64), 2 * a, source)]
        kept = found[: count - have]
        drawn[have : have + len(kept)] = kept
        have += len(kept)
    return drawn


def _two_sided(t: int, s: int, size: int, source: NoiseSource) -> Integers:
    """Algorithm 2: of `size` attempts those that succeed, each y with a probability proportional to exp(-|y| s / t)."""
    within = uniform_below(source, t, size)
    within = within[_with_exp_of_fraction(within, t, source)]
    whole = _successes(len(within), source)
    near = whole < _FARTHEST
    magnitude: Integers = ((within[near] + np.uint64(t) * whole[near]) // np.uint64(s)).astype(np.int64)
    negative = (source.words(len(magnitude)) & np.uint64(1)).astype(np.bool_)
    once = ~(negative & (magnitude == 0))  # zero has one sign only
    np.negative(magnitude, out=magnitude, where=negative)
    found: Integers = magnitude[once]
    return found


def _successes(count: int, source: NoiseSource) -> Words:
    """How often a choice of probability 1/e succeeds before it fails for the first time, [count]."""
    found, alive = np.zeros(count, np.uint64), np.arange(count)
    while len(alive):
        alive = alive[_with_one_over_e(len(alive), source)]
        found[alive] += np.uint64(1)
    return found


def _with_exp(numerators: Words, denominator: int, source: NoiseSource) -> Choices:
    """True with probability exp(-numerator / denominator), [n]: once for the fraction, once for each whole."""
    wholes = numerators // np.uint64(denominator)
    kept = _with_exp_of_fraction(numerators - wholes * np.uint64(denominator), denominator, source)
    alive = np.flatnonzero(kept & (wholes > 0))
    while len(alive):
        holds = _with_one_over_e(len(alive), source)
        kept[alive[~holds]] = False
        alive = alive[holds]
        wholes[alive] -= np.uint64(1)
        alive = alive[wholes[alive] > 0]
    return kept


def _with_exp_of_fraction(numerators: Words, denominator: int, source: NoiseSource) -> Choices:
    """Algorithm 1: True with probability exp(-numerator / denominator), [n]; numerators below the denominator.

    Round k goes on with probability numerator / (k x denominator); an odd k at the end means True.
    """
    odd, alive, k = np.zeros(len(numerators), np.bool_), np.arange(len(numerators)), 1
    while len(alive):
        goes_on = uniform_below(source, k * denominator, len(alive)) < numerators[alive]
        if k % 2:
            odd[alive[~goes_on]] = True
        alive, k = alive[goes_on], k + 1
    return odd


def _with_one_over_e(count: int, source: NoiseSource) -> Choices:
    """Algorithm 1 for exp(-1): round k goes on with probability 1 / k; the first always does."""
    odd, alive, k = np.zeros(count, np.bool_), np.arange(count), 2
    while len(alive):
        goes_on = uniform_below(source, k, len(alive)) == 0
        if k % 2:
            odd[alive[~goes_on]] = True
        alive, k = alive[goes_on], k + 1
    return odd
