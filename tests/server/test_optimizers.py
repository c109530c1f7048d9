"""Server optimizers against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.adapter import Adapter
from common.config import ServerOptimizerConfig
from server.optimizers import OptimizerState, step

KEY = "layer.lora_B.weight"
# float32 keeps 24 bits; a handful of operations on numbers near 1 loses a few of the last.
CLOSE = 1e-6


def one(value: float) -> Adapter:
    return Adapter({KEY: np.array([[value]], np.float32)})


def value(adapter: Adapter) -> float:
    return float(adapter.factors[KEY][0, 0])


def walk(config: ServerOptimizerConfig, differences: list[float]) -> list[float]:
    """Where steps end up that are each proposed that far away from where the walk then stands."""
    state, here, places = OptimizerState(), one(0.0), []
    for difference in differences:
        here, state = step(config, state, here, one(value(here) + difference))
        places.append(value(here))
    return places


def test_fedavg_with_rate_one_is_the_proposal_itself() -> None:
    rng = np.random.default_rng(1)
    current, proposed = (Adapter({KEY: rng.standard_normal((5, 7))}) for _ in range(2))
    adapter, state = step(ServerOptimizerConfig("fedavg"), OptimizerState(), current, proposed)
    assert adapter.digest() == proposed.digest()
    assert (state.first, state.second) == ({}, {})


def test_fedavg_with_another_rate_goes_that_part_of_the_way() -> None:
    assert walk(ServerOptimizerConfig("fedavg", learning_rate=0.25), [1.0, -2.0]) == [0.25, -0.25]
    assert walk(ServerOptimizerConfig("fedavg", learning_rate=1.5), [1.0]) == [1.5]


def test_fedavgm_adds_up_momentum() -> None:
    config = ServerOptimizerConfig("fedavgm", learning_rate=1.0, momentum=0.9)
    # v: 1, then 0.9 + 0.5 = 1.4, then 1.26 - 2 = -0.74
    assert walk(config, [1.0, 0.5, -2.0]) == pytest.approx([1.0, 2.4, 1.66], abs=CLOSE)
    slower = ServerOptimizerConfig("fedavgm", learning_rate=0.1, momentum=0.5)
    # v: 1, 1.5, 1.75
    assert walk(slower, [1.0, 1.0, 1.0]) == pytest.approx([0.1, 0.25, 0.425], abs=CLOSE)


def test_fedadam_scales_by_the_root_of_the_second_moment() -> None:
    config = ServerOptimizerConfig("fedadam", learning_rate=0.1, momentum=0.9, beta2=0.99, epsilon=1e-3)
    # m = 0.1, v = 0.01: 0.1 * 0.1 / (0.1 + 0.001); then m = 0.09 - 0.1, v = 0.0099 + 0.01
    first = 0.01 / 0.101
    second = first - 0.001 / (math.sqrt(0.0199) + 0.001)
    assert walk(config, [1.0, -1.0]) == pytest.approx([first, second], abs=CLOSE)


def test_fedadam_moves_small_and_large_differences_alike() -> None:
    config = ServerOptimizerConfig("fedadam", learning_rate=0.1, momentum=0.0, beta2=0.0, epsilon=1e-6)
    assert walk(config, [1e-2]) == pytest.approx([0.1], rel=1e-3)
    assert walk(config, [-50.0]) == pytest.approx([-0.1], rel=1e-3)


@pytest.mark.parametrize("name", ["fedavg", "fedavgm", "fedadam"])
def test_what_nobody_trains_stays_bit_identical_and_types_stay(name: str) -> None:
    rng = np.random.default_rng(2)
    frozen, moving = rng.standard_normal((3, 4)), rng.standard_normal((4, 3))
    current = Adapter({"layer.lora_A.weight": frozen, KEY: moving})
    before = current.digest()
    state = OptimizerState()
    for number in range(3):
        proposed = Adapter({**current.factors, KEY: current.factors[KEY] + rng.standard_normal((4, 3))})
        adapter, state = step(ServerOptimizerConfig(name, learning_rate=0.7), state, current, proposed)
        assert adapter.factors["layer.lora_A.weight"].tobytes() == current.factors["layer.lora_A.weight"].tobytes()
        assert not np.array_equal(adapter.factors[KEY], current.factors[KEY])
        arrays = [*adapter.factors.values(), *state.first.values(), *state.second.values()]
        assert {array.dtype for array in arrays} == {np.dtype(np.float32)}
        if number == 0:
            assert current.digest() == before  # a step returns new state and leaves the old alone
        current = adapter


numbers = st.floats(-10, 10, width=32)


@given(st.lists(numbers, min_size=1, max_size=6), st.floats(0.0, 0.99), st.floats(0.01, 2.0))
@settings(deadline=None)
def test_fedavgm_is_the_sum_of_geometrically_fading_differences(
    differences: list[float], momentum: float, rate: float
) -> None:
    places = walk(ServerOptimizerConfig("fedavgm", learning_rate=rate, momentum=momentum), differences)
    expected = sum(
        rate * sum(momentum**age * differences[number - age] for age in range(number + 1))
        for number in range(len(differences))
    )
    # The differences are formed in float32 at places of up to a few hundred.
    assert places[-1] == pytest.approx(expected, abs=1e-3)


@given(numbers, numbers)
@settings(deadline=None)
def test_fedavgm_without_momentum_is_fedavg(here: float, there: float) -> None:
    plain, _ = step(ServerOptimizerConfig("fedavg", 0.5), OptimizerState(), one(here), one(there))
    other, _ = step(ServerOptimizerConfig("fedavgm", 0.5, momentum=0.0), OptimizerState(), one(here), one(there))
    assert plain.digest() == other.digest()
