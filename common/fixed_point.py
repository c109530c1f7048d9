"""The fixed-point form in which updates are summed.

One institution's vector holds its update, clipped element-wise, rounded stochastically and multiplied by its weight,
followed by counters (its weight, whether it was void, loss and evaluation sums). Elements live in Z_2^32, so the sum
is exact, needs no more memory than one vector, and is the same in whatever order the vectors arrive.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from common.adapter import Vector
from common.errors import ConfigError

Ring = NDArray[np.uint32]  # elements of Z_2^32

RING_BITS = 32
COUNTER_BITS = 62  # a counter's largest value, as bits; Python and float64 both hold sums of such counters well enough
NATS = 1 << 20  # counters of loss count units of 2^-20 nats

COUNTERS = (
    "weight",
    "void",
    "train_loss",
    "train_tokens",
    "validation_loss",
    "validation_tokens",
)


def member_bits(members: int) -> int:
    """Bits by which a sum of that many terms is longer than a term; at least 1."""
    return max(1, (members - 1).bit_length())


@dataclass(frozen=True)
class Layout:
    """How a vector is laid out; both sides derive it from the plan, so that it cannot differ.

    parameters: m, elements of the update. members: n, the most institutions that can be in the sum.
    clip: largest absolute value of an element. bits: of a quantised element, sign included. weight_bits: of a weight.

    Raises ConfigError for a form that cannot be meant, and when the sum of n vectors does not fit the ring.
    """

    parameters: int
    members: int
    clip: float
    bits: int
    weight_bits: int
    counters: tuple[str, ...] = field(default=COUNTERS)

    def __post_init__(self) -> None:
        if self.parameters < 0 or self.members < 1 or self.bits < 2 or self.weight_bits < 1:
            raise ConfigError(
                "quantise: expected at least 0 parameters, 1 institution, 2 bits an element and 1 bit of weight, found "
                f"{self.parameters}, {self.members}, {self.bits} and {self.weight_bits}"
            )
        needed = self.bits + self.weight_bits + self.member_bits
        if needed > RING_BITS:
            raise ConfigError(
                f"quantise: {self.bits} bits an element + {self.weight_bits} bits of weight + {self.member_bits} bits "
                f"for {self.members} institutions need {needed} bits, the ring has {RING_BITS}; lower quantise.bits"
            )
        if not (self.clip > 0 and math.isfinite(self.clip) and math.isfinite(self.levels / self.clip)):
            raise ConfigError(f"quantise.clip: expected a finite number above 0, found {self.clip}")

    @property
    def member_bits(self) -> int:
        """Bits by which a sum of n terms is longer than a term."""
        return member_bits(self.members)

    @property
    def levels(self) -> int:
        """Quantised elements lie in [-levels, levels]."""
        return (1 << (self.bits - 1)) - 1

    @property
    def max_weight(self) -> int:
        """Largest weight of one institution."""
        return (1 << self.weight_bits) - 1

    @property
    def limb_bits(self) -> int:
        """Bits of one element of a counter: n of them sum without overflow."""
        return RING_BITS - self.member_bits

    @property
    def limbs(self) -> int:
        """Elements over which a counter is split."""
        return math.ceil(COUNTER_BITS / self.limb_bits)

    @property
    def length(self) -> int:
        """Elements of a vector."""
        return self.parameters + len(self.counters) * self.limbs

    @property
    def error(self) -> float:
        """Largest error of one element of one institution's update from rounding (clipping aside)."""
        return self.clip / self.levels


def weight_of(records: int, weight_unit: int, layout: Layout) -> int:
    """An institution's weight: its records in units of `weight_unit`, at least 1, at most `layout.max_weight`."""
    return min(max(round(records / weight_unit), 1), layout.max_weight)


def quantise(values: Vector, layout: Layout, rng: np.random.Generator) -> NDArray[np.int64]:
    """Clips to [-clip, clip] and rounds stochastically to [-levels, levels]; unbiased for values inside the clip.

    Zero stays exactly zero. Values must be finite.
    """
    # Clipped after scaling: a product of clip and levels / clip may come out just above levels.
    scaled = np.clip(values.astype(np.float64) * (layout.levels / layout.clip), -layout.levels, layout.levels)
    low = np.floor(scaled)
    return (low + (rng.random(scaled.shape) < scaled - low)).astype(np.int64)


def encode(update: Vector, weight: int, counters: Mapping[str, int], layout: Layout, rng: np.random.Generator) -> Ring:
    """One institution's vector [layout.length].

    counters: the values besides weight and void, each in [0, 2^62). An update or a counter that is not finite makes
    the vector void: zeros with weight 0 and void 1, so that neither the sum nor the cohort's size depends on it.
    Raises ConfigError for an update of another length, a weight out of range or an unknown counter.
    """
    if update.shape != (layout.parameters,):
        raise ConfigError(f"expected an update of {layout.parameters} elements, found {update.shape}")
    if not 1 <= weight <= layout.max_weight:
        raise ConfigError(f"expected a weight from 1 to {layout.max_weight}, found {weight}")
    if unknown := set(counters) - set(layout.counters) | set(counters) & {"weight", "void"}:
        raise ConfigError(f"counters that the layout does not carry: {sorted(unknown)}")
    if not np.isfinite(update).all() or not all(0 <= value < 1 << COUNTER_BITS for value in counters.values()):
        return void(layout)
    elements = quantise(update, layout, rng) * weight
    return np.concatenate([elements.astype(np.uint32), _counter_elements({**counters, "weight": weight}, layout)])


def void(layout: Layout) -> Ring:
    """The vector of an institution whose update cannot be used: zeros, weight 0, void 1."""
    return np.concatenate([np.zeros(layout.parameters, np.uint32), _counter_elements({"void": 1}, layout)])


def _counter_elements(values: Mapping[str, int], layout: Layout) -> Ring:
    mask = (1 << layout.limb_bits) - 1
    return np.array(
        [
            values.get(name, 0) >> (layout.limb_bits * limb) & mask
            for name in layout.counters
            for limb in range(layout.limbs)
        ],
        dtype=np.uint32,
    )


class RunningSum:
    """Adds vectors as they arrive and forgets them; holds one vector whatever the number of institutions."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.count = 0
        self._total = np.zeros(layout.length, np.uint32)

    def add(self, vector: Ring) -> None:
        """Adds one institution's vector. Raises ConfigError for a wrong length or type, or one member too many."""
        if vector.shape != (self.layout.length,) or vector.dtype != np.uint32:
            raise ConfigError(
                f"expected {self.layout.length} elements of uint32, found {vector.shape} of {vector.dtype}"
            )
        if self.count >= self.layout.members:
            raise ConfigError(f"the sum holds {self.layout.members} institutions, one more arrived")
        np.add(self._total, vector, out=self._total)
        self.count += 1

    def total(self) -> Ring:
        """The sum so far."""
        return self._total.copy()


@dataclass(frozen=True)
class Decoded:
    """What the coordinator reads from a sum.

    update: sum of weight x update, [m]. weight: sum of weights. void: institutions that sent zeros.
    """

    update: NDArray[np.float64]
    counters: Mapping[str, int]

    @property
    def weight(self) -> int:
        return self.counters["weight"]

    @property
    def void(self) -> int:
        return self.counters["void"]

    def mean_loss(self, prefix: str) -> float | None:
        """Nats per supervised token of `train` or `validation`; None where no token was counted."""
        tokens = self.counters[f"{prefix}_tokens"]
        return self.counters[f"{prefix}_loss"] / NATS / tokens if tokens else None


def decode(total: Ring, layout: Layout) -> Decoded:
    """Reads a sum of at most `layout.members` vectors. Raises ConfigError for one of a wrong length or type."""
    if total.shape != (layout.length,) or total.dtype != np.uint32:
        raise ConfigError(f"expected a sum of {layout.length} elements of uint32, found {total.shape} of {total.dtype}")
    signed = total[: layout.parameters].view(np.int32).astype(np.float64)
    limbs = total[layout.parameters :].reshape(len(layout.counters), layout.limbs)
    counters = {
        name: sum(int(limb) << (layout.limb_bits * index) for index, limb in enumerate(row))
        for name, row in zip(layout.counters, limbs, strict=True)
    }
    return Decoded(signed * layout.error, counters)
