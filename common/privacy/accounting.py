"""What noise costs: epsilon from a list of events, the noise for an epsilon, and how much a budget still holds.

An event is a number of steps, each of which bounds one unit's influence, adds noise and looks at a Poisson sample of
the units. Events of one population compose, whatever runs they belong to. Neighbours differ in one unit, whose
contribution is there or is nothing (Kairouz et al. 2021 call it zero-out); the number of units is public.

Accounting is Opacus's: composition of privacy loss (PRV, Gopi et al. 2021) and Renyi divergences (RDP). Both give an
upper bound, and so does the smaller of the two. This module chooses their meshes and orders, handles the cases that
they do not, and searches. Opacus comes with torch, so it is imported at the first figure.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
from scipy.special import log_ndtr

from common.errors import ConfigError

Mechanism = Literal["gaussian", "discrete-gaussian"]

_WHOLE_ORDERS = (*range(2, 64), 80, 96, 128, 160, 192, 256, 320, 384, 512)
_ORDERS = tuple(sorted({*(1 + tenth / 10 for tenth in range(1, 100)), *_WHOLE_ORDERS}))
_TENTHS = 1e-9  # orders that are this near a whole number are that number

_SHARE = 0.004  # of epsilon that the mesh of a PRV may cost
_FAR = 0.8  # a PRV below this share of what its mesh was chosen for is computed again on a mesh of its own
_WIDEST_ERROR = 0.5  # of epsilon, absolute: Opacus's choice of a domain is known to be right below 1
_POINTS = 1 << 21  # of a mesh; more take seconds, so a mesh gets coarser and the bound larger by it
_SMALLEST_DELTA = 1e-10  # below it the rounding of Fourier transforms would decide
_LARGEST_EPSILON = 600.0  # of a PRV, whose mesh holds exp(epsilon)
_EXACT = 1e-9  # relative, of what is found by halving
_NOTHING = 1e-300  # stands for 0 where a logarithm is taken
_TOLD = 10_000  # parts of 1 that an epsilon is told in
_DIGITS = 900  # numbers of three digits in a decade
_WEAKEST, _STRONGEST = -2, 6  # decades between which noise is looked for
LONGEST = 10**7  # events counted at most by `times_left`


@dataclass(frozen=True)
class Event:
    """Equal steps that used data.

    mechanism: what made the noise. "gaussian": normal noise. "discrete-gaussian": a sum of discrete Gaussians, of
    which only Renyi divergences are bounded. sigma: the noise multiplier, noise by sensitivity; of a
    "discrete-gaussian" the one of the normal noise that has the same bound (`common.privacy.distributed`).
    q: with what probability each step looks at a unit, independently of other units and steps; 1 means always.
    steps: how many; 0 costs nothing.

    Raises ConfigError for what can be none of these.
    """

    mechanism: Mechanism
    sigma: float
    q: float
    steps: int

    def __post_init__(self) -> None:
        if self.mechanism not in get_args(Mechanism):
            raise ConfigError(f"expected a mechanism of {get_args(Mechanism)}, found {self.mechanism!r}")
        if not (0 < self.sigma < math.inf and 0 < self.q <= 1 and self.steps >= 0):
            raise ConfigError(
                "expected a finite noise multiplier above 0, a sampling rate above 0 and at most 1 and a number of "
                f"steps from 0, found {self.sigma}, {self.q} and {self.steps}"
            )


@dataclass(frozen=True)
class Epsilon:
    """Upper bounds on epsilon at one delta.

    prv: by composition of privacy loss, its error added; None where that is not to be had: for sums of discrete
    Gaussians, for delta below 1e-10 and for epsilon beyond a few hundred. rdp: by Renyi divergences.
    """

    prv: float | None
    rdp: float

    @property
    def bound(self) -> float:
        """The one to report and to hold against a budget: the smaller, since both hold."""
        return self.rdp if self.prv is None else min(self.prv, self.rdp)


def rounded_up(found: Epsilon) -> float:
    """The bound as people are told it: four digits after the point and no less than it is.

    Never 0 where steps cost anything by either bound: noise that hides all but what delta allows has an epsilon of 0,
    which would read as if nothing had been spent.
    """
    return math.ceil((found.bound or min(found.rdp, 1 / _TOLD)) * _TOLD) / _TOLD


def epsilon(events: Iterable[Event], delta: float) -> Epsilon:
    """What the events cost together. Order does not matter; equal steps are counted together.

    Raises ConfigError for a delta that is not between 0 and 1.
    """
    if not 0 < delta < 1:
        raise ConfigError(f"expected delta to be between 0 and 1, found {delta}")
    return _epsilon(_merged(events), delta)


def over_rounds(rounds: Sequence[Sequence[Event]], delta: float, most: int) -> tuple[tuple[int, Epsilon], ...]:
    """What was spent after each of at most `most` rounds, evenly spread, the last among them; rounds count from 1.

    rounds: what each one cost. A bound takes up to some tenths of a second where steps sample, and is known afterwards
    for the same steps again, so that institutions with equal rounds cost no more than one.
    """
    return tuple(
        (number, epsilon([event for part in rounds[:number] for event in part], delta))
        for number in moments(len(rounds), most)
    )


def moments(count: int, most: int) -> tuple[int, ...]:
    """At most `most` numbers from 1 to `count`, evenly spread, `count` among them; none where it is 0."""
    return tuple(sorted({max(1, round(count * (place + 1) / most)) for place in range(most)})) if count else ()


def noise_for(target: float, delta: float, q: float, steps: int, mechanism: Mechanism = "gaussian") -> float:
    """The smallest noise multiplier, in three digits, whose `steps` steps cost at most `target`.

    Raises ConfigError for a target that is not above 0 or that no noise up to 10^6 reaches.
    """
    if not target > 0:
        raise ConfigError(f"privacy.epsilon: expected a number above 0, found {target}")
    if steps < 1:
        raise ConfigError(f"expected at least 1 step to find the noise for, found {steps}")
    return _noise_for(target, delta, q, steps, mechanism)


def times_left(spent: Sequence[Event], event: Event, budget: float, delta: float) -> int:
    """How often `event`, with all of its steps, still fits into `budget` after what is spent; 0 to LONGEST."""

    def cost(times: int) -> float:
        return epsilon([*spent, _times(event, times)], delta).bound

    def by_rdp(times: int) -> float:
        return _rdp_epsilon(_merged([*spent, _times(event, times)]), delta)

    if cost(0) > budget:
        return 0
    # By Renyi divergences first: these are known once for all counts, and no bound is above them.
    low = _last(by_rdp, budget, 0, 1, LONGEST) if by_rdp(0) <= budget else 0
    return _last(cost, budget, low, max(1, low // 8), LONGEST)


def _times(event: Event, times: int) -> Event:
    return Event(event.mechanism, event.sigma, event.q, event.steps * times)


def _last(cost: Callable[[int], float], limit: float, low: int, stride: int, end: int) -> int:
    """The last number up to `end` whose cost is at most `limit`; `low` is one, and cost does not fall.

    Steps grow until one is too far; then each guess is where the line between the logarithms of both ends crosses the
    limit, or the middle where the last guess left more than half.
    """
    high, by_middle = low, False
    while cost(high) <= limit:
        if high >= end:
            return end
        low, high, stride = high, min(high + stride, end), 2 * stride
    while high - low > 1:
        left, aim, right = (math.log(max(x, _NOTHING)) for x in (cost(low), limit, cost(high)))
        share = 0.5 if by_middle or right <= left else (aim - left) / (right - left)
        guess = min(max(low + math.floor(share * (high - low)), low + 1), high - 1)
        before = high - low
        low, high = (guess, high) if cost(guess) <= limit else (low, guess)
        by_middle = 2 * (high - low) > before
    return low


Key = tuple[Mechanism, float, float, int]


def _merged(events: Iterable[Event]) -> tuple[Key, ...]:
    """Equal steps counted together, in an order of their own.

    Gaussian steps without sampling are together one Gaussian step: the squares of sensitivity by noise add up.
    """
    steps: dict[tuple[Mechanism, float, float], int] = {}
    for event in events:
        if event.steps:
            same = (event.mechanism, float(event.sigma), float(event.q))
            steps[same] = steps.get(same, 0) + event.steps
    rest: list[Key] = [(*same, count) for same, count in steps.items() if (same[0], same[2]) != ("gaussian", 1)]
    whole = math.fsum(count / sigma**2 for (kind, sigma, q), count in steps.items() if (kind, q) == ("gaussian", 1))
    if whole:
        rest.append(("gaussian", 1 / math.sqrt(whole), 1.0, 1))
    return tuple(sorted(rest))


@lru_cache(maxsize=4096)
def _epsilon(events: tuple[Key, ...], delta: float) -> Epsilon:
    if not events:
        return Epsilon(0.0, 0.0)
    rdp = _rdp_epsilon(events, delta)
    if any(mechanism != "gaussian" for mechanism, *_ in events):
        return Epsilon(None, rdp)
    if len(events) == 1 and events[0][2] == 1:
        return Epsilon(_gaussian_epsilon(events[0][1], delta), rdp)
    return Epsilon(_prv_epsilon(events, delta), rdp)


def _gaussian_epsilon(sigma: float, delta: float) -> float:
    """Of one Gaussian step without sampling: exact (Balle & Wang 2018, theorem 8)."""

    def surplus(epsilon: float) -> float:
        above, below = log_ndtr(0.5 / sigma - epsilon * sigma), epsilon + log_ndtr(-0.5 / sigma - epsilon * sigma)
        return float(above + math.log(-math.expm1(below - above))) - math.log(delta) if below < above else -math.inf

    if surplus(0.0) <= 0:
        return 0.0
    low, high = 0.0, 1.0
    while surplus(high) > 0:
        low, high = high, 2 * high
    while high - low > _EXACT * high:
        middle = (low + high) / 2
        low, high = (middle, high) if surplus(middle) > 0 else (low, middle)
    return high


def _rdp_epsilon(events: tuple[Key, ...], delta: float) -> float:
    """By Renyi divergences, converted as Balle et al. (2020, theorem 21) do."""
    from opacus.accountants.analysis.rdp import get_privacy_spent

    if not events:
        return 0.0
    total = np.sum([steps * np.array(_curve(kind, sigma, q)) for kind, sigma, q, steps in events], axis=0)
    usable = np.isfinite(total)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the best order being the first or the last, which only costs tightness
        found, _ = get_privacy_spent(orders=np.array(_ORDERS)[usable], rdp=total[usable], delta=delta)
    return max(float(found), 0.0)


@lru_cache(maxsize=1024)
def _curve(mechanism: Mechanism, sigma: float, q: float) -> tuple[float, ...]:
    """A bound on the Renyi divergence of one step at each of `_ORDERS`; inf where there is none.

    A Gaussian step with sampling: Mironov, Talwar and Zhang (2019), by Opacus. A discrete one is bounded before
    sampling by order / (2 sigma^2), as a Gaussian is; sampling is accounted for at whole orders, where that bound is
    all that the formula needs (see `common.privacy.distributed`), and between them by convexity of (order - 1) times
    the divergence in the order.
    """
    if q == 1:
        return tuple(order / (2 * sigma**2) for order in _ORDERS)
    if mechanism == "gaussian":
        return tuple(_sampled(sigma, q, order) for order in _ORDERS)
    whole = {order: _sampled(sigma, q, order) for order in _WHOLE_ORDERS}
    knots, heights = [1, *_WHOLE_ORDERS], [0.0, *((order - 1) * whole[order] for order in _WHOLE_ORDERS)]
    return tuple(float(np.interp(order, knots, heights)) / (order - 1) for order in _ORDERS)


def _sampled(sigma: float, q: float, order: float) -> float:
    from opacus.accountants.analysis.rdp import compute_rdp

    nearest = round(order)
    exact = float(nearest) if abs(order - nearest) < _TENTHS else float(order)
    try:
        found = float(compute_rdp(q=q, noise_multiplier=sigma, steps=1, orders=exact))
    except (ValueError, OverflowError):  # its series of differing signs lost all digits
        return math.inf
    return found if found >= 0 else math.inf


def _prv_epsilon(events: tuple[Key, ...], delta: float) -> float | None:
    """By composition of privacy loss: Opacus's upper bound, at a mesh that costs 0.4 % where `_POINTS` allow it."""
    delta_error = delta / 1000
    # A little more than the half width of the domain that Opacus will choose.
    widest = _rdp_epsilon(events, delta_error / 8) + 3
    if delta < _SMALLEST_DELTA or widest > _LARGEST_EPSILON:
        return None
    steps = sum(count for *_, count in events)
    finest = 2 * widest * math.sqrt(steps * math.log(12 / delta_error) / 2) / _POINTS
    expected = _rdp_epsilon(events, delta)
    error = min(max(_SHARE * expected, finest), _WIDEST_ERROR)
    found = _upper_bound(events, delta, error, delta_error)
    while found is not None and error > finest and found < _FAR * expected:
        expected, error = found, max(_SHARE * found, finest)
        found = _upper_bound(events, delta, error, delta_error)
    return found


def _upper_bound(events: tuple[Key, ...], delta: float, error: float, delta_error: float) -> float | None:
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(sigma, q, count) for _, sigma, q, count in events]
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = float(accountant.get_epsilon(delta, eps_error=error, delta_error=delta_error))
    except (RuntimeError, ValueError):  # it says of itself that the mesh does not do
        return None
    return max(found, 0.0) if math.isfinite(found) else None


@lru_cache(maxsize=256)
def _noise_for(target: float, delta: float, q: float, steps: int, mechanism: Mechanism) -> float:
    def event(weakness: int) -> Event:
        return Event(mechanism, _three_digits(-weakness), q, steps)

    def cost(weakness: int) -> float:
        return epsilon([event(weakness)], delta).bound

    def by_rdp(weakness: int) -> float:
        return _rdp_epsilon(_merged([event(weakness)]), delta)

    first, end = -_STRONGEST * _DIGITS, -_WEAKEST * _DIGITS
    known = by_rdp(first) <= target
    if not known and cost(first) > target:
        raise ConfigError(
            f"privacy: {steps} steps at sampling rate {q} cost more than epsilon {target} at delta {delta}, whatever "
            "the noise; raise epsilon or delta"
        )
    low = _last(by_rdp, target, first, end - first, end) if known else first
    return _three_digits(-_last(cost, target, low, 24, end))


def _three_digits(index: int) -> float:
    """The numbers of three digits in order: 1.00 at 0, 9.99 at 899, 10.0 at 900."""
    decade, place = divmod(index, _DIGITS)
    return float(f"{100 + place}e{decade - 2}")
