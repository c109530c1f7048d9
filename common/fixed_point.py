"""The fixed-point form in which updates are summed.

One institution's vector holds its update, clipped element-wise, rounded stochastically and multiplied by its weight,
followed by counters (its weight, whether it was void, that it is one vector, loss and evaluation sums) and a check
element. Elements live in Z_2^k, with k derived from the layout and at most 32, so the sum is exact, needs no more
memory than one vector, and is the same in whatever order the vectors arrive. In memory an element is a uint32; on the
wire `pack` gives it k bits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from common.adapter import Vector
from common.errors import ConfigError, SilotuneError

Ring = NDArray[np.uint32]  # elements of Z_2^k, each in [0, 2^k)
Words = NDArray[np.uint32]  # the same elements at k bits each, as little-endian words

RING_BITS = 32  # of the widest ring
CHECKS = 1  # check elements at the end of a vector
CHECK_BLOCK = 1 << 16  # elements; changing it changes the coefficients of the check
WIRE_BLOCK = 1 << 17  # elements, a multiple of 32; part of the wire form: half a mebibyte stays in the L2 cache
_BLOCK = 1 << 15  # elements that are rounded or read at a time; affects nothing but speed and the order of draws
COUNTER_BITS = 62  # a counter's largest value, as bits; Python and float64 both hold sums of such counters well enough
NATS = 1 << 20  # counters of loss count units of 2^-20 nats

COUNTERS = (
    "weight",
    "void",
    "members",
    "train_loss",
    "train_tokens",
    "validation_loss",
    "validation_tokens",
)
_OWN_COUNTERS = {"weight", "void", "members"}  # those that a caller of `encode` does not give


class CorruptSum(SilotuneError):
    """A sum that cannot be the sum of vectors that `encode` or `void` made. It tells nothing of who is at fault."""


def member_bits(members: int) -> int:
    """Bits by which a sum of that many terms is longer than a term; at least 1."""
    return max(1, (members - 1).bit_length())


@dataclass(frozen=True)
class Layout:
    """How a vector is laid out; both sides derive it from the plan, so that it cannot differ.

    parameters: m, elements of the update. members: n, the most institutions that can be in the sum.
    clip: largest absolute value of an element. bits: of a quantised element, sign included. weight_bits: of a weight.
    headroom: what noise in shares adds, at most, to the largest absolute value of a sum's element.

    Raises ConfigError for a form that cannot be meant, and when the sum of n vectors does not fit the widest ring.
    """

    parameters: int
    members: int
    clip: float
    bits: int
    weight_bits: int
    counters: tuple[str, ...] = field(default=COUNTERS)
    headroom: int = 0

    def __post_init__(self) -> None:
        if self.parameters < 0 or self.members < 1 or self.bits < 2 or self.weight_bits < 1 or self.headroom < 0:
            raise ConfigError(
                "quantise: expected at least 0 parameters, 1 institution, 2 bits an element, 1 bit of weight and a "
                f"headroom of 0, found {self.parameters}, {self.members}, {self.bits}, {self.weight_bits} and "
                f"{self.headroom}"
            )
        if self.ring_bits > RING_BITS:
            raise ConfigError(
                f"quantise: {self.bits} bits an element + {self.weight_bits} bits of weight + {self.member_bits} bits "
                f"for {self.members} institutions{' and their noise' if self.headroom else ''} need {self.ring_bits} "
                f"bits, the widest ring has {RING_BITS}; lower quantise.bits"
            )
        if not (self.clip > 0 and math.isfinite(self.clip) and math.isfinite(self.levels / self.clip)):
            raise ConfigError(f"quantise.clip: expected a finite number above 0, found {self.clip}")

    @property
    def member_bits(self) -> int:
        """Bits by which a sum of n terms is longer than a term."""
        return member_bits(self.members)

    @property
    def ring_bits(self) -> int:
        """k: bits of an element of the ring, and of the wire; they just hold the sum of n weighted elements."""
        largest = self.members * self.levels * self.max_weight + self.headroom
        return max(self.bits + self.weight_bits + self.member_bits, largest.bit_length() + 1)

    @property
    def ring_mask(self) -> int:
        """2^k - 1, which reduces a uint32 modulo 2^k."""
        return (1 << self.ring_bits) - 1

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
        return self.ring_bits - self.member_bits

    @property
    def limbs(self) -> int:
        """Elements over which a counter is split."""
        return math.ceil(COUNTER_BITS / self.limb_bits)

    @property
    def length(self) -> int:
        """Elements of a vector: the update, the counters and the check."""
        return self.parameters + len(self.counters) * self.limbs + CHECKS

    @property
    def error(self) -> float:
        """Largest error of one element of one institution's update from rounding (clipping aside)."""
        return self.clip / self.levels


def weight_of(records: int, weight_unit: int, layout: Layout) -> int:
    """An institution's weight: its records in units of `weight_unit`, at least 1, at most `layout.max_weight`."""
    return min(max(round(records / weight_unit), 1), layout.max_weight)


def quantise(values: Vector, layout: Layout, rng: np.random.Generator) -> NDArray[np.int32]:
    """Clips to [-clip, clip] and rounds stochastically to [-levels, levels]; [m] like `values`.

    Unbiased inside the clip, but for the resolution of chance: 24 random bits an element round a level up with a
    probability that is right to 2^-24. Zero stays exactly zero. Values must be finite.
    """
    rounded = np.empty(values.shape, np.int32)
    for _ in _quantised(values, layout, rng, rounded):
        pass
    return rounded


def _quantised(
    values: Vector, layout: Layout, rng: np.random.Generator, out: NDArray[np.int32]
) -> Iterator[slice[int, int, None]]:
    """Fills `out` block by block; yields where each block is, while it is still in the cache."""
    size = min(_BLOCK, len(values))
    wide, chance = np.empty(size, np.float64), np.empty(size, np.float32)
    for block in _blocks(len(values), _BLOCK):
        found = values[block]
        scaled, uniform = wide[: len(found)], chance[: len(found)]
        np.multiply(found, layout.levels / layout.clip, out=scaled, dtype=np.float64)
        # Clipped after scaling: a product of clip and levels / clip may come out just above levels.
        np.clip(scaled, -layout.levels, layout.levels, out=scaled)
        rng.random(out=uniform, dtype=np.float32)
        # A level of at most 29 bits plus 24 bits of chance is exact in float64, so that a whole number never moves
        # and no sum reaches the level above the next.
        np.add(scaled, uniform, out=scaled)
        np.floor(scaled, out=scaled)
        np.copyto(out[block], scaled, casting="unsafe")
        yield block


def _blocks(length: int, size: int) -> Iterator[slice[int, int, None]]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def encode(update: Vector, weight: int, counters: Mapping[str, int], layout: Layout, rng: np.random.Generator) -> Ring:
    """One institution's vector [layout.length], uint32, reduced modulo 2^k.

    counters: the values besides weight, void and members, each in [0, 2^62). An update or a counter that is not finite
    makes the vector void: zeros with weight 0 and void 1, so that neither the sum nor the cohort's size depends on it.
    Raises ConfigError for an update of another length, a weight out of range or an unknown counter.
    """
    if update.shape != (layout.parameters,):
        raise ConfigError(f"expected an update of {layout.parameters} elements, found {update.shape}")
    if not 1 <= weight <= layout.max_weight:
        raise ConfigError(f"expected a weight from 1 to {layout.max_weight}, found {weight}")
    if unknown := set(counters) - (set(layout.counters) - _OWN_COUNTERS):
        raise ConfigError(f"counters that the layout does not carry: {sorted(unknown)}")
    if not np.isfinite(update).all() or not all(0 <= value < 1 << COUNTER_BITS for value in counters.values()):
        return void(layout)
    vector = np.empty(layout.length, np.uint32)
    for block in _quantised(update, layout, rng, vector[: layout.parameters].view(np.int32)):
        weighted = vector[block]
        np.multiply(weighted, np.uint32(weight), out=weighted)
        np.bitwise_and(weighted, np.uint32(layout.ring_mask), out=weighted)
    return _sealed(vector, {**counters, "weight": weight}, layout)


def encode_levels(levels: NDArray[np.int64], layout: Layout) -> Ring:
    """The vector [layout.length] of an institution whose update is in whole levels already, noise and all; weight 1.

    Of the counters only its own weight and that it is one vector: neither depends on data.

    Raises ConfigError for another length.
    """
    if levels.shape != (layout.parameters,):
        raise ConfigError(f"expected an update of {layout.parameters} elements, found {levels.shape}")
    vector = np.empty(layout.length, np.uint32)
    vector[: layout.parameters] = (levels & layout.ring_mask).astype(np.uint32)
    return _sealed(vector, {"weight": 1}, layout)


def void(layout: Layout) -> Ring:
    """The vector of an institution whose update cannot be used: zeros, weight 0, void 1; one member all the same."""
    return _sealed(np.zeros(layout.length, np.uint32), {"void": 1}, layout)


def _sealed(vector: Ring, counters: Mapping[str, int], layout: Layout) -> Ring:
    """Writes counters and check behind the update of `vector` [layout.length]."""
    vector[layout.parameters : -CHECKS] = _counter_elements({**counters, "members": 1}, layout)
    vector[-CHECKS] = _check(vector[:-CHECKS]) & layout.ring_mask
    return vector


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


def _check(elements: Ring) -> int:
    """Sum of r_j x element_j modulo 2^32, and so modulo every 2^k.

    r_j is odd, public, and depends on the position j only. It is a product of one number for the place in the block
    and one for the block, so that 256 KiB of them serve a vector of any length.
    """
    within, total = _within_block(), 0
    blocks = list(_blocks(len(elements), CHECK_BLOCK))
    for block, factor in zip(blocks, _odd(b"silotune check: block", len(blocks)), strict=True):
        found = elements[block]
        # einsum is the one sum of products of integers in numpy that is vectorised.
        total += int(factor) * int(np.einsum("i,i->", found, within[: len(found)]))
    return total & 0xFFFFFFFF


@lru_cache(maxsize=1)
def _within_block() -> Ring:
    found = _odd(b"silotune check: place in block", CHECK_BLOCK)
    found.flags.writeable = False
    return found


def _odd(label: bytes, count: int) -> Ring:
    """The first `count` of a fixed sequence of odd numbers, the same on every machine and in every release."""
    return np.frombuffer(hashlib.shake_256(label).digest(4 * count), "<u4").astype(np.uint32) | np.uint32(1)


def packed_length(length: int, bits: int) -> int:
    """Words that hold `length` elements of `bits` bits. Raises ConfigError for bits that no ring has."""
    elements, words = _period(bits)
    return -(-length // elements) * words


def pack(ring: Ring, bits: int) -> Words:
    """The wire form of `ring` [length]: [packed_length], uint32, with padding bits of zero.

    With g = gcd(bits, 32), p = 32 / g elements fill q = bits / g words. A block of p x B elements (WIRE_BLOCK of them,
    the last block fewer, padded with zeros to a multiple of p) is p segments of B elements, and becomes q segments of
    B words. The elements at place i of all segments, one after the other with the least significant bit first, are
    the same string of bits as the words at place i of all segments. So every step shifts contiguous elements.
    Raises ConfigError for another shape or type, and for an element of more than `bits` bits.
    """
    if ring.ndim != 1 or ring.dtype != np.uint32:
        raise ConfigError(f"expected a vector of uint32 to pack, found {ring.shape} of {ring.dtype}")
    p, q = _period(bits)
    packed = np.empty(packed_length(len(ring), bits), np.uint32)
    spare = np.empty(WIRE_BLOCK // p, np.uint32)
    for block in _blocks(len(ring), WIRE_BLOCK):
        elements = ring[block]
        if int(elements.max()) >> bits:
            raise ConfigError(f"expected elements of at most {bits} bits to pack, found {elements.max()}")
        if missing := -len(elements) % p:
            elements = np.pad(elements, (0, missing))
        first = block.start // p * q
        segments, words = elements.reshape(p, -1), packed[first : first + len(elements) // p * q].reshape(q, -1)
        shifted, reached = spare[: words.shape[1]], -1
        for segment, word, shift in _pieces(bits):
            out = shifted if word == reached else words[word]
            if shift < 0:
                np.right_shift(segments[segment], -shift, out=out)
            else:
                np.left_shift(segments[segment], shift, out=out)
            if word == reached:
                np.bitwise_or(words[word], shifted, out=words[word])
            reached = word
    return packed


def unpack(words: Words, length: int, bits: int) -> Ring:
    """The `length` elements that `pack` wrote, uint32, each below 2^bits.

    Raises ConfigError for another number or type of words, and for padding bits that are not zero: so each vector has
    exactly one wire form.
    """
    _require_words(words, length, bits)
    p, _ = _period(bits)
    padded = np.zeros(length + -length % p, np.uint32)
    _add_words(padded, words, bits)
    np.bitwise_and(padded, np.uint32((1 << bits) - 1), out=padded)
    if padded[length:].any():
        raise ConfigError(f"expected zeros after {length} elements of {bits} bits, found other padding")
    return padded[:length]


def _require_words(words: Words, length: int, bits: int) -> None:
    if words.shape != (packed_length(length, bits),) or words.dtype != np.uint32:
        raise ConfigError(
            f"expected {packed_length(length, bits)} words of uint32 for {length} elements of {bits} bits, "
            f"found {words.shape} of {words.dtype}"
        )


def _add_words(total: Ring, words: Words, bits: int) -> None:
    """Adds packed elements to `total` modulo 2^bits; its length is that of the elements and their padding.

    What lies above `bits` bits in `total` is garbage afterwards.
    """
    p, q = _period(bits)
    spare = np.empty(WIRE_BLOCK // p, np.uint32)
    for block in _blocks(len(total), WIRE_BLOCK):
        segments = total[block].reshape(p, -1)
        first = block.start // p * q
        found = words[first : first + segments.shape[1] * q].reshape(q, -1)
        shifted = spare[: segments.shape[1]]
        for segment, word, shift in _pieces(bits):
            # The neighbour's bits come along above bit `bits`. They stay: carries only go up, so they never change
            # the bits below, and the sum is reduced when it is read.
            if shift < 0:
                np.left_shift(found[word], -shift, out=shifted)
            else:
                np.right_shift(found[word], shift, out=shifted)
            np.add(segments[segment], shifted, out=segments[segment])


def _period(bits: int) -> tuple[int, int]:
    """The least numbers of elements and of words, p and q, that fill each other exactly."""
    if not 1 <= bits <= RING_BITS:
        raise ConfigError(f"expected elements of 1 to {RING_BITS} bits, found {bits}")
    common = math.gcd(bits, 32)
    return 32 // common, bits // common


@lru_cache(maxsize=RING_BITS)
def _pieces(bits: int) -> tuple[tuple[int, int, int], ...]:
    """Which segments of elements go into which segments of words: (segment, word, shift to the left), by word."""
    pieces = []
    for segment in range(_period(bits)[0]):
        word, shift = divmod(segment * bits, 32)
        pieces.append((segment, word, shift))
        if shift + bits > 32:
            pieces.append((segment, word + 1, shift - 32))
    return tuple(pieces)


class RunningSum:
    """Adds vectors as they arrive and forgets them; holds one vector whatever the number of institutions."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.count = 0
        self._total = np.zeros(layout.length, np.uint32)  # what is above k bits means nothing

    def add(self, vector: Ring) -> None:
        """Adds one institution's vector. Raises ConfigError for a wrong length or type, or one member too many."""
        _require_elements(vector, self.layout)
        self._require_room()
        np.add(self._total, vector, out=self._total)
        self.count += 1

    def add_packed(self, words: Words) -> None:
        """Adds one institution's vector in the form of `pack`, without unpacking it as a whole.

        Raises ConfigError as `add` and `unpack` do, and leaves the sum as it was.
        """
        length, bits = self.layout.length, self.layout.ring_bits
        _require_words(words, length, bits)
        self._require_room()
        whole = length - length % WIRE_BLOCK
        cut = packed_length(whole, bits)
        rest = unpack(words[cut:], length - whole, bits)  # first, since it may refuse the padding
        _add_words(self._total[:whole], words[:cut], bits)
        self._total[whole:] += rest
        self.count += 1

    def total(self) -> Ring:
        """The sum so far, reduced modulo 2^k; a copy."""
        return self._total & np.uint32(self.layout.ring_mask)

    def _require_room(self) -> None:
        if self.count >= self.layout.members:
            raise ConfigError(f"the sum holds {self.layout.members} institutions, one more arrived")


def _require_elements(vector: Ring, layout: Layout) -> None:
    if vector.shape != (layout.length,) or vector.dtype != np.uint32:
        raise ConfigError(f"expected {layout.length} elements of uint32, found {vector.shape} of {vector.dtype}")


@dataclass(frozen=True)
class Decoded:
    """What the coordinator reads from a sum.

    update: sum of weight x update, [m]. weight: sum of weights. void: institutions that sent zeros.
    members: vectors in the sum, void ones included.
    """

    update: NDArray[np.float64]
    counters: Mapping[str, int]

    @property
    def weight(self) -> int:
        return self.counters["weight"]

    @property
    def void(self) -> int:
        return self.counters["void"]

    @property
    def members(self) -> int:
        return self.counters["members"]

    def mean_loss(self, prefix: str) -> float | None:
        """Nats per supervised token of `train` or `validation`; None where no token was counted."""
        tokens = self.counters[f"{prefix}_tokens"]
        return self.counters[f"{prefix}_loss"] / NATS / tokens if tokens else None


def decode(total: Ring, layout: Layout, *, members: int | None = None) -> Decoded:
    """Reads a sum of at most `layout.members` vectors; what is above k bits of its elements is ignored.

    members: how many vectors the sum must say it holds, where that is known.

    Raises ConfigError for a sum of a wrong length or type, and CorruptSum when its check element or its number of
    members is wrong. The check shows every error in a single element, and random errors, as of masks that did not
    cancel, but for one case in 2^k. It reveals corruption, not poisoning: its coefficients are public, so whoever
    forges a vector can give it the right check.
    """
    _require_elements(total, layout)
    if (_check(total[:-CHECKS]) ^ int(total[-CHECKS])) & layout.ring_mask:
        raise CorruptSum(
            "the sum is corrupt: its check element does not match its other elements, as when masks did not cancel; "
            "discard this attempt and repeat it. Nothing in a sum tells who is at fault."
        )
    counters = _counters(total, layout)
    if members is not None and counters["members"] != members:
        raise CorruptSum(
            f"the sum is corrupt: expected {members} vectors in it, found {counters['members']}; discard this attempt "
            "and repeat it. Nothing in a sum tells who is at fault."
        )
    update, unused = np.empty(layout.parameters, np.float64), 32 - layout.ring_bits
    for block in _blocks(layout.parameters, _BLOCK):
        signed = np.left_shift(total[block], unused).view(np.int32)
        np.right_shift(signed, unused, out=signed)  # of a signed number: bit k - 1 fills what is above it
        np.multiply(signed, layout.error, out=update[block])
    return Decoded(update, counters)


def _counters(total: Ring, layout: Layout) -> dict[str, int]:
    elements = total[layout.parameters : -CHECKS] & np.uint32(layout.ring_mask)
    return {
        name: sum(int(limb) << (layout.limb_bits * index) for index, limb in enumerate(row))
        for name, row in zip(layout.counters, elements.reshape(len(layout.counters), layout.limbs), strict=True)
    }
