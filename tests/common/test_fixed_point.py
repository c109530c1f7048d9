"""The fixed-point form: sums exact in any order, bounds that hold at their edge, the wire form, and hostile input."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from common.errors import ConfigError
from common.fixed_point import (
    CHECK_BLOCK,
    CHECKS,
    COUNTERS,
    NATS,
    RING_BITS,
    WIRE_BLOCK,
    CorruptSum,
    Decoded,
    Layout,
    RunningSum,
    decode,
    encode,
    encode_levels,
    pack,
    packed_length,
    quantise,
    unpack,
    void,
    weight_of,
)

M = 5  # elements of an update
LARGEST = 2**62 - 1  # of a counter
VALUES = tuple(name for name in COUNTERS if name not in ("weight", "void", "members"))
LAYOUT = Layout(parameters=M, members=4, clip=1.0, bits=20, weight_bits=8)

updates = hnp.arrays(np.float32, M, elements=st.floats(-2, 2, width=32))
counters = st.fixed_dictionaries({name: st.integers(0, LARGEST) for name in VALUES})


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Any layout that fits, in rings of 4 to 32 bits; the widest is one of two."""
    members = draw(st.integers(1, 40))
    needed = max(1, math.ceil(math.log2(members)))
    room = draw(st.one_of(st.just(RING_BITS), st.integers(needed + 3, RING_BITS))) - needed
    bits = draw(st.integers(2, room - 1))
    weight_bits = draw(st.one_of(st.just(room - bits), st.integers(1, room - bits)))
    return Layout(M, members, draw(st.floats(1e-3, 1e3)), bits, weight_bits)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def uniform(layout: Layout, seed: int) -> NDArray[np.uint32]:
    """Any element of the ring everywhere, as in a masked vector."""
    return rng(seed).integers(0, 2**layout.ring_bits, layout.length, dtype=np.uint32)


def signed(vector: NDArray[np.uint32], layout: Layout) -> list[int]:
    """The update in a vector, element by element, as Python counts modulo 2^k."""
    half = 2 ** (layout.ring_bits - 1)
    return [(int(element) + half) % (2 * half) - half for element in vector[: layout.parameters]]


def checked(update: NDArray[np.uint32], layout: Layout) -> NDArray[np.uint32]:
    """A vector of any elements of the ring, its counters zero and its check right.

    The check is linear, so the vector is put together from differences of vectors in the same ring whose update is one
    element of one level.
    """
    one = replace(layout, bits=2, weight_bits=layout.bits + layout.weight_bits - 2)
    total = np.zeros(layout.length, np.uint32)
    for place, element in enumerate(update.tolist()):
        single = np.zeros(layout.parameters, np.float32)
        single[place] = layout.clip
        base, hot = encode(0 * single, 1, {}, one, rng()), encode(single, 1, {}, one, rng())
        total += (hot - base) * np.uint32(element)
    return total & np.uint32(2**layout.ring_bits - 1)


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
    assert max(map(int, total)) < 2**layout.ring_bits
    decoded = decode(total, layout, members=count)
    assert decoded.update.tolist() == [int(element) * layout.error for element in np.sum(plain, axis=0)]
    assert (decoded.weight, decoded.void, decoded.members) == (sum(weights), 0, count)
    for name in VALUES:
        assert decoded.counters[name] == sum(counter[name] for counter in said)


@given(layouts(), st.data())
def test_masks_that_cancel_leave_no_trace(layout: Layout, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, min(layout.members, 4)))
    vectors = [encode(data.draw(updates), 1, {}, layout, rng(i)) for i in range(count)]
    total, masks = RunningSum(layout), [uniform(layout, i) for i in range(count)]
    for vector, mask in zip(vectors, masks, strict=True):
        total.add_packed(pack((vector + mask) & np.uint32(2**layout.ring_bits - 1), layout.ring_bits))
    unmasked = total.total()
    for mask in masks:
        unmasked -= mask
    found, expected = decode(unmasked, layout, members=count), decode(summed(vectors, layout), layout)
    assert found.update.tolist() == expected.update.tolist()
    assert found.counters == expected.counters


@given(layouts(), st.integers(0, 2**32 - 1))
def test_what_is_above_the_rings_bits_means_nothing(layout: Layout, garbage: int) -> None:
    vector = encode(np.array([-2, -0.1, 0, 0.1, 2], np.float32), 1, {"train_tokens": 7}, layout, rng())
    assert vector.max() < 2**layout.ring_bits
    dirty = vector | np.uint32(garbage >> layout.ring_bits << layout.ring_bits)
    assert summed([dirty], layout).tobytes() == vector.tobytes()
    assert decode(dirty, layout).update.tolist() == decode(vector, layout).update.tolist()
    assert decode(dirty, layout).counters == decode(vector, layout).counters


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


def test_whole_levels_never_move_even_at_the_edge() -> None:
    for bits in (2, 16, 30):
        levels = 2 ** (bits - 1) - 1
        layout = Layout(M, 2, float(levels), bits, 1)
        values = np.resize(np.array([0, -0.0, 1, -1, levels // 2, 1 - levels, levels, -levels]), 200_000)
        assert quantise(values, layout, rng()).tolist() == values.astype(int).tolist()


class Highest:
    """In place of a generator: always the greatest number below 1, which comes too rarely to wait for."""

    def random(self, out: NDArray[np.floating], dtype: type[np.floating]) -> None:
        out[:] = np.nextafter(dtype(1), dtype(0))


def test_the_greatest_chance_moves_no_whole_level_and_others_by_one() -> None:
    layout = Layout(M, 2, 2.0**29 - 1, 30, 1)
    values = np.array(
        [0, 1, 0.5, -0.5, 2.0**-23, 2**29 - 2, 2**29 - 1.5, 2**29 - 1, 2 - 2**29, 1.5 - 2**29, 1 - 2**29, 2**40]
    )
    expected = [0, 1, 1, 0, 1, 2**29 - 2, 2**29 - 1, 2**29 - 1, 2 - 2**29, 2 - 2**29, 1 - 2**29, 2**29 - 1]
    assert quantise(values, layout, cast(np.random.Generator, Highest())).tolist() == expected


def test_every_element_of_a_long_update_goes_to_a_neighbour() -> None:
    length = 200_003
    layout = replace(LAYOUT, parameters=length)
    values = rng(1).uniform(-1, 1, length).astype(np.float32)
    found = quantise(values, layout, rng(2))
    assert (found.dtype, found.shape) == (np.int32, (length,))
    distance = found - values.astype(np.float64) * layout.levels
    assert np.abs(distance).max() < 1
    # The same chance for all elements: means and neighbours alike in each part.
    for part in np.array_split(distance, 13):
        assert abs(part.mean()) < 5 / math.sqrt(6 * len(part))
        assert abs(np.corrcoef(part[1:], part[:-1])[0, 1]) < 5 / math.sqrt(len(part))
    assert signed(encode(values, 3, {}, layout, rng(2)), layout) == (3 * found).tolist()


def test_rounding_depends_on_the_generator_only() -> None:
    update = rng(1).normal(0, 0.1, M).astype(np.float32)
    assert encode(update, 3, {}, LAYOUT, rng(2)).tobytes() == encode(update, 3, {}, LAYOUT, rng(2)).tobytes()
    assert encode(update, 3, {}, LAYOUT, rng(2)).tobytes() != encode(update, 3, {}, LAYOUT, rng(3)).tobytes()


def deviations(
    rounded: Callable[[NDArray[np.float32], Layout, np.random.Generator], NDArray[np.integer]], level: float
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
def test_the_test_of_rounding_rejects_wrong_roundings(wrong: Callable[..., NDArray[np.integer]], level: float) -> None:
    mean, variance = deviations(wrong, level)
    assert abs(mean) > CHANCE or abs(variance) > CHANCE
    assert abs(mean) > CHANCE


# --- Limits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "weight_bits", "members"), [(20, 8, 16), (2, 1, 2**29), (30, 1, 2), (2, 29, 2), (22, 8, 3), (23, 8, 1)]
)
def test_a_sum_beyond_the_widest_ring_is_refused(bits: int, weight_bits: int, members: int) -> None:
    layout = Layout(2, members, 1.0, bits, weight_bits)
    assert layout.ring_bits == RING_BITS
    for key in ("bits", "weight_bits"):
        with pytest.raises(ConfigError, match=r"need 33 bits, the widest ring has 32; lower quantise\.bits"):
            replace(layout, **{key: getattr(layout, key) + 1})
    with pytest.raises(ConfigError, match=r"lower quantise\.bits"):
        replace(layout, members=2**layout.member_bits + 1)


@pytest.mark.parametrize(
    ("bits", "weight_bits", "members"),
    [
        *[(20, 8, 16), (2, 1, 2**29), (30, 1, 2), (2, 29, 2), (22, 8, 4), (23, 8, 2)],
        *[(16, 4, 16), (2, 1, 2), (2, 2, 2), (7, 3, 8), (17, 5, 2)],
    ],
)
def test_the_most_extreme_vectors_sum_without_wrapping(bits: int, weight_bits: int, members: int) -> None:
    layout = Layout(2, members, 1.0, bits, weight_bits)
    most = layout.max_weight * layout.levels
    vector = encode(np.array([9, -9], np.float32), layout.max_weight, {}, layout, rng())
    assert signed(vector, layout) == [most, -most]
    assert most * layout.members < 2 ** (layout.ring_bits - 1)
    # The sum of all members without adding each: multiplication wraps around as addition does.
    total = vector * np.uint32(layout.members)
    decoded = decode(total, layout, members=layout.members)
    assert decoded.update.tolist() == [most * layout.members * layout.error, -most * layout.members * layout.error]
    assert decoded.weight == layout.max_weight * layout.members


def test_an_element_at_either_end_of_the_ring_decodes_with_its_sign() -> None:
    for layout in (replace(LAYOUT, parameters=4), Layout(4, 16, 1.0, 16, 4), Layout(4, 2, 1.0, 2, 1)):
        half = 2 ** (layout.ring_bits - 1)
        total = checked(np.array([half - 1, half, 2 * half - 1, 0], np.uint32), layout)
        assert decode(total, layout).update.tolist() == [x * layout.error for x in (half - 1, -half, -1, 0)]


def test_a_full_sum_is_reached_by_adding_too() -> None:
    layout = Layout(2, 16, 0.5, 20, 8)
    vector = encode(np.array([1, -1], np.float32), 255, dict.fromkeys(VALUES, LARGEST), layout, rng())
    decoded = decode(summed([vector] * 16, layout), layout)
    assert decoded.update == pytest.approx([255 * 16 * 0.5, -255 * 16 * 0.5], rel=1e-12)
    values = dict.fromkeys(VALUES, 16 * LARGEST)
    assert decoded.counters == {"weight": 255 * 16, "void": 0, "members": 16, **values}


@given(st.integers(1, 2**29))
def test_counters_of_any_number_of_members_fit(members: int) -> None:
    layout = Layout(0, members, 1.0, 2, 1)
    assert members * (2**layout.limb_bits - 1) < 2**layout.ring_bits
    vector = encode(np.zeros(0, np.float32), 1, dict.fromkeys(VALUES, LARGEST), layout, rng())
    decoded = decode(vector * np.uint32(members), layout, members=members)
    assert decoded.counters["train_loss"] == members * LARGEST


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


@pytest.mark.parametrize("name", ["weight", "void", "members", "people"])
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
    assert decoded.counters == {**alone.counters, "void": 2, "members": 3}
    nothing = decode(summed([void(LAYOUT)] * 4, LAYOUT), LAYOUT, members=4)
    assert (nothing.weight, nothing.void, nothing.members) == (0, 4, 4)
    assert not nothing.update.any()
    assert nothing.mean_loss("train") is None


@given(st.data(), st.integers(1, 4))
def test_levels_with_noise_sum_exactly_up_to_the_headroom(data: st.DataObject, members: int) -> None:
    layout = Layout(M, 4, 1.0, 8, 1, headroom=data.draw(st.integers(0, 1 << 20)))
    largest = layout.levels + layout.headroom // 4
    one = hnp.arrays(np.int64, M, elements=st.integers(-largest, largest))
    given_ = [data.draw(one) for _ in range(members)]
    found = decode(summed([encode_levels(levels, layout) for levels in given_], layout), layout, members=members)
    read = np.rint(found.update / layout.error).astype(np.int64)
    assert read.tolist() == np.sum(given_, axis=0).tolist()
    assert {name: value for name, value in found.counters.items() if value} == {"weight": members, "members": members}


def test_levels_of_another_length_are_refused() -> None:
    with pytest.raises(ConfigError, match=f"expected an update of {M} elements"):
        encode_levels(np.zeros(M + 1, np.int64), LAYOUT)


def test_the_ring_holds_a_sum_and_its_noise_and_is_no_wider_than_either_needs() -> None:
    plain = Layout(M, 4, 1.0, 8, 1)
    widest = 4 * plain.levels * plain.max_weight
    room = (1 << (plain.ring_bits - 1)) - 1 - widest
    assert replace(plain, headroom=room).ring_bits == plain.ring_bits
    assert replace(plain, headroom=room + 1).ring_bits == plain.ring_bits + 1
    with pytest.raises(ConfigError, match="and their noise need 33 bits, the widest ring has 32"):
        replace(plain, headroom=1 << 31)
    with pytest.raises(ConfigError, match="a headroom of 0"):
        replace(plain, headroom=-1)


def test_mean_loss_is_nats_per_token_over_all_members() -> None:
    decoded = Decoded(
        np.zeros(0), {"train_loss": 30 * NATS, "train_tokens": 12, "validation_loss": 0, "validation_tokens": 0}
    )
    assert decoded.mean_loss("train") == 2.5
    assert decoded.mean_loss("validation") is None


# --- Corrupt sums --------------------------------------------------------------------------------------------------


@given(layouts(), st.data())
def test_an_error_in_any_single_element_is_seen(layout: Layout, data: st.DataObject) -> None:
    total = summed([encode(data.draw(updates), 1, {"train_tokens": 9}, layout, rng())], layout)
    place = data.draw(st.one_of(st.integers(0, layout.length - 1), st.just(layout.length - CHECKS)))
    size = 2**layout.ring_bits
    error = data.draw(
        st.one_of(st.integers(1, size - 1), st.integers(0, layout.ring_bits - 1).map(lambda bit: 1 << bit))
    )
    corrupt = total.copy()
    corrupt[place] = (int(total[place]) + error) % size
    assert decode(total, layout).members == 1
    with pytest.raises(CorruptSum, match="check element does not match"):
        decode(corrupt, layout)


LONG = Layout(2 * CHECK_BLOCK + 9, 16, 1.0, 16, 4)


@pytest.fixture(scope="module")
def long_sum() -> NDArray[np.uint32]:
    values = rng(1).uniform(-1, 1, LONG.parameters).astype(np.float32)
    return summed([encode(values, weight, {"train_loss": 5}, LONG, rng(weight)) for weight in (1, 15)], LONG)


@pytest.mark.parametrize(
    "place", [0, 1, CHECK_BLOCK - 1, CHECK_BLOCK, 2 * CHECK_BLOCK, LONG.length - 2, LONG.length - 1]
)
def test_an_error_is_seen_wherever_it_is_in_a_long_sum(place: int, long_sum: NDArray[np.uint32]) -> None:
    assert decode(long_sum, LONG, members=2).weight == 16
    for error in (1, 1 << 23):
        corrupt = long_sum.copy()
        corrupt[place] ^= np.uint32(error)
        with pytest.raises(CorruptSum):
            decode(corrupt, LONG)


def test_errors_in_a_random_set_of_elements_are_seen(long_sum: NDArray[np.uint32]) -> None:
    chance = rng(3)
    for _ in range(100):
        places = chance.choice(LONG.length, chance.integers(2, 1000), replace=False)
        corrupt = long_sum.copy()
        corrupt[places] += chance.integers(1, 2**LONG.ring_bits, len(places), dtype=np.uint32)
        with pytest.raises(CorruptSum):
            decode(corrupt, LONG)


def test_masks_that_did_not_cancel_are_seen(long_sum: NDArray[np.uint32]) -> None:
    for seed in range(20):
        with pytest.raises(CorruptSum, match="masks did not cancel; discard this attempt"):
            decode(long_sum + uniform(LONG, seed), LONG)


@pytest.mark.parametrize(
    ("one", "other"), [(0, 1), (0, CHECK_BLOCK), (CHECK_BLOCK - 1, CHECK_BLOCK), (7, 2 * CHECK_BLOCK + 7), (5, -3)]
)
def test_the_check_depends_on_the_order_of_the_elements(one: int, other: int, long_sum: NDArray[np.uint32]) -> None:
    corrupt = long_sum.copy()
    corrupt[[one]] += 1
    corrupt[[other]] -= 1  # lists of places: arrays wrap around, single numbers warn
    with pytest.raises(CorruptSum):
        decode(corrupt, LONG)


def test_the_check_of_a_vector_is_the_same_in_every_release() -> None:
    # Else institutions that were not updated on the same day could not take part in one sum.
    layout = replace(LONG, bits=24)
    whole = np.resize(np.array([0, 1, -1], np.float32), layout.parameters)
    assert [int(encode(whole, weight, {}, layout, rng())[-1]) for weight in (1, 15)] == [80866331, 1596518531]


@pytest.mark.parametrize("count", [0, 1, 3, 16, 17])
def test_a_sum_must_hold_as_many_vectors_as_are_known_to_be_in_it(count: int) -> None:
    total = summed([encode(np.zeros(M, np.float32), 2, {}, LAYOUT, rng()), void(LAYOUT)], LAYOUT)
    assert decode(total, LAYOUT, members=2).members == decode(total, LAYOUT).members == 2
    with pytest.raises(CorruptSum, match=f"expected {count} vectors in it, found 2; discard this attempt"):
        decode(total, LAYOUT, members=count)


# --- The wire form -------------------------------------------------------------------------------------------------


def packed_plainly(ring: list[int], bits: int) -> list[int]:
    """The wire form of fewer elements than a block, one bit string after the other."""
    p, q = 32 // math.gcd(bits, 32), bits // math.gcd(bits, 32)
    ring = ring + [0] * (-len(ring) % p)
    size = len(ring) // p
    strings = [sum(ring[i + size * s] << (bits * s) for s in range(p)) for i in range(size)]
    return [strings[i] >> (32 * s) & 0xFFFFFFFF for s in range(q) for i in range(size)]


@given(st.integers(1, 32), st.integers(0, 200), st.integers(0, 2**32 - 1))
def test_the_wire_form_is_the_one_that_is_described(bits: int, length: int, seed: int) -> None:
    ring = rng(seed).integers(0, 2**bits, length, dtype=np.uint32)
    words = pack(ring, bits)
    assert words.dtype == np.uint32
    assert words.tolist() == packed_plainly(ring.tolist(), bits)
    assert unpack(words, length, bits).tolist() == ring.tolist()


@pytest.mark.parametrize("bits", range(1, 33))
def test_packed_vectors_come_back_whatever_their_length(bits: int) -> None:
    p = 32 // math.gcd(bits, 32)
    for length in {0, 1, p - 1, p, p + 1, *(WIRE_BLOCK + x for x in (-p, -1, 0, 1, p)), 2 * WIRE_BLOCK + 33}:
        ring = rng(length).integers(0, 2**bits, length, dtype=np.uint32)
        words = pack(ring, bits)
        assert words.shape == (packed_length(length, bits),)
        assert 0 <= words.size * 32 - length * bits < 32 * bits
        back = unpack(words, length, bits)
        assert back.dtype == np.uint32
        assert np.array_equal(back, ring)


def test_packing_reads_and_keeps_its_input_only() -> None:
    ring = rng().integers(0, 2**24, 2 * WIRE_BLOCK, dtype=np.uint32)
    ring.flags.writeable = False
    words = pack(ring[::2], 24)
    received = np.frombuffer(words.tobytes(), "<u4")
    assert unpack(received, WIRE_BLOCK, 24).tolist() == ring[::2].tolist()
    for bits in (24, 32):
        assert not np.shares_memory(pack(ring, bits), ring)
        assert not np.shares_memory(unpack(ring, packed_length(ring.size, 32), 32), ring)


def test_the_defaults_of_sixteen_institutions_take_three_bytes_an_element() -> None:
    layout = Layout(parameters=1_000_000, members=16, clip=1.0, bits=16, weight_bits=4)
    assert layout.ring_bits == 24
    assert pack(void(layout), layout.ring_bits).nbytes == 3 * (layout.length + -layout.length % 4)


@pytest.mark.parametrize("place", [0, 5, WIRE_BLOCK, WIRE_BLOCK + 4])
def test_an_element_that_does_not_fit_is_not_packed(place: int) -> None:
    ring = np.zeros(WIRE_BLOCK + 5, np.uint32)
    ring[place] = 2**24
    with pytest.raises(ConfigError, match=f"at most 24 bits to pack, found {2**24}"):
        pack(ring, 24)
    assert unpack(pack(ring, 25), ring.size, 25)[place] == 2**24


@pytest.mark.parametrize("bits", [-1, 0, 33])
def test_bits_that_no_ring_has_are_refused(bits: int) -> None:
    for call in (lambda: packed_length(3, bits), lambda: pack(np.zeros(3, np.uint32), bits)):
        with pytest.raises(ConfigError, match=f"1 to 32 bits, found {bits}"):
            call()


@pytest.mark.parametrize(
    "wrong", [np.zeros(4, np.int32), np.zeros(4, np.uint64), np.zeros((2, 2), np.uint32), np.zeros(4, ">u4")]
)
def test_a_vector_of_another_form_is_not_packed(wrong: NDArray[np.uint32]) -> None:
    with pytest.raises(ConfigError, match="expected a vector of uint32 to pack"):
        pack(wrong, 24)


WORDS = packed_length(LAYOUT.length, LAYOUT.ring_bits)


@pytest.mark.parametrize(
    "hostile",
    [
        np.zeros(0, np.uint32),
        np.zeros(WORDS - 1, np.uint32),
        np.zeros(WORDS + 1, np.uint32),
        np.zeros((WORDS, 1), np.uint32),
        np.uint32(1),
        np.zeros(WORDS, np.int32),
        np.zeros(WORDS, np.float32),
        np.zeros(WORDS, ">u4"),
        np.zeros(WORDS, object),
    ],
)
def test_words_of_another_form_are_refused_and_leave_the_sum_as_it_was(hostile: NDArray[np.uint32]) -> None:
    total = RunningSum(LAYOUT)
    total.add(encode(np.full(M, 0.25, np.float32), 9, {}, LAYOUT, rng()))
    before = total.total()
    for call in (total.add_packed, lambda words: unpack(words, LAYOUT.length, LAYOUT.ring_bits)):
        with pytest.raises(ConfigError, match=f"expected {WORDS} words of uint32 for {LAYOUT.length} elements of 30"):
            call(hostile)
    assert (total.count, total.total().tobytes()) == (1, before.tobytes())


@pytest.mark.parametrize("parameters", [M, 3 * WIRE_BLOCK + 1])
@pytest.mark.parametrize("bits", [16, 17, 20])
def test_padding_that_is_not_zero_is_refused_and_leaves_the_sum_as_it_was(parameters: int, bits: int) -> None:
    layout = Layout(parameters, 4, 1.0, bits, 2)
    vector, k = uniform(layout, 0), layout.ring_bits
    padding = -layout.length % (32 // math.gcd(k, 32))
    assert padding
    total = RunningSum(layout)
    total.add_packed(pack(vector, k))
    for place in range(padding):
        for bit in (0, k - 1):
            longer = np.append(vector, np.zeros(padding, np.uint32))
            longer[layout.length + place] = 1 << bit
            words = pack(longer, k)
            for call in (total.add_packed, lambda words: unpack(words, layout.length, k)):
                with pytest.raises(ConfigError, match="found other padding"):
                    call(words)
    assert total.count == 1
    assert np.array_equal(total.total(), vector)


@given(layouts(), st.data())
def test_adding_packed_vectors_is_adding_them(layout: Layout, data: st.DataObject) -> None:
    layout = replace(layout, parameters=data.draw(st.integers(0, 200)))
    packed, plain = RunningSum(layout), RunningSum(layout)
    for seed in range(layout.members):
        vector = uniform(layout, seed)
        packed.add_packed(pack(vector, layout.ring_bits))
        plain.add(vector)
        assert packed.count == plain.count == seed + 1
    assert packed.total().tobytes() == plain.total().tobytes()


@pytest.mark.parametrize("bits", [2, 13, 16, 17, 21, 24])
@pytest.mark.parametrize("extra", [-1, 0, 1, WIRE_BLOCK + 77])
def test_adding_packed_vectors_of_several_blocks_is_adding_them(bits: int, extra: int) -> None:
    layout = Layout(0, 16, 1.0, bits, 4)
    layout = replace(layout, parameters=WIRE_BLOCK - layout.length + extra)
    assert layout.length == WIRE_BLOCK + extra
    packed, plain = RunningSum(layout), RunningSum(layout)
    for seed in range(3):
        vector = uniform(layout, seed)
        packed.add_packed(pack(vector, layout.ring_bits))
        plain.add(vector)
    packed.add(vector)
    plain.add_packed(pack(vector, layout.ring_bits))
    assert np.array_equal(packed.total(), plain.total())
    assert np.array_equal(
        plain.total(), sum(uniform(layout, i).astype(int) for i in (0, 1, 2, 2)) % 2**layout.ring_bits
    )


# --- The running sum -----------------------------------------------------------------------------------------------


def test_the_sum_takes_no_more_than_its_members() -> None:
    total = RunningSum(replace(LAYOUT, members=2))
    vector = void(total.layout)
    total.add(vector)
    total.add(vector)
    before = total.total()
    for call in (lambda: total.add(vector), lambda: total.add_packed(pack(vector, total.layout.ring_bits))):
        with pytest.raises(ConfigError, match="holds 2 institutions, one more arrived"):
            call()
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


def peak_bytes(work: Callable[[], object]) -> int:
    work()  # what is made once and kept, such as the check's coefficients, is not counted
    tracemalloc.start()
    result = work()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del result
    return peak


def test_no_step_holds_more_than_its_result_and_a_few_blocks() -> None:
    layout = Layout(2_000_000, 16, 1.0, 16, 4)
    update = rng().uniform(-1, 1, layout.parameters).astype(np.float32)
    words = pack(void(layout), layout.ring_bits)
    vector, few = 4 * layout.length, 3 * 4 * WIRE_BLOCK
    assert peak_bytes(lambda: quantise(update, layout, rng())) < vector + few
    assert peak_bytes(lambda: encode(update, 3, {}, layout, rng())) < vector + update.size + few  # and which are finite
    assert peak_bytes(lambda: pack(void(layout), layout.ring_bits)) < vector + words.nbytes + few
    assert peak_bytes(lambda: RunningSum(layout).add_packed(words)) < vector + few
    assert peak_bytes(lambda: decode(np.zeros(layout.length, np.uint32), layout)) < 3 * vector + few


@given(layouts())
def test_lengths_and_errors_follow_from_the_layout(layout: Layout) -> None:
    assert void(layout).shape == (layout.length,)
    assert layout.length == M + len(COUNTERS) * layout.limbs + CHECKS
    assert layout.ring_bits == layout.bits + layout.weight_bits + layout.member_bits <= RING_BITS
    assert layout.limbs * layout.limb_bits >= 62
    assert layout.levels * layout.error == pytest.approx(layout.clip)
    assume(layout.bits > 2)
    assert replace(layout, bits=layout.bits - 1).error > layout.error
