"""What the outcome of an attack proves: rates with their intervals, and lower bounds on epsilon.

Everything here is a function of scores and counts; none of it knows a model. Intervals hold for the units that were
drawn, with the stated confidence; a bound that is computed from a few dozen of them is wide, and says so by being wide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta, binom, rankdata

from common.errors import ConfigError
from common.randomness import seeded

Scores = NDArray[np.float64]

CONFIDENCE = 0.95
MOST = 64.0
"""No bound on epsilon is looked for above it: so many guesses were never made."""

_HALVINGS = 40


@dataclass(frozen=True)
class Estimate:
    """A figure and the interval that holds it with `CONFIDENCE`."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """As it stands in a result, in four digits."""
        return {name: round(value, 4) for name, value in asdict(self).items()}


def proportion(successes: int, trials: int, confidence: float = CONFIDENCE) -> Estimate:
    """A rate with its exact interval (Clopper & Pearson 1934). Raises ConfigError without trials."""
    if not 0 <= successes <= trials or not trials:
        raise ConfigError(f"expected at least one trial and no more successes, found {successes} of {trials}")
    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, successes, trials - successes + 1)) if successes else 0.0
    high = float(beta.ppf(1 - tail, successes + 1, trials - successes)) if successes < trials else 1.0
    return Estimate(successes / trials, low, high)


# --- Telling members from others --------------------------------------------------------------------------------------


def auc(inside: Scores, outside: Scores) -> float:
    """How often a member's score is above an outsider's, ties counted by half; 0.5 is chance.

    Raises ConfigError when there are none of one of the two.
    """
    if not (len(inside) and len(outside)):
        raise ConfigError(f"expected members and outsiders, found {len(inside)} and {len(outside)}")
    ranks = rankdata(np.concatenate([inside, outside]))[: len(inside)]
    return float((ranks.sum() - len(inside) * (len(inside) + 1) / 2) / (len(inside) * len(outside)))


def auc_interval(inside: Scores, outside: Scores, seed: int, draws: int = 400) -> Estimate:
    """The area under the curve with a bootstrap interval; members and outsiders are drawn anew, each by themselves."""
    rng = seeded(seed, "bootstrap")
    found = [
        auc(rng.choice(inside, len(inside)), rng.choice(outside, len(outside))) for _ in range(draws)
    ]  # of units, which are independent; not of records, of which a person may have several
    low, high = np.quantile(found, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(auc(inside, outside), float(low), float(high))


def recall_at(inside: Scores, outside: Scores, false_positives: float) -> Estimate:
    """The share of members whose score is above all outsiders' but a share `false_positives` of them, rounded down.

    With fewer than 100 outsiders 1 % of them is none at all. The interval is that of the share of members; that the
    threshold itself depends on who the outsiders are makes it somewhat wider in truth.
    """
    allowed = int(false_positives * len(outside))
    threshold = np.sort(outside)[::-1][allowed] if allowed < len(outside) else -math.inf
    return proportion(int((inside > threshold).sum()), len(inside))


# --- One run, many canaries -------------------------------------------------------------------------------------------


def one_run_p(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """How likely at least `right` of the guesses are right, at most, when a run has (epsilon, delta)-differential
    privacy (Steinke, Nasr & Jagielski 2023, theorem 5.2 and its appendix D).

    canaries: units that were each in by a fair coin of its own. guesses: on how many of them a guess was made.
    """
    hit = 1 / (1 + math.exp(-epsilon))
    certain = float(binom.sf(right - 1, guesses, hit))
    steps = np.arange(1, right + 1)
    likely = np.cumsum(binom.pmf(right - steps, guesses, hit))
    spread = float((likely / steps).max()) if right else 0.0
    return min(1.0, certain + 2 * canaries * delta * spread)


def one_run_bound(canaries: int, guesses: int, right: int, delta: float, confidence: float = CONFIDENCE) -> float:
    """The largest epsilon that a run with so many right guesses does not have, with that confidence; 0 for none."""
    return _largest(lambda epsilon: one_run_p(canaries, guesses, right, epsilon, delta) < 1 - confidence)


def guess(scores: Scores, inside: NDArray[np.bool_], each: int) -> tuple[int, int]:
    """How many guesses, and how many of them right: `in` for the `each` highest scores, `out` for the `each` lowest.

    All others are abstentions. Equal scores go by place, so `scores` must not be ordered by what is to be guessed.
    """
    order = np.argsort(scores, kind="stable")
    each = min(each, len(scores) // 2)
    right = int((~inside[order[:each]]).sum() + inside[order[len(order) - each :]].sum())
    return 2 * each, right


@dataclass(frozen=True)
class OneRun:
    """The best of several numbers of guesses.

    bound: a lower bound on epsilon that holds with `CONFIDENCE`, whatever was chosen among.
    """

    bound: float
    guesses: int
    right: int
    canaries: int

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "bound": round(self.bound, 3)}


def one_run(scores: Scores, inside: NDArray[np.bool_], delta: float, choices: int = 1) -> OneRun:
    """The largest bound over a few numbers of guesses, each at a confidence so high that all hold together.

    choices: how many such audits of the same run the caller takes the best of.
    """
    count = len(scores)
    each = sorted({max(1, round(count * share / 2)) for share in (0.1, 0.25, 0.5, 1.0)})
    confidence = 1 - (1 - CONFIDENCE) / (len(each) * choices)
    found = []
    for number in each:
        guesses, right = guess(scores, inside, number)
        found.append(OneRun(one_run_bound(count, guesses, right, delta, confidence), guesses, right, count))
    return max(found, key=lambda one: (one.bound, one.right / one.guesses))


# --- Many runs, one canary --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Threshold:
    """A threshold and what it proves.

    caught: of the trials with the canary, those above it. false: of the others. trials: of each kind.
    bound: epsilon at `delta` is at least this, with `CONFIDENCE`.
    """

    bound: float
    threshold: float
    caught: int
    false: int
    trials: int
    delta: float

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "bound": round(self.bound, 3), "threshold": round(self.threshold, 4)}


def threshold_bound(inside: Scores, outside: Scores, delta: float) -> Threshold:
    """A lower bound on epsilon at `delta` from scores of trials with the canary and without.

    The threshold, and on which of its sides to guess, are chosen on every other trial; the bound is of the rest, which
    are independent of the choice. (epsilon, delta) implies caught <= e^epsilon false + delta and the same for the
    complements, so that either may break it.

    Raises ConfigError for fewer than 4 trials of a kind.
    """
    trials = min(len(inside), len(outside))
    if trials < 4:
        raise ConfigError(f"expected at least 4 trials of each kind, found {len(inside)} and {len(outside)}")
    inside, outside = inside[:trials], outside[:trials]
    choosing, proving = slice(0, None, 2), slice(1, None, 2)
    places = np.unique(np.concatenate([inside[choosing], outside[choosing]]))
    sides = [_bounds(inside[choosing], outside[choosing], above, places, delta) for above in (True, False)]
    above = bool(sides[0].max() >= sides[1].max())
    place = places[[int(np.argmax(sides[0 if above else 1]))]]
    bound = float(_bounds(inside[proving], outside[proving], above, place, delta)[0])
    caught, false = (int((scores[proving] > place[0]).sum()) for scores in (inside, outside))
    return Threshold(bound, float(place[0]), caught, false, len(inside[proving]), delta)


def _bounds(inside: Scores, outside: Scores, above: bool, places: Scores, delta: float) -> Scores:
    """What each threshold proves [places], both rates holding together with `CONFIDENCE`.

    above: whether the scores above it are taken for `in`, or the others for `out`; the second bounds the same epsilon.
    """
    count = len(inside)
    caught, false = (count - np.searchsorted(np.sort(scores), places, side="right") for scores in (inside, outside))
    hits, errors = (caught, false) if above else (count - false, count - caught)
    each = 1 - (1 - CONFIDENCE) / 2
    power = np.where(hits > 0, beta.ppf(1 - each, np.maximum(hits, 1), count - hits + 1), 0.0) - delta
    error = np.where(errors < count, beta.ppf(each, errors + 1, np.maximum(count - errors, 1)), 1.0)
    return np.asarray(np.log(np.maximum(power / error, 1.0)))


def _largest(holds: Callable[[float], bool]) -> float:
    """The largest number up to MOST for which a condition holds that holds for all below; 0 where it never does."""
    if not holds(0.0):
        return 0.0
    low, high = 0.0, MOST
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean. Raises ConfigError for none."""
    if not values:
        raise ConfigError("expected at least one value to average, found none")
    return math.fsum(values) / len(values)
