"""Aggregation methods against sums by hand and against the dense mean of the products B A."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.adapter import Adapter, is_a, is_b
from common.errors import ConfigError
from common.methods import METHODS, NEEDS_SINGLE_UPDATES, Method, method_named

LAYERS = ("q_proj", "v_proj")
R, D_IN, D_OUT = 2, 4, 3

methods = st.sampled_from(sorted(METHODS)).map(method_named)
seeds = st.integers(0, 2**16)
weights = st.lists(st.integers(1, 255), min_size=1, max_size=5)


def adapter(seed: int, frozen: Adapter | None = None) -> Adapter:
    """Random factors; A is taken from `frozen` where there is one."""
    rng = np.random.default_rng(seed)
    factors = {}
    for layer in LAYERS:
        factors[f"{layer}.lora_A.weight"] = rng.normal(size=(R, D_IN))
        factors[f"{layer}.lora_B.weight"] = rng.normal(size=(D_OUT, R))
    if frozen is not None:
        factors |= {key: factor for key, factor in frozen.factors.items() if is_a(key)}
    return Adapter(factors)


def products(found: Adapter) -> NDArray[np.float64]:
    """B A of every layer, dense and in float64, [layers, d_out, d_in]."""
    factors = {key: factor.astype(np.float64) for key, factor in found.factors.items()}
    return np.stack([factors[f"{layer}.lora_B.weight"] @ factors[f"{layer}.lora_A.weight"] for layer in LAYERS])


def aggregate(method: Method, locals_: list[Adapter], counts: list[int], start: Adapter) -> Adapter:
    updates = [
        count * method.encode(local, start).astype(np.float64) for local, count in zip(locals_, counts, strict=True)
    ]
    return method.decode(np.sum(updates, axis=0), sum(counts), start)


def test_fedavg_by_hand() -> None:
    """Weights 3 and 1: A goes from 1 to (3 * 5 + 1) / 4 = 4, B from 0 to (3 * 2 + 10) / 4 = 4."""
    key_a, key_b = "q.lora_A.weight", "q.lora_B.weight"
    start = Adapter({key_a: np.array([[1.0, 1.0]]), key_b: np.array([[0.0]])})
    one = Adapter({key_a: np.array([[5.0, 1.0]]), key_b: np.array([[2.0]])})
    two = Adapter({key_a: np.array([[1.0, 9.0]]), key_b: np.array([[10.0]])})
    method = method_named("fedavg")
    assert method.encode(one, start).tolist() == [4, 0, 2]
    assert method.encode(two, start).tolist() == [0, 8, 10]
    new = aggregate(method, [one, two], [3, 1], start)
    assert new.factors[key_a].tolist() == [[4, 3]]
    assert new.factors[key_b].tolist() == [[4]]


@given(seeds, weights)
def test_ffa_is_the_dense_mean_of_the_products(seed: int, counts: list[int]) -> None:
    start = adapter(seed)
    locals_ = [adapter(seed + 1 + index, frozen=start) for index in range(len(counts))]
    new = aggregate(method_named("ffa"), locals_, counts, start)
    oracle = np.average([products(local) for local in locals_], axis=0, weights=counts)
    # Factors of size about 1 are kept as float32.
    assert np.allclose(products(new), oracle, rtol=0, atol=1e-5)


def test_fedavg_is_not_the_dense_mean_of_the_products() -> None:
    """Which its docstring says, and is why FFA is there: two opposite changes of A and B leave B A where it was."""
    start = adapter(1)
    locals_ = [adapter(2), adapter(3)]
    new = aggregate(method_named("fedavg"), locals_, [1, 1], start)
    oracle = np.mean([products(local) for local in locals_], axis=0)
    assert np.abs(products(new) - oracle).max() > 0.1


@pytest.mark.parametrize("shrink", [1e-1, 1e-2])
def test_fedavgs_difference_is_of_second_order_in_the_length_of_a_round(shrink: float) -> None:
    start = adapter(1)

    def difference(length: float) -> float:
        locals_ = [
            Adapter({key: factor + length * other.factors[key] for key, factor in start.factors.items()})
            for other in (adapter(2), adapter(3))
        ]
        new = aggregate(method_named("fedavg"), locals_, [1, 1], start)
        return float(np.abs(products(new) - np.mean([products(local) for local in locals_], axis=0)).max())

    assert difference(shrink) == pytest.approx(difference(1.0) * shrink**2, rel=0.01)


def test_ffa_sends_b_only_and_leaves_a_as_it_is_bit_for_bit() -> None:
    start, local = adapter(1), adapter(2)
    method = method_named("ffa")
    assert all(is_b(key) for key in method.trained(start))
    assert method.encode(local, start).size == len(LAYERS) * D_OUT * R
    assert method_named("fedavg").encode(local, start).size == start.parameters
    new = aggregate(method, [local], [1], start)
    for key, factor in new.factors.items():
        if is_a(key):
            assert factor.tobytes() == start.factors[key].tobytes()
        else:
            assert np.allclose(factor, local.factors[key], rtol=0, atol=1e-6)


@given(methods, seeds, weights)
def test_identical_institutions_reach_what_each_reached(method: Method, seed: int, counts: list[int]) -> None:
    """Encode and decode are inverses; the weights cancel."""
    start = adapter(seed)
    local = adapter(seed + 1, frozen=start if method.name == "ffa" else None)
    new = aggregate(method, [local] * len(counts), counts, start)
    for key, factor in local.factors.items():
        assert np.allclose(new.factors[key], factor, rtol=0, atol=2e-6)  # differences of float32 of size about 1


@given(methods, seeds)
def test_no_change_is_a_vector_of_zeros_and_moves_nothing(method: Method, seed: int) -> None:
    start = adapter(seed)
    update = method.encode(start, start)
    assert update.dtype == np.float32
    assert not update.any()
    assert method.decode(update.astype(np.float64), 7, start).digest() == start.digest()


@given(methods, seeds)
def test_trained_keys_are_those_that_move(method: Method, seed: int) -> None:
    start = adapter(seed)
    length = sum(start.factors[key].size for key in method.trained(start))
    moved = method.decode(np.ones(length), 1, start)
    changed = [key for key in start.factors if moved.factors[key].tobytes() != start.factors[key].tobytes()]
    assert tuple(changed) == method.trained(start)


def test_methods_by_name() -> None:
    assert {name: method.name for name, method in METHODS.items()} == {"fedavg": "fedavg", "ffa": "ffa"}
    assert all(method.linear for method in METHODS.values())
    with pytest.raises(ConfigError, match=r"expected one of fedavg, ffa, found 'fedmedian'$"):
        method_named("fedmedian")


def test_a_method_on_single_updates_says_why_it_is_missing() -> None:
    with pytest.raises(
        ConfigError, match=r"found 'flora': FLoRA stacks .*secure aggregation hides.*use fedavg, or ffa"
    ):
        method_named("flora")
    assert not set(NEEDS_SINGLE_UPDATES) & set(METHODS)
