"""Masks: AES-256-CTR streams at full width, added to and taken from a vector of uint32 in place.

A mask is uniform over Z_2^32, and so over any Z_2^k after reduction. Each key draws one stream, once, from counter 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

KEY_BYTES = 32
_BLOCK = 1 << 15  # elements that go through all masks while they are in the core's own cache
_ZEROS = bytes(4 * _BLOCK)


def _stream(key: bytes) -> CipherContext:
    if len(key) != KEY_BYTES:
        raise ValueError(f"expected a key of {KEY_BYTES} bytes, found {len(key)}")
    return Cipher(AES(key), CTR(bytes(16))).encryptor()


def add_masks(elements: NDArray[np.uint32], plus: Sequence[bytes], minus: Sequence[bytes]) -> None:
    """Adds the streams of the keys `plus` and subtracts those of `minus`, modulo 2^32, in place.

    elements: contiguous, uint32, of any length. Memory: one block beside it, whatever the number of masks.
    """
    streams = [(_stream(key), np.add) for key in plus] + [(_stream(key), np.subtract) for key in minus]
    drawn = bytearray(4 * _BLOCK + 16)
    numbers = np.frombuffer(drawn, "<u4", _BLOCK)
    zeros = memoryview(_ZEROS)
    for start in range(0, len(elements), _BLOCK):
        block = elements[start : start + _BLOCK]
        size = len(block)
        for stream, onto in streams:
            stream.update_into(zeros[: 4 * size], drawn)
            onto(block, numbers[:size], out=block)
