"""Seeded randomness for everything that must be repeatable.

Nothing here is secret. Masks, keys and deployed noise never come from these generators.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(*parts: str | int) -> int:
    """A 64-bit seed that depends on every part and on their order; the same in every process and on every machine."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def seeded(*parts: str | int) -> np.random.Generator:
    """A generator of its own for one purpose, such as `seeded(seed, "rounding", name, round)`."""
    return np.random.default_rng(derive_seed(*parts))
