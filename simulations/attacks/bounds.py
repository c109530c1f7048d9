"""From guesses to epsilon: what an attacker's successes prove, with a stated confidence.

Every bound here is from below. One that stays under a claim proves nothing of the claim; one above it refutes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta, binom, norm, rankdata

from common.errors import ConfigError

Scores = NDArray[np.float64]

CONFIDENCE = 0.95
_MOST = 50.0  # epsilon beyond which nothing is told apart
_HALVINGS = 50
_SHARES = (0.05, 0.1, 0.2, 0.5, 1.0)  # of the canaries on which guesses are made


# --- One run, many canaries -------------------------------------------------------------------------------------------


def one_run_p(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Bounds the probability of at least `right` right guesses under (epsilon, delta)-differential privacy (Steinke,
    Nasr & Jagielski 2023, theorem 5.2, as their appendix D computes it).

    canaries: units that were each in or out by a fair coin of its own. guesses: how many of them were guessed at.

    With W binomial of `guesses` at e^epsilon / (1 + e^epsilon), this is P[W >= right] + 2 canaries delta times the
    largest P[right > W >= right - i] / i.
    """
    if not 0 <= right <= guesses <= canaries or epsilon < 0 or not 0 <= delta < 1:
        raise ConfigError(
            "expected 0 <= right <= guesses <= canaries, epsilon from 0 and delta from 0 to 1, found"
            f" {right}, {guesses}, {canaries}, {epsilon:g} and {delta:g}"
        )
    hit = 1 / (1 + math.exp(-epsilon))
    below = np.cumsum(binom.pmf(np.arange(right - 1, -1, -1), guesses, hit))  # P[right > W >= right - i], i from 1
    steepest = float((below / np.arange(1, right + 1)).max(initial=0.0))
    return min(1.0, float(binom.sf(right - 1, guesses, hit)) + 2 * canaries * delta * steepest)


def one_run_epsilon(canaries: int, guesses: int, right: int, delta: float, confidence: float = CONFIDENCE) -> float:
    """The largest epsilon that a run with so many right guesses is shown to exceed; 0 where none is."""
    return _last(lambda epsilon: one_run_p(canaries, guesses, right, epsilon, delta) < 1 - confidence)


@dataclass(frozen=True)
class OneRun:
    """What one run's canaries prove. epsilon: holds with `CONFIDENCE`, whichever number of guesses is chosen."""

    epsilon: float
    guesses: int
    right: int


def one_run(scores: Scores, inside: NDArray[np.bool_], delta: float) -> OneRun:
    """Guesses `in` for the highest scores and `out` for the lowest, and abstains between.

    The best of a few numbers of guesses, each at a confidence at which all of them hold together. Equal scores go by
    place, so the order of canaries must not depend on the coins.
    """
    order = np.argsort(scores, kind="stable")
    each = sorted({max(1, round(len(scores) * share / 2)) for share in _SHARES})
    confidence = 1 - (1 - CONFIDENCE) / len(each)
    found = []
    for number in each:
        right = int(inside[order[-number:]].sum() + (~inside[order[:number]]).sum())
        found.append(OneRun(one_run_epsilon(len(scores), 2 * number, right, delta, confidence), 2 * number, right))
    return max(found, key=lambda one: (one.epsilon, one.right / one.guesses))


# --- Two sets of scores -----------------------------------------------------------------------------------------------


def clopper_pearson(hits: int, trials: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The exact interval of a probability (Clopper & Pearson 1934), each of its ends at half of what is left open."""
    low, high = _intervals(np.array([hits]), trials, confidence)
    return float(low[0]), float(high[0])


def _intervals(hits: NDArray[np.int64], trials: int, confidence: float) -> tuple[Scores, Scores]:
    """Both ends for each number of hits."""
    tail = (1 - confidence) / 2
    low = np.where(hits > 0, beta.ppf(tail, np.maximum(hits, 1), trials - hits + 1), 0.0)
    high = np.where(hits < trials, beta.ppf(1 - tail, hits + 1, np.maximum(trials - hits, 1)), 1.0)
    return low, high


@dataclass(frozen=True)
class Rates:
    """A threshold's success: at least `hits` of what is in is caught, at most `false` of what is out."""

    hits: float
    false: float

    @property
    def mu(self) -> float:
        """The difference of means in standard deviations that two Gaussians with these rates have at least (Dong, Roth
        & Su 2022); 0 for rates that prove none.
        """
        return max(0.0, float(norm.ppf(self.hits) - norm.ppf(self.false))) if self.hits > 0 and self.false < 1 else 0.0

    def epsilon(self, delta: float) -> float:
        """The epsilon that is exceeded: hits <= e^epsilon false + delta under differential privacy."""
        return max(0.0, math.log(max(self.hits - delta, 1e-300) / self.false))


def rates(inside: Scores, outside: Scores, confidence: float = CONFIDENCE) -> Rates:
    """The rates of a threshold that is chosen on every other score and proved on the rest, both with `confidence`.

    `In` is guessed for the scores above it. Raises ConfigError for fewer than 4 scores of a kind.
    """
    if min(len(inside), len(outside)) < 4:
        raise ConfigError(f"expected at least 4 scores of each kind, found {len(inside)} and {len(outside)}")

    def at(thresholds: Scores, start: int) -> list[Rates]:
        kinds = (np.sort(inside[start::2]), np.sort(outside[start::2]))
        (low, _), (_, high) = (
            _intervals(len(scores) - np.searchsorted(scores, thresholds, "right"), len(scores), confidence)
            for scores in kinds
        )
        return [Rates(float(hits), float(false)) for hits, false in zip(low, high, strict=True)]

    places = np.unique(np.concatenate([inside[::2], outside[::2]]))
    best = int(np.argmax([found.mu for found in at(places, 0)]))
    return at(places[best : best + 1], 1)[0]


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon at `delta` of two unit Gaussians whose means differ by `mu` (Balle & Wang 2018, theorem 8)."""
    if mu <= 0:
        return 0.0

    def spent(epsilon: float) -> float:
        return float(norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu))

    return _last(lambda epsilon: spent(epsilon) > delta)


def auc(inside: Scores, outside: Scores) -> float:
    """The probability that something that is in scores higher than something that is not; equal scores count half."""
    ranks = rankdata(np.concatenate([inside, outside]))[: len(inside)]
    return float((ranks.sum() - len(inside) * (len(inside) + 1) / 2) / (len(inside) * len(outside)))


def hits_at(inside: Scores, outside: Scores, false: float) -> float:
    """The share of what is in above the lowest threshold that at most the share `false` of what is out exceeds."""
    allowed = math.floor(false * len(outside))
    threshold = np.sort(outside)[len(outside) - 1 - allowed]
    return float((inside > threshold).mean())


def _last(holds: Callable[[float], bool]) -> float:
    """The largest number up to _MOST for which a condition holds that holds for all below; 0 where it never does."""
    if not holds(0.0):
        return 0.0
    low, high = 0.0, _MOST
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
