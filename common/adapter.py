"""The adapter: LoRA factors as plain arrays, in PEFT's own names and order.

Notation: A is [r, d_in], B is [d_out, r], the update of a linear layer is (alpha / r) B A.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.errors import ModelError

Vector = NDArray[np.float32]  # [m], the trained factors one after the other
Factors = Mapping[str, NDArray[np.float32]]

A_SUFFIX = ".lora_A.weight"
B_SUFFIX = ".lora_B.weight"


@dataclass(frozen=True)
class Adapter:
    """LoRA factors by PEFT key ("base_model.model.<module>.lora_A.weight"), float32, sorted by key."""

    factors: Factors

    def __post_init__(self) -> None:
        factors = {key: np.ascontiguousarray(self.factors[key], dtype=np.float32) for key in sorted(self.factors)}
        object.__setattr__(self, "factors", factors)

    @property
    def parameters(self) -> int:
        """How many numbers the adapter has."""
        return sum(factor.size for factor in self.factors.values())

    @property
    def bytes(self) -> int:
        """Its size on the wire, float32."""
        return 4 * self.parameters

    def digest(self) -> str:
        """SHA-256 over names, shapes and bytes: equal exactly when the adapters are equal bit for bit."""
        # All names and shapes first: they fix where every byte after them belongs, whatever a name may hold.
        names = [[key, factor.shape] for key, factor in self.factors.items()]
        sha = hashlib.sha256(json.dumps(names).encode())
        for factor in self.factors.values():
            sha.update(factor.astype("<f4").tobytes())
        return sha.hexdigest()


def is_a(key: str) -> bool:
    """Whether a key names an A factor."""
    return key.endswith(A_SUFFIX)


def is_b(key: str) -> bool:
    """Whether a key names a B factor."""
    return key.endswith(B_SUFFIX)


def flatten(factors: Factors, keys: Iterable[str]) -> Vector:
    """The named factors as one vector, in the order of `keys`."""
    parts = [np.asarray(factors[key], dtype=np.float32).ravel() for key in keys]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def unflatten(vector: NDArray[np.floating], like: Factors, keys: Iterable[str]) -> dict[str, NDArray[np.float32]]:
    """The inverse of `flatten`: shapes come from `like`.

    Raises ModelError when the vector's length is not that of the named factors.
    """
    keys = tuple(keys)
    expected = sum(like[key].size for key in keys)
    if vector.shape != (expected,):
        raise ModelError(f"expected a vector of {expected} elements for {len(keys)} factors, found {vector.shape}")
    factors, start = {}, 0
    for key in keys:
        shape, size = like[key].shape, like[key].size
        factors[key] = vector[start : start + size].reshape(shape).astype(np.float32)
        start += size
    return factors


def check_same_form(found: Adapter, expected: Adapter) -> None:
    """Raises ModelError, naming the first difference, unless both adapters have the same names and shapes."""
    missing = sorted(set(expected.factors) - set(found.factors))
    extra = sorted(set(found.factors) - set(expected.factors))
    if missing or extra:
        raise ModelError(
            f"the adapter does not fit the base model and LoRA settings: {len(missing)} factors are missing "
            f"(first: {missing[:1]}), {len(extra)} are unknown (first: {extra[:1]})"
        )
    for key, factor in expected.factors.items():
        if found.factors[key].shape != factor.shape:
            raise ModelError(f"adapter factor {key}: expected shape {factor.shape}, found {found.factors[key].shape}")
