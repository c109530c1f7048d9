"""Aggregation methods: pairs of pure functions around a sum.

`encode` runs at the institution, `decode` at the coordinator; between the two stands only a weighted sum, so whatever
is written here is exact under secure aggregation. A method that needs to see single updates sets `linear = False`, and
is refused at configuration while secure aggregation is on.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from common.adapter import Adapter, Vector, flatten, is_b, unflatten
from common.errors import ConfigError


class Method(Protocol):
    """What the round loop needs of a method."""

    @property
    def name(self) -> str: ...

    @property
    def linear(self) -> bool:
        """Whether the sum of the encoded updates is all that the coordinator needs."""

    def trained(self, adapter: Adapter) -> tuple[str, ...]:
        """Keys of the factors that institutions train; all others stay as the coordinator sent them."""

    def encode(self, local: Adapter, global_adapter: Adapter) -> Vector:
        """The update [m] of one institution."""

    def decode(self, total: NDArray[np.float64], weight: int, global_adapter: Adapter) -> Adapter:
        """The proposed global adapter, from the weighted sum of updates [m] and the sum of weights (> 0)."""


class FedAvg:
    """A and B averaged, each by itself (McMahan et al. 2017, algorithm 1, applied to LoRA factors).

    The mean of A and the mean of B do not multiply to the mean of B A; the difference is of second order in the
    length of a round.
    """

    name = "fedavg"
    linear = True

    def trained(self, adapter: Adapter) -> tuple[str, ...]:
        return tuple(adapter.factors)

    def encode(self, local: Adapter, global_adapter: Adapter) -> Vector:
        keys = self.trained(global_adapter)
        return flatten(local.factors, keys) - flatten(global_adapter.factors, keys)

    def decode(self, total: NDArray[np.float64], weight: int, global_adapter: Adapter) -> Adapter:
        keys = self.trained(global_adapter)
        moved = flatten(global_adapter.factors, keys).astype(np.float64) + total / weight
        return Adapter({**global_adapter.factors, **unflatten(moved, global_adapter.factors, keys)})


class FFA(FedAvg):
    """Only B is trained and averaged, A stays at its common random start (Sun et al. 2024, section 4).

    With A fixed the update B A is linear in B, so the mean of B gives exactly the mean of the products, and an
    institution sends about half the bytes.
    """

    name = "ffa"

    def trained(self, adapter: Adapter) -> tuple[str, ...]:
        return tuple(key for key in adapter.factors if is_b(key))


METHODS: Mapping[str, Method] = MappingProxyType({method.name: method for method in (FedAvg(), FFA())})

NEEDS_SINGLE_UPDATES: Mapping[str, str] = MappingProxyType(
    {
        "flora": "FLoRA stacks the A and B of every institution (Wang et al. 2024)",
        "fedex": "FedEx-LoRA needs every A_i and B_i for its residual (Singhal et al. 2025)",
        "flexlora": "FlexLoRA decomposes a sum of the dense products of different ranks (Bai et al. 2024)",
    }
)
"""Methods of the literature that Silotune has not, with what they take from single updates."""


def why_not(name: str) -> str:
    """Why there is no method of that name, and what to use instead; empty for a name that nobody knows."""
    if name not in NEEDS_SINGLE_UPDATES:
        return ""
    return (
        f"{NEEDS_SINGLE_UPDATES[name]}, so it works on single updates, which secure aggregation hides, and Silotune has"
        " no such method; use fedavg, or ffa, whose average is exact"
    )


def method_named(name: str) -> Method:
    """The method of that name. Raises ConfigError that lists the names there are."""
    if name not in METHODS:
        why = f": {found}" if (found := why_not(name)) else ""
        raise ConfigError(f"federation.method: expected one of {', '.join(METHODS)}, found {name!r}{why}")
    return METHODS[name]
