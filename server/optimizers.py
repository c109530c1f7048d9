"""Server optimizers: how far the global adapter moves towards what the round proposes.

The difference between the proposal and the global adapter plays the part of a gradient (Reddi et al. 2021).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from common.adapter import Adapter
from common.config import ServerOptimizerConfig

Moments = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class OptimizerState:
    """Running moments by adapter key; empty before the first step and for plain FedAvg."""

    first: Moments = field(default_factory=dict)
    second: Moments = field(default_factory=dict)


def step(
    config: ServerOptimizerConfig, state: OptimizerState, current: Adapter, proposed: Adapter
) -> tuple[Adapter, OptimizerState]:
    """One step from `current` towards `proposed`.

    fedavg: current + lr * difference; with lr 1 this is `proposed` exactly.
    fedavgm: the difference goes through momentum (Hsu et al. 2019, section 4.2).
    fedadam: Adam without bias correction over the difference (Reddi et al. 2021, algorithm 2).
    """
    if config.name == "fedavg" and config.learning_rate == 1.0:
        return proposed, state
    factors, first, second = {}, {}, {}
    for key, here in current.factors.items():
        difference = proposed.factors[key] - here
        if config.name == "fedavg":
            factors[key] = here + config.learning_rate * difference
            continue
        before = state.first.get(key, np.zeros_like(here))
        if config.name == "fedavgm":
            first[key] = config.momentum * before + difference
            factors[key] = here + config.learning_rate * first[key]
        else:
            first[key] = config.momentum * before + (1 - config.momentum) * difference
            earlier = state.second.get(key, np.zeros_like(here))
            second[key] = config.beta2 * earlier + (1 - config.beta2) * difference**2
            factors[key] = here + config.learning_rate * first[key] / (np.sqrt(second[key]) + config.epsilon)
    return Adapter(factors), OptimizerState(first, second)
