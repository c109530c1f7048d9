"""Adapters as arrays: their digest, their flat form, and whether two have the same form."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.adapter import Adapter, check_same_form, flatten, is_a, is_b, unflatten
from common.errors import ModelError

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"

arrays = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=3), elements=st.floats(width=32))
factors = st.dictionaries(st.text(max_size=6), arrays, max_size=4)


def numbers(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def test_factors_are_sorted_contiguous_and_float32() -> None:
    adapter = Adapter({B: numbers(3, 2).astype(np.float64), A: numbers(4, 2).T})
    assert list(adapter.factors) == [A, B]
    assert all(factor.dtype == np.float32 and factor.flags.c_contiguous for factor in adapter.factors.values())
    assert (adapter.parameters, adapter.bytes) == (14, 56)
    assert adapter.digest() == Adapter({A: numbers(4, 2).T, B: numbers(3, 2)}).digest()


@given(factors, factors)
def test_digests_are_equal_exactly_when_the_adapters_are(
    one: dict[str, np.ndarray], other: dict[str, np.ndarray]
) -> None:
    same = one.keys() == other.keys() and all(
        one[key].shape == other[key].shape and one[key].tobytes() == other[key].tobytes() for key in one
    )
    assert (Adapter(one).digest() == Adapter(other).digest()) == same


@pytest.mark.parametrize(
    "changed",
    [
        {A: numbers(2, 4), B: numbers(3, 2) + np.float32(1e-6) * (numbers(3, 2) == 1)},  # one bit or so of one element
        {A: numbers(4, 2), B: numbers(3, 2)},  # the same bytes in another shape
        {A: numbers(2, 4), f"{B}x": numbers(3, 2)},  # under another name
        {B: numbers(2, 4), A: numbers(3, 2)},  # under each other's names
        {A: numbers(2, 4), B: -numbers(3, 2) * np.float32(0)},  # the sign of zero
        {A: numbers(2, 4)},
    ],
)
def test_digest_tells_what_is_nearly_the_same_apart(changed: dict[str, np.ndarray]) -> None:
    zero = {A: numbers(2, 4), B: numbers(3, 2) * np.float32(0)}
    assert Adapter(changed).digest() not in (
        Adapter({A: numbers(2, 4), B: numbers(3, 2)}).digest(),
        Adapter(zero).digest(),
    )


def test_no_name_can_stand_for_bytes_of_another_factor() -> None:
    two = Adapter({"a": np.zeros((1, 1)), "b": np.ones((1, 1))})
    assert two.digest() != Adapter({"a(1, 1)\0\0\0\0b": np.ones((1, 1))}).digest()


def test_a_name_that_is_not_unicode_has_a_digest_too() -> None:
    assert len(Adapter({"\ud800": np.zeros((1, 1))}).digest()) == 64


@given(factors, st.data())
def test_unflatten_is_the_inverse_of_flatten_in_any_order(found: dict[str, np.ndarray], data: st.DataObject) -> None:
    keys = data.draw(st.permutations(sorted(found)))
    vector = flatten(found, keys)
    assert vector.dtype == np.float32
    assert vector.shape == (sum(factor.size for factor in found.values()),)
    assert Adapter(unflatten(vector, found, keys)).digest() == Adapter(found).digest()


def test_flatten_keeps_the_order_of_the_keys() -> None:
    assert flatten({A: numbers(1, 2), B: numbers(1, 3) + 5}, [B, A]).tolist() == [5, 6, 7, 0, 1]


@pytest.mark.parametrize("length", [0, 13, 15])
def test_unflatten_refuses_another_length(length: int) -> None:
    like = {A: numbers(2, 4), B: numbers(3, 2)}
    with pytest.raises(ModelError, match=rf"14 elements for 2 factors, found \({length},\)"):
        unflatten(np.zeros(length), like, like)
    with pytest.raises(ModelError, match="14 elements"):
        unflatten(np.zeros((1, 14)), like, like)


def test_kinds_of_factor() -> None:
    assert (is_a(A), is_b(A), is_a(B), is_b(B)) == (True, False, False, True)
    assert not is_a("lora_A.weight.bias")
    assert not is_b("lora_embedding_B")


def test_same_form_looks_at_names_and_shapes_only() -> None:
    expected = Adapter({A: numbers(2, 4), B: numbers(3, 2)})
    check_same_form(Adapter({A: -numbers(2, 4), B: numbers(3, 2) * np.nan}), expected)
    with pytest.raises(ModelError, match=r"1 factors are missing .*lora_B.*0 are unknown"):
        check_same_form(Adapter({A: numbers(2, 4)}), expected)
    with pytest.raises(ModelError, match=r"0 factors are missing .*1 are unknown .*other"):
        check_same_form(Adapter({A: numbers(2, 4), B: numbers(3, 2), "other": numbers(1, 1)}), expected)
    with pytest.raises(ModelError, match=r"lora_B.weight: expected shape \(3, 2\), found \(2, 3\)"):
        check_same_form(Adapter({A: numbers(2, 4), B: numbers(2, 3)}), expected)
