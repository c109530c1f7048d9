"""Secret sharing (Shamir 1979): any t shares give the secret, fewer say nothing of it.

Over the prime field of 2^521 - 1, which holds a secret of 32 bytes whole. A library's field of 2^128 needs two shares a
secret and takes some milliseconds a multiplication table of t x n; here the weights of a set of shares are computed
once for all secrets (`weights`), so that a coordinator opens hundreds of secrets in milliseconds.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

PRIME = 2**521 - 1
SHARE_BYTES = 66
SECRET_BYTES = 32


def split(secret: bytes | bytearray, threshold: int, count: int) -> list[bytes]:
    """Shares of a secret of 32 bytes for the points 1 to `count`, 66 bytes each; coefficients from the system.

    Raises ValueError unless 1 <= threshold <= count.
    """
    if not 1 <= threshold <= count or len(secret) != SECRET_BYTES:
        raise ValueError(f"expected a secret of {SECRET_BYTES} bytes and 1 <= threshold <= {count}")
    coefficients = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    constant = int.from_bytes(secret, "big")
    return [value.to_bytes(SHARE_BYTES, "big") for value in evaluate([constant, *coefficients], count)]


def evaluate(polynomial: Sequence[int], count: int, prime: int = PRIME) -> list[int]:
    """The values at 1 to `count` of a polynomial given by its coefficients, constant first."""
    values = []
    for point in range(1, count + 1):
        value = 0
        for coefficient in reversed(polynomial):
            value = (value * point + coefficient) % prime
        values.append(value)
    return values


def weights(points: Sequence[int], prime: int = PRIME) -> list[int]:
    """Lagrange's weights at 0: the secret is the sum of weight x share over these points.

    Raises ValueError for points that are not different ones of 1 .. prime - 1.
    """
    if len(set(points)) < len(points) or not all(1 <= point < prime for point in points):
        raise ValueError(f"expected different points above 0, found {list(points)}")
    found = []
    for point in points:
        above, below = 1, 1
        for other in points:
            if other != point:
                above = above * other % prime
                below = below * (other - point) % prime
        found.append(above * pow(below, -1, prime) % prime)
    return found


def combine(weights: Sequence[int], shares: Sequence[bytes]) -> bytes:
    """The secret of 32 bytes, from shares in the order of their weights.

    Raises ValueError when they give no secret, which is certain for malformed shares and likely for false ones; a false
    one that gives another secret is found by whoever knows what the secret must fit.
    """
    values = [int.from_bytes(share, "big") for share in shares]
    if any(len(share) != SHARE_BYTES for share in shares) or any(value >= PRIME for value in values):
        raise ValueError(f"expected shares of {SHARE_BYTES} bytes below the prime")
    secret = sum(weight * value for weight, value in zip(weights, values, strict=True)) % PRIME
    if secret >> (8 * SECRET_BYTES):
        raise ValueError("the shares do not belong together")
    return secret.to_bytes(SECRET_BYTES, "big")
