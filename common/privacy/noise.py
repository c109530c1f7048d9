"""Where the noise of differential privacy comes from, and what is drawn from it.

A source gives uniform words and nothing else; normals, choices of units and discrete Gaussians are computed from them
by the same code whatever the source. There are two. `SystemNoise` is the operating system's generator and the only one
that an institution of a deployment uses: its code makes one itself and takes none, so that no setting and no message
can put another in its place. `SeededNoise` makes simulations repeatable; whoever knows its seed can subtract the noise.
"""

from __future__ import annotations

import math
import secrets
from fractions import Fraction
from typing import NoReturn, Protocol, final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

from common.errors import ConfigError
from common.randomness import seeded

Words = NDArray[np.uint64]

SUMMANDS = 4  # normals behind each one that is handed out; 2n with n = 2 of Holohan & Braghin
_KEY_BYTES = 32
_AES_BLOCK = 16
_ZEROS = bytes(1 << 17)
_BLOCK = 1 << 12  # pairs of normals at a time: their words stay in the core's own cache


class NoiseSource(Protocol):
    """Uniform random words; nothing but words, so that a source cannot differ in what is made of them."""

    def words(self, count: int) -> Words:
        """`count` independent words, uniform over all of 64 bits."""
        ...


class _Unrepeated:
    """A source that is neither copied nor sent: two that go on from one state would give the same noise twice."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(f"{type(self).__name__} is neither pickled nor copied: make one where the noise is drawn")

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


@final
class SystemNoise(_Unrepeated):
    """The operating system's generator, expanded by AES-256-CTR.

    Every call takes a key of its own from the operating system and forgets it with its stream, so that there is no
    state: nothing to read out of memory afterwards, and nothing that a fork or a restored machine image would repeat.
    """

    __slots__ = ()

    def __init_subclass__(cls) -> NoReturn:
        raise TypeError("SystemNoise has no kinds: whoever asks for it must get the operating system's generator")

    def words(self, count: int) -> Words:
        size = 8 * count
        found = np.empty(size + _AES_BLOCK, np.uint8)  # the cipher wants a block of room behind what it writes
        room, zeros = found.data, memoryview(_ZEROS)
        stream = Cipher(AES(secrets.token_bytes(_KEY_BYTES)), CTR(bytes(_AES_BLOCK))).encryptor()
        for start in range(0, size, len(zeros)):
            stream.update_into(zeros[: size - start], room[start:])
        return found[:size].view("<u8").astype(np.uint64, copy=False)


@final
class SeededNoise(_Unrepeated):
    """Repeatable noise for simulations, from parts such as `SeededNoise(seed, "noise", name, round)`. Not secret."""

    __slots__ = ("_generator",)

    def __init__(self, *parts: str | int) -> None:
        self._generator = seeded("noise", *parts)

    def words(self, count: int) -> Words:
        return self._generator.bit_generator.random_raw(count)


def normals(source: NoiseSource, count: int) -> NDArray[np.float64]:
    """`count` independent standard normals [count].

    Floating-point noise betrays what it was added to, since not every number can be a sum with a given one (Mironov
    2012). As Holohan & Braghin (2021, section 5.1) propose, each number is therefore a sum of four normals, divided by
    two: whoever wants to tell which value a noised number began as has 2^(53 x 3) combinations to go through. For this
    to hold, add them in float64 to a sum in float64, and round to a shorter format afterwards only.

    Box and Muller's transform, its radius from 64 bits, so that a summand reaches 9.4 and what is cut off has a
    probability below 2^-64.
    """
    drawn = np.empty((2, -(-count // 2)), np.float64)
    for start in range(0, drawn.shape[1], _BLOCK):
        pairs = drawn[:, start : start + _BLOCK]
        words = source.words(2 * SUMMANDS * pairs.shape[1]).reshape(2, SUMMANDS, -1)
        radius, angle = words[0].astype(np.float64), (words[1] >> np.uint64(11)).astype(np.float64)
        radius += 1.0  # from 1 to 2^64: never the logarithm of 0
        radius *= 2.0**-64
        np.log(radius, out=radius)
        radius *= -2.0 / SUMMANDS
        np.sqrt(radius, out=radius)
        angle *= 2.0 * math.pi * 2.0**-53
        np.einsum("ij,ij->j", radius, np.cos(angle), out=pairs[0])
        np.einsum("ij,ij->j", radius, np.sin(angle), out=pairs[1])
    return drawn.reshape(-1)[:count]


def bernoulli(source: NoiseSource, probability: float, count: int) -> NDArray[np.bool_]:
    """`count` independent choices [count], each True with `probability`, which is met to 2^-64 and never exceeded.

    This is Poisson sampling: every unit is in a lot by a choice of its own, so that a lot's size is random too.
    Raises ConfigError for what is no probability.
    """
    if not 0 <= probability <= 1:
        raise ConfigError(f"expected a probability from 0 to 1, found {probability}")
    if probability == 1:
        return np.ones(count, np.bool_)
    return source.words(count) < np.uint64(math.floor(Fraction(probability) * 2**64))


def uniform_below(source: NoiseSource, bound: int, count: int) -> Words:
    """`count` independent whole numbers [count], exactly uniform from 0 to bound - 1; `bound` from 1 to 2^64 - 1.

    Words below 2^64 modulo `bound` are drawn anew, so that every remainder is that of equally many words.
    """
    words = source.words(count)
    if surplus := (1 << 64) % bound:
        while len(again := np.flatnonzero(words < np.uint64(surplus))):
            words[again] = source.words(len(again))
    if bound & (bound - 1):
        return words % np.uint64(bound)
    return words & np.uint64(bound - 1)
