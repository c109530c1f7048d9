"""The fixed-point form: sums that are exact in any order, bounds that hold at their very edge, and hostile input."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from common.errors import ConfigError
from common.fixed_point import (
    COUNTERS,
    NATS,
    RING_BITS,
    Decoded,
    Layout,
    RunningSum,
    decode,
    encode,
    quantise,
    void,
    weight_of,
)

M = 5  # elements of an update
LARGEST = 2**62 - 1  # of a counter
VALUES = tuple(name for name in COUNTERS if name not in ("weight", "void"))
LAYOUT = Layout(parameters=M, members=4, clip=1.0, bits=20, weight_bits=8)

updates = hnp.arrays(np.float32, M, elements=st.floats(-2, 2, width=32))
counters = st.fixed_dictionaries({name: st.integers(0, LARGEST) for name in VALUES})


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Any layout that fits, often with no bit to spare."""
    members = draw(st.integers(1, 40))
    room = RING_BITS - max(1, math.ceil(math.log2(members)))
    bits = draw(st.integers(2, room - 1))
    weight_bits = draw(st.one_of(st.just(room - bits), st.integers(1, room - bits)))
    return Layout(M, members, draw(st.floats(1e-3, 1e3)), bits, weight_bits)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def summed(vectors: list[NDArray[np.uint32]], layout: Layout) -> NDArray[np.uint32]:
    total = RunningSum(layout)
    for vector in vectors:
        total.add(vector)
    return total.total()


# --- Sums ----------------------------------------------------------------------------------------------------------


@given(layouts(), st.data())
def test_the_sum_is_exact_in_any_order(layout: Layout, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, min(layout.members, 6)))
    weights = data.draw(st.lists(st.integers(1, layout.max_weight), min_size=count, max_size=count))
    found = [data.draw(updates) * np.float32(layout.clip) for _ in weights]
    said = [data.draw(counters) for _ in weights]
    vectors = [encode(u, w, c, layout, rng(i)) for i, (u, w, c) in enumerate(zip(found, weights, said, strict=True))]
    plain = [
        int(w) * quantise(u, layout, rng(i)).astype(object) for i, (u, w) in enumerate(zip(found, weights, strict=True))
    ]
    order = data.draw(st.permutations(range(count)))
    total = summed([vectors[i] for i in order], layout)
    assert total.tobytes() == summed(vectors, layout).tobytes()
    decoded = decode(total, layout)
    assert decoded.update.tolist() == [int(element) * layout.error for element in np.sum(plain, axis=0)]
    assert (decoded.weight, decoded.void) == (sum(weights), 0)
    for name in VALUES:
        assert decoded.counters[name] == sum(counter[name] for counter in said)


@given(layouts(), updates, st.data())
def test_one_update_comes_back_within_the_stated_error(
    layout: Layout, update: NDArray[np.float32], data: st.DataObject
) -> None:
    weight = data.draw(st.integers(1, layout.max_weight))
    update = update * np.float32(layout.clip)
    decoded = decode(encode(update, weight, {}, layout, rng()), layout)
    clipped = np.clip(update.astype(np.float64), -layout.clip, layout.clip)
    # To the rounding of float64, which the two products of decoding and dividing add.
    assert np.all(np.abs(decoded.update / weight - clipped) <= layout.error * (1 + 1e-9))


@given(layouts(), st.floats(1e-30, 1e30))
def test_quantised_elements_stay_in_range_however_large(layout: Layout, size: float) -> None:
    edge = np.array([size, -size, layout.clip, -layout.clip, np.nextafter(layout.clip, 0)])
    for seed in range(3):
        elements = quantise(edge, layout, rng(seed))
        assert np.abs(elements).max() <= layout.levels
        assert elements[2:4].tolist() == [layout.levels, -layout.levels]


def test_zero_stays_zero_and_is_still_counted() -> None:
    for zero in (0.0, -0.0):
        vector = encode(np.full(M, zero, np.float32), 7, {}, LAYOUT, rng())
        assert not vector[:M].any()
        assert decode(vector, LAYOUT).weight == 7


def test_rounding_depends_on_the_generator_only() -> None:
    update = rng(1).normal(0, 0.1, M).astype(np.float32)
    assert encode(update, 3, {}, LAYOUT, rng(2)).tobytes() == encode(update, 3, {}, LAYOUT, rng(2)).tobytes()
    assert encode(update, 3, {}, LAYOUT, rng(2)).tobytes() != encode(update, 3, {}, LAYOUT, rng(3)).tobytes()


def deviations(
    rounded: Callable[[NDArray[np.float32], Layout, np.random.Generator], NDArray[np.int64]], level: float
) -> tuple[float, float]:
    """Mean error in levels, and its standard deviation in standard errors of right stochastic rounding.

    First how far the mean of many roundings of `level` is off, then how far their variance is, both in units of what
    chance explains.
    """
    draws = 20_000
    layout = replace(LAYOUT, parameters=draws)
    part = level - math.floor(level)
    values = np.full(draws, level * layout.error)  # float64: float32 would move `level` by itself
    errors = rounded(values, layout, rng(5)) - level
    spread = math.sqrt(part * (1 - part))
    fourth = part * (1 - part) * (1 - 3 * part * (1 - part))
    variance_error = math.sqrt((fourth - spread**4) / draws) or 1 / draws
    return float(errors.mean()) / (spread / math.sqrt(draws)), (float(errors.var()) - spread**2) / variance_error


LEVELS = [0.3, -0.3, 17.9, -524285.25, 0.01]
CHANCE = 4.5  # standard errors; ten such numbers go beyond it by chance once in 15 000 runs, and the seed is fixed


@pytest.mark.parametrize("level", LEVELS)
def test_stochastic_rounding_is_unbiased_and_goes_to_the_neighbours(level: float) -> None:
    mean, variance = deviations(quantise, level)
    assert abs(mean) < CHANCE
    assert abs(variance) < CHANCE


@pytest.mark.parametrize(
    "wrong",
    [
        lambda values, layout, _: np.floor(values / layout.error).astype(np.int64),
        lambda values, layout, _: np.rint(values / layout.error).astype(np.int64),
        lambda values, layout, _: np.trunc(values / layout.error).astype(np.int64),
        lambda values, layout, generator: np.floor(values / layout.error + 0.5 * generator.random(len(values))).astype(
            int
        ),
    ],
    ids=["floor", "nearest", "towards zero", "too little chance"],
)
@pytest.mark.parametrize("level", [0.3, -0.3])
def test_the_test_of_rounding_rejects_wrong_roundings(wrong: Callable[..., NDArray[np.int64]], level: float) -> None:
    mean, variance = deviations(wrong, level)
    assert abs(mean) > CHANCE or abs(variance) > CHANCE
    assert abs(mean) > CHANCE


# --- Limits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "weight_bits", "members"), [(20, 8, 16), (2, 1, 2**29), (30, 1, 2), (2, 29, 2), (22, 8, 3), (23, 8, 1)]
)
def test_the_most_extreme_vectors_of_a_full_layout_sum_without_wrapping(
    bits: int, weight_bits: int, members: int
) -> None:
    layout = Layout(2, members, 1.0, bits, weight_bits)
    for key in ("bits", "weight_bits"):
        with pytest.raises(ConfigError, match=f"{RING_BITS + 1} bits, the ring has {RING_BITS}; lower quantise.bits"):
            replace(layout, **{key: getattr(layout, key) + 1})
    with pytest.raises(ConfigError, match=r"lower quantise\.bits"):
        replace(layout, members=2**layout.member_bits + 1)
    layout = replace(layout, members=2**layout.member_bits)
    most = layout.max_weight * layout.levels
    vector = encode(np.array([9, -9], np.float32), layout.max_weight, {}, layout, rng())
    assert vector.view(np.int32)[:2].tolist() == [most, -most]
    assert most * layout.members < 2 ** (RING_BITS - 1)
    # The sum of all members without adding each: multiplication wraps around as addition does.
    total = vector * np.uint32(layout.members)
    decoded = decode(total, layout)
    assert decoded.update.tolist() == [most * layout.members * layout.error, -most * layout.members * layout.error]
    assert decoded.weight == layout.max_weight * layout.members


def test_a_full_sum_is_reached_by_adding_too() -> None:
    layout = Layout(2, 16, 0.5, 20, 8)
    vector = encode(np.array([1, -1], np.float32), 255, dict.fromkeys(VALUES, LARGEST), layout, rng())
    decoded = decode(summed([vector] * 16, layout), layout)
    assert decoded.update == pytest.approx([255 * 16 * 0.5, -255 * 16 * 0.5], rel=1e-12)
    assert decoded.counters == {"weight": 255 * 16, "void": 0, **dict.fromkeys(VALUES, 16 * LARGEST)}


@given(st.integers(1, 2**29))
def test_counters_of_any_number_of_members_fit(members: int) -> None:
    layout = Layout(0, members, 1.0, 2, 1)
    assert members * (2**layout.limb_bits - 1) < 2**RING_BITS
    vector = encode(np.zeros(0, np.float32), 1, dict.fromkeys(VALUES, LARGEST), layout, rng())
    assert decode(vector * np.uint32(members), layout).counters["train_loss"] == members * LARGEST


@pytest.mark.parametrize(
    "wrong",
    [
        {"members": 0},
        {"parameters": -1},
        {"bits": 1},
        {"bits": 10**9},
        {"weight_bits": 0},
        {"clip": 0.0},
        {"clip": -1.0},
        {"clip": math.nan},
        {"clip": math.inf},
        {"clip": 5e-324},
    ],
    ids=str,
)
def test_a_layout_that_cannot_be_meant_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="quantise"):
        replace(LAYOUT, **wrong)


@pytest.mark.parametrize(
    ("records", "unit", "weight"),
    [(0, 16, 1), (1, 16, 1), (16, 16, 1), (31, 16, 2), (32, 16, 2), (100, 1, 100), (255, 1, 255), (10**9, 1, 255)],
)
def test_a_weight_is_at_least_one_and_at_most_what_its_bits_hold(records: int, unit: int, weight: int) -> None:
    assert weight_of(records, unit, LAYOUT) == weight


@pytest.mark.parametrize("weight", [0, -1, 256, 2**40])
def test_a_weight_out_of_range_is_refused(weight: int) -> None:
    with pytest.raises(ConfigError, match=f"weight from 1 to 255, found {weight}"):
        encode(np.zeros(M, np.float32), weight, {}, LAYOUT, rng())


@pytest.mark.parametrize("shape", [(0,), (M - 1,), (M + 1,), (1, M)])
def test_an_update_of_another_length_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="expected an update of 5 elements"):
        encode(np.zeros(shape, np.float32), 1, {}, LAYOUT, rng())


@pytest.mark.parametrize("name", ["weight", "void", "people"])
def test_a_counter_that_is_not_the_callers_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"does not carry: .*{name}"):
        encode(np.zeros(M, np.float32), 1, {"train_tokens": 1, name: 1}, LAYOUT, rng())


# --- Void vectors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, M - 1])
def test_an_update_that_is_not_finite_is_sent_as_zeros(value: float, place: int) -> None:
    update = np.full(M, 0.5, np.float32)
    update[place] = value
    vector = encode(update, 9, {"train_tokens": 5}, LAYOUT, rng())
    assert vector.tobytes() == void(LAYOUT).tobytes()


@pytest.mark.parametrize("value", [-1, 2**62, math.nan, math.inf])
def test_a_counter_out_of_range_makes_the_vector_void(value: float) -> None:
    vector = encode(np.full(M, 0.5, np.float32), 9, {"train_loss": value}, LAYOUT, rng())
    assert vector.tobytes() == void(LAYOUT).tobytes()


def test_void_vectors_change_nothing_but_their_count() -> None:
    good = encode(np.full(M, 0.25, np.float32), 9, {"train_tokens": 5}, LAYOUT, rng())
    assert void(LAYOUT).shape == good.shape
    decoded = decode(summed([void(LAYOUT), good, void(LAYOUT)], LAYOUT), LAYOUT)
    alone = decode(good, LAYOUT)
    assert decoded.update.tolist() == alone.update.tolist()
    assert decoded.counters == {**alone.counters, "void": 2}
    nothing = decode(summed([void(LAYOUT)] * 4, LAYOUT), LAYOUT)
    assert (nothing.weight, nothing.void) == (0, 4)
    assert not nothing.update.any()
    assert nothing.mean_loss("train") is None


def test_mean_loss_is_nats_per_token_over_all_members() -> None:
    decoded = Decoded(
        np.zeros(0), {"train_loss": 30 * NATS, "train_tokens": 12, "validation_loss": 0, "validation_tokens": 0}
    )
    assert decoded.mean_loss("train") == 2.5
    assert decoded.mean_loss("validation") is None


# --- The running sum -----------------------------------------------------------------------------------------------


def test_the_sum_takes_no_more_than_its_members() -> None:
    total = RunningSum(replace(LAYOUT, members=2))
    vector = void(total.layout)
    total.add(vector)
    total.add(vector)
    before = total.total()
    with pytest.raises(ConfigError, match="holds 2 institutions, one more arrived"):
        total.add(vector)
    assert total.count == 2
    assert np.array_equal(total.total(), before)


@pytest.mark.parametrize(
    "hostile",
    [
        np.zeros(LAYOUT.length - 1, np.uint32),
        np.zeros(LAYOUT.length + 1, np.uint32),
        np.zeros((LAYOUT.length, 1), np.uint32),
        np.zeros((1, LAYOUT.length), np.uint32),
        np.uint32(1),
        np.zeros(LAYOUT.length, np.int32),
        np.zeros(LAYOUT.length, np.uint64),
        np.zeros(LAYOUT.length, np.float32),
        np.zeros(LAYOUT.length, ">u4"),
        np.zeros(LAYOUT.length, object),
    ],
)
def test_a_vector_of_another_form_is_refused_and_leaves_the_sum_as_it_was(hostile: NDArray[np.uint32]) -> None:
    total = RunningSum(LAYOUT)
    total.add(encode(np.full(M, 0.25, np.float32), 9, {}, LAYOUT, rng()))
    before = total.total()
    with pytest.raises(ConfigError, match="elements of uint32, found"):
        total.add(hostile)
    assert (total.count, total.total().tobytes()) == (1, before.tobytes())
    with pytest.raises(ConfigError, match="elements of uint32, found"):
        decode(hostile, LAYOUT)


def test_the_sum_keeps_no_vector_and_gives_none_of_its_own_away() -> None:
    total = RunningSum(LAYOUT)
    vector = encode(np.full(M, 0.25, np.float32), 9, {}, LAYOUT, rng())
    expected = vector.copy()
    total.add(vector)
    vector[:] = 0
    total.total()[:] = 0
    assert np.array_equal(total.total(), expected)


@settings(max_examples=3, deadline=None)
@given(st.integers(20, 60))
def test_memory_is_that_of_one_vector_whatever_the_number_of_members(members: int) -> None:
    layout = Layout(100_000, members, 1.0, 12, 8)
    vector = void(layout)
    tracemalloc.start()
    total = RunningSum(layout)
    for _ in range(members):
        total.add(vector.copy())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total.count == members
    assert peak < 2.5 * vector.nbytes  # the sum, and the vector that has just arrived


@given(layouts())
def test_lengths_and_errors_follow_from_the_layout(layout: Layout) -> None:
    assert void(layout).shape == (layout.length,)
    assert layout.limbs * layout.limb_bits >= 62
    assert layout.levels * layout.error == pytest.approx(layout.clip)
    assume(layout.bits > 2)
    assert replace(layout, bits=layout.bits - 1).error > layout.error
