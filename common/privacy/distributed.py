"""Noise in shares: what a sum of rounded vectors with every member's discrete Gaussian noise guarantees.

The mechanism is Kairouz, Liu and Steinke's (2021, "The Distributed Discrete Gaussian Mechanism for Federated Learning
with Secure Aggregation"). A member clips, rounds to whole steps, adds its share of noise, and only then masks; what
secure aggregation opens is the sum modulo 2^k. All figures in this module count steps, the distance of two levels.

*Against whom.* Against whoever sees the sums of a run: the coordinator, together with up to T members. These subtract
their own noise, and up to n - t members may be missing, so that the noise of h = t - T members is all that is counted
on; every further one is more noise. A member that looks at what is published is one of the T. It does not hold against
more than T members together, nor where a sum of fewer than t is opened, which secure aggregation refuses; and nothing
hides a unit from its own institution.

*What is bounded.* Neighbours differ in one unit, whose contribution is there or is nothing. In `institution` mode the
unit is a member's whole update. Its rounding is repeated until the L2 norm is within a bound that one rounding meets
with a probability of at least 1 - exp(-1/2) (their proposition 22, with that beta), so that the bound is certain and
delta has no part in it. In `distributed` mode a member rounds its sum of clipped contributions once. Two such sums that
differ by a vector of norm c, rounded with the same choices, differ in whole numbers, each by less than 1 from the
difference of the sums: by at most c + sqrt(d) in norm. The choices are independent of the data, so whoever even knew
them learns no more than that. Clipping elements is a projection and brings vectors no farther apart; a sum modulo 2^k
is a function of the sum. So neither costs privacy, and a sum that leaves the ring, which costs correctness, is made
improbable.

*What the noise gives.* The sum of h discrete Gaussians of scale s is nearly one of scale s sqrt(h): with
tau = 10 sum_{k<h} exp(-2 pi^2 s^2 k / (k + 1)), their proposition 14 bounds every Renyi divergence of order a by
a / 2 x min(D^2 / (h s^2) + 2 tau d, (D / (sqrt(h) s) + tau sqrt(d))^2) at sensitivity D. That is the bound of normal
noise with a certain noise multiplier, which stands for the mechanism in an event.

*Sampling.* Where units are sampled independently with probability q, the order a is whole, and P and Q are the sums
with and without the unit, given all else: the divergence of (1 - q) Q + q P from Q has the moments
sum_l C(a, l) (1 - q)^(a - l) q^l exp((l - 1) D_l(P | Q)), exactly, and grows with each D_l, for which the bound above
stands (Zhu and Wang 2019; the same formula as for normal noise). The divergence of Q from the mixture is no
larger where some one-to-one map exchanges P and Q (Mironov, Talwar and Zhang 2019, section 3); here a reflection does,
since noise is symmetric. What all else is, the other units and the choices of rounding, is the same on both sides, and
a mixture over it diverges no more than its worst part. So nothing of the formula is particular to normal noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from common.errors import ConfigError
from common.privacy.accounting import Epsilon, Event, epsilon, noise_for
from common.privacy.discrete_gaussian import LARGEST, Integers, discrete_gaussian
from common.privacy.noise import NoiseSource

Mode = Literal["institution", "distributed"]

RING_BITS = 32
_BETA_LOG = 0.5  # -log(beta): at most one rounding in 1 / (1 - exp(-1/2)) = 2.5 is kept, as Kairouz et al. choose
_ROUNDINGS = 1000  # so many fail with a probability of exp(-500)
_PRECISION = 13  # bits of a scale; what is lost by rounding up to them is below 2^-12
_LEAST_SCALE = Fraction(1, 2)  # below it the bound on sums of discrete Gaussians is not proved
_WRAP_LOG = 40 * math.log(2)  # -log of the probability that any element of any sum of a run leaves the ring
_CHANCE_BITS = 32


@dataclass(frozen=True)
class SharedNoise:
    """The noise of one run, in whole steps, the same for every member; derived from the configuration by `planned`.

    parameters: d, elements of an update. members: n, the most in a sum. honest: h, whose noise is counted on.
    clip: largest L2 norm of one unit's contribution. levels: largest absolute value of an element, in steps.
    step: what one step is worth. scale: of one member's discrete Gaussian. mode: "institution" where a
    member's whole vector is the unit's contribution, "distributed" where it is a sum over units.
    q: with what probability a round looks at a unit. rounds: of the run.
    """

    parameters: int
    members: int
    honest: int
    clip: float
    levels: int
    step: float
    scale: Fraction
    mode: Mode
    q: float
    rounds: int

    @property
    def bound(self) -> int:
        """The largest square of the L2 norm by which one unit changes a sum."""
        return _bound(self.clip / self.step, self.parameters, self.mode)

    @property
    def sensitivity(self) -> float:
        """The largest L2 norm by which one unit changes a sum, in the update's own measure."""
        return math.sqrt(self.bound) * self.step

    @property
    def deviation(self) -> float:
        """Standard deviation, in the update's own measure, of the noise that is counted on in each element of a sum."""
        return math.sqrt(self.honest) * float(self.scale) * self.step

    @property
    def multiplier(self) -> float:
        """The multiplier of normal noise that has the same bound on every Renyi divergence."""
        return multiplier(self.scale, self.honest, self.bound, self.parameters)

    @property
    def headroom(self) -> int:
        """What the noise of all members adds to the largest absolute value of a sum's element.

        A sum of discrete Gaussians exceeds x with a probability of at most 2 exp(-x^2 / (2 n s^2)). Over all elements
        and rounds of a run this is below 2^-40.
        """
        tail = 2 * self.members * (math.log(2 * max(self.parameters, 1) * self.rounds) + _WRAP_LOG)
        return math.ceil(float(self.scale) * math.sqrt(tail))

    @property
    def ring_bits(self) -> int:
        """Bits of a ring in which a sum with its noise keeps its sign."""
        return (self.members * self.levels + self.headroom).bit_length() + 1

    def event(self, rounds: int = 1) -> Event:
        """What that many rounds cost; attempts count as rounds, since each draws fresh noise over the same data."""
        return Event("discrete-gaussian", self.multiplier, self.q, rounds)

    def cost(self, delta: float) -> Epsilon:
        """What the whole run costs, each round in one attempt."""
        return epsilon([self.event(self.rounds)], delta)


def honest_members(members: int, threshold: int, colluders: int) -> int:
    """The fewest honest members in a sum that is opened: h = t - T.

    Raises ConfigError where none is left.
    """
    if not (members >= threshold > colluders >= 0):
        raise ConfigError(
            f"expected members >= threshold > colluders >= 0, found {members}, {threshold} and {colluders}: "
            "no honest member's noise could be counted on"
        )
    return threshold - colluders


def planned(
    *,
    mode: Mode,
    clip: float,
    bits: int,
    parameters: int,
    members: int,
    threshold: int,
    colluders: int,
    delta: float,
    rounds: int,
    target: float = 0.0,
    sigma: float = 0.0,
    q: float = 1.0,
    element_clip: float | None = None,
) -> SharedNoise:
    """The noise of a run that costs epsilon `target` at `delta`, or of the noise multiplier `sigma`: one is given.

    clip: of L2 norms. element_clip: of elements, by default `clip`, since an element is never larger than the norm;
    a smaller one makes steps finer, and in "distributed" mode a larger one leaves room for sums over units.
    bits: of an element of a vector, sign included. The event's sigma is never below the one that is asked for.

    Raises ConfigError where not exactly one of target and sigma is above 0, where no honest member is left, and where
    the numbers do not fit the widest ring or are too coarse for the noise.
    """
    honest = honest_members(members, threshold, colluders)
    if (target > 0) == (sigma > 0):
        raise ConfigError(f"privacy: expected one of epsilon and noise_multiplier, found {target} and {sigma}")
    edge = clip if element_clip is None else element_clip
    if not (0 < clip < math.inf and 0 < edge < math.inf and bits >= 2 and parameters >= 1 and rounds >= 1):
        raise ConfigError(
            "expected clips above 0 and at least 2 bits, 1 parameter and 1 round, found "
            f"{clip}, {edge}, {bits}, {parameters} and {rounds}"
        )
    if mode == "institution" and q != 1:
        raise ConfigError(f"institutions are not sampled one by one, so that their sampling rate is 1, found {q}")
    levels = (1 << (bits - 1)) - 1
    step = edge / levels
    bound = _bound(clip / step, parameters, mode)
    wanted = sigma if sigma > 0 else noise_for(target, delta, q, rounds, "discrete-gaussian")
    scale = _scale(wanted, honest, bound, parameters)
    found = SharedNoise(parameters, members, honest, clip, levels, step, scale, mode, q, rounds)
    if found.ring_bits > RING_BITS or scale * scale > LARGEST:
        raise ConfigError(
            f"quantise: {bits} bits an element, {members} institutions and noise of scale {float(scale):.4g} steps "
            f"need {found.ring_bits} bits; a ring has at most {RING_BITS} and a scale is at most 2^20; lower "
            "quantise.bits or ask for less noise"
        )
    return found


def noised(vector: NDArray[np.floating], noise: SharedNoise, source: NoiseSource) -> Integers:
    """A member's vector in whole steps with its share of noise [parameters]; to be masked, never sent as it is.

    Fresh for every attempt. A vector that cannot be used is passed as zeros, for the sum counts on its noise too.
    Raises ConfigError for another length and ValueError for a vector whose norm is not finite.
    """
    levels = rounded(vector, noise, source)
    levels += discrete_gaussian(noise.scale, noise.parameters, source)
    return levels


def rounded(vector: NDArray[np.floating], noise: SharedNoise, source: NoiseSource) -> Integers:
    """Clipped and rounded without bias to whole steps [parameters]; secret, since there is no noise in it."""
    if vector.shape != (noise.parameters,):
        raise ConfigError(f"expected an update of {noise.parameters} elements, found {vector.shape}")
    with np.errstate(over="ignore"):
        scaled = vector.astype(np.float64) / noise.step
        norm, longest = float(np.linalg.norm(scaled)), noise.clip / noise.step
    if not math.isfinite(norm):
        raise ValueError("a vector whose norm is not finite cannot be rounded; pass zeros instead")
    if noise.mode == "institution" and norm > longest:
        scaled *= longest / norm
    np.clip(scaled, -noise.levels, noise.levels, out=scaled)
    for _ in range(_ROUNDINGS):
        found = _rounded(scaled, source)
        if noise.mode == "distributed" or _square(found) <= noise.bound:
            return found
    raise RuntimeError("no rounding of an update is within its bound, although two in five should be")


def _rounded(scaled: NDArray[np.float64], source: NoiseSource) -> Integers:
    """Up with the probability of what is behind the point, to 2^-32; zero and whole numbers never move."""
    words = source.words(-(-len(scaled) // 2)).view(np.uint32)[: len(scaled)]
    chance = words.astype(np.float64)
    chance *= 2.0**-_CHANCE_BITS
    # Not floor(x + chance), whose sum could be rounded up to the next whole number.
    whole = np.floor(scaled)
    whole += chance < scaled - whole
    return whole.astype(np.int64)


def _square(vector: Integers) -> int:
    """The square of the L2 norm, exact: an element has at most 31 bits, and 32-bit halves of squares add up in 64."""
    squares = (vector * vector).view(np.uint64)
    low = int((squares & np.uint64(0xFFFFFFFF)).sum())
    return low + (int((squares >> np.uint64(32)).sum()) << 32)


def _bound(clip: float, parameters: int, mode: Mode) -> int:
    """The square of the largest L2 norm, in steps, by which one unit changes a sum; `clip` in steps too."""
    root = math.sqrt(parameters)
    certain = (clip + root) ** 2
    if mode == "distributed":
        return math.ceil(certain)
    likely = clip**2 + parameters / 4 + math.sqrt(2 * _BETA_LOG) * (clip + root / 2)
    return math.floor(min(certain, likely))


def tau(scale: Fraction, honest: int) -> float:
    """By how much, at most, a sum of discrete Gaussians is farther from its shift than one discrete Gaussian is."""
    return 10 * math.fsum(math.exp(-2 * (math.pi * float(scale)) ** 2 * k / (k + 1)) for k in range(1, honest))


def multiplier(scale: Fraction, honest: int, bound: int, parameters: int) -> float:
    """The multiplier of normal noise whose Renyi divergences bound those of `honest` shares of scale `scale`.

    bound: the largest square of the L2 norm by which one unit changes a sum of `parameters` elements, in steps.
    """
    relative, spare = math.sqrt(bound / honest) / float(scale), tau(scale, honest)
    divergence = min(relative**2 + 2 * spare * parameters, (relative + spare * math.sqrt(parameters)) ** 2)
    return 1 / math.sqrt(divergence)


def _scale(wanted: float, honest: int, bound: int, parameters: int) -> Fraction:
    """The smallest scale in `_PRECISION` bits that has the noise multiplier `wanted`, and is at least one half."""
    least = max(wanted * math.sqrt(bound / honest), float(_LEAST_SCALE))
    parts = 1 << max(0, _PRECISION - math.frexp(least)[1])
    low, high = 0, math.ceil(least * parts)
    while multiplier(Fraction(high, parts), honest, bound, parameters) < wanted:
        low, high = high, 2 * high
    while high - low > 1 and low:
        middle = (low + high) // 2
        enough = multiplier(Fraction(middle, parts), honest, bound, parameters) >= wanted
        low, high = (low, middle) if enough else (middle, high)
    return Fraction(high, parts)
