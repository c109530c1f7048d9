"""Masks: an independent AES-256-CTR, uniform over the ring, every bit of a key in play, nothing left behind."""

from __future__ import annotations

import secrets
import tracemalloc

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.secagg.masks import KEY_BYTES, add_masks
from common.secagg.participant import mask_key_of, stream_key
from common.secagg.sealing import derive
from tests.common.secagg.conftest import make_attempt

BLOCK = 1 << 15  # elements that the module works on at a time; its borders are where a mistake would hide
LENGTHS = (0, 1, 3, 4, 5, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK + 7)
KEY = bytes(range(32))


def counter_mode(key: bytes, counter: int, size: int) -> bytes:
    """AES-CTR from its definition: the encrypted counters, one after the other (NIST SP 800-38A, 6.5)."""
    blocks = b"".join(((counter + i) % 2**128).to_bytes(16, "big") for i in range(-(-size // 16)))
    return Cipher(AES(key), ECB()).encryptor().update(blocks)[:size]


def stream(key: bytes, length: int) -> NDArray[np.uint32]:
    found = np.zeros(length, np.uint32)
    add_masks(found, [key], [])
    return found


def test_the_independent_counter_mode_is_that_of_nist() -> None:
    """SP 800-38A, F.5.5: CTR-AES256.Encrypt."""
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    counter = int("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff", 16)
    plaintext = bytes.fromhex(
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    ciphertext = bytes.fromhex(
        "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
        "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6"
    )
    found = counter_mode(key, counter, 64)
    assert bytes(a ^ b for a, b in zip(plaintext, found, strict=True)) == ciphertext


@pytest.mark.parametrize("length", LENGTHS)
def test_a_stream_is_aes_256_in_counter_mode_from_zero(length: int) -> None:
    expected = np.frombuffer(counter_mode(KEY, 0, 4 * length), "<u4")
    assert stream(KEY, length).tolist() == expected.tolist()


@given(st.sampled_from(LENGTHS) | st.integers(0, 200), st.data())
def test_what_is_added_and_subtracted_again_leaves_nothing(length: int, data: st.DataObject) -> None:
    keys = data.draw(st.lists(st.binary(min_size=32, max_size=32), max_size=5))
    signs = data.draw(st.lists(st.booleans(), min_size=len(keys), max_size=len(keys)))
    before = np.random.default_rng(length).integers(0, 2**32, length, np.uint32)
    elements = before.copy()
    plus = [key for key, sign in zip(keys, signs, strict=True) if sign]
    minus = [key for key, sign in zip(keys, signs, strict=True) if not sign]
    add_masks(elements, plus, minus)
    masked = elements.copy()
    add_masks(elements, minus, plus)
    assert elements.tobytes() == before.tobytes()
    add_masks(elements, plus[::-1], [])
    add_masks(elements, [], minus[::-1])
    assert elements.tobytes() == masked.tobytes()


@pytest.mark.parametrize("length", LENGTHS)
def test_many_masks_are_the_sum_of_each(length: int) -> None:
    keys = [bytes([i]) * 32 for i in range(4)]
    elements = np.full(length, 7, np.uint32)
    add_masks(elements, keys[:2], keys[2:])
    streams = [stream(key, length) for key in keys]
    assert elements.tobytes() == (streams[0] + streams[1] - streams[2] - streams[3] + np.uint32(7)).tobytes()


@pytest.mark.parametrize("key", [b"", bytes(16), bytes(24), bytes(31), bytes(33), bytes(64)], ids=len)
@pytest.mark.parametrize("side", [0, 1], ids=["plus", "minus"])
def test_only_keys_of_full_width_are_taken(key: bytes, side: int) -> None:
    elements = np.zeros(5, np.uint32)
    keys: list[list[bytes]] = [[KEY], [KEY]]
    keys[side].append(key)
    with pytest.raises(ValueError, match=f"expected a key of {KEY_BYTES} bytes, found {len(key)}"):
        add_masks(elements, *keys)
    assert not elements.any()


def test_memory_is_that_of_one_block_however_many_masks() -> None:
    elements = np.zeros(2_000_000, np.uint32)
    keys = [secrets.token_bytes(32) for _ in range(20)]
    tracemalloc.start()
    add_masks(elements[:100_000], keys, [])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * 4 * BLOCK


# --- Uniform over the ring -----------------------------------------------------------------------------------------

ELEMENTS = 200_000
LIMIT = 426.0  # chi-square of 255 degrees of freedom goes beyond it once in 10^10
BITS = (20, 23, 31, 32)


def worst_bucket_test(elements: NDArray[np.uint32], bits: int) -> float:
    """The largest chi-square of 256 buckets by the highest, the middle and the lowest eight bits of k."""
    found = []
    for shift in (bits - 8, (bits - 8) // 2, 0):
        counts = np.bincount(elements >> np.uint32(shift) & np.uint32(255), minlength=256)
        expected = len(elements) / 256
        found.append(float(((counts - expected) ** 2).sum()) / expected)
    return max(found)


def constants(bits: int) -> list[NDArray[np.uint32]]:
    """Zeros, the largest element, the smallest and the largest in turn, and one lonely bit."""
    top = 2**bits - 1
    return [
        np.zeros(ELEMENTS, np.uint32),
        np.full(ELEMENTS, top, np.uint32),
        np.resize(np.array([2 ** (bits - 1), 2 ** (bits - 1) - 1], np.uint32), ELEMENTS),
        np.ones(ELEMENTS, np.uint32),
    ]


@pytest.mark.parametrize("bits", BITS)
def test_a_masked_vector_is_uniform_over_the_ring_whatever_it_was(bits: int) -> None:
    for vector in constants(bits):
        for plus, minus in (([secrets.token_bytes(32)], []), ([], [secrets.token_bytes(32)]),
                            ([secrets.token_bytes(32)], [secrets.token_bytes(32)])):  # fmt: skip
            masked = vector.copy()
            add_masks(masked, plus, minus)
            masked &= np.uint32(2**bits - 1)
            assert worst_bucket_test(masked, bits) < LIMIT
            # Neighbours, which share no bits of one block's counter: their difference is as uniform.
            assert worst_bucket_test((masked[1:] - masked[:-1]) & np.uint32(2**bits - 1), bits) < LIMIT


@pytest.mark.parametrize("bits", BITS)
def test_the_test_of_uniformity_rejects_what_is_not(bits: int) -> None:
    rng, top = np.random.default_rng(1), 2**bits - 1
    for vector in constants(bits):
        assert worst_bucket_test(vector, bits) > LIMIT
        narrow = (vector + rng.integers(0, 2 ** (bits - 1), ELEMENTS, np.uint32)) & np.uint32(top)
        assert worst_bucket_test(narrow, bits) > LIMIT
        centred = rng.normal(0, 2.0 ** (bits - 3), ELEMENTS).astype(np.int64).astype(np.uint32)
        assert worst_bucket_test((vector + centred) & np.uint32(top), bits) > LIMIT
    even = rng.integers(0, 2 ** (bits - 1), ELEMENTS, np.uint32) * np.uint32(2)
    assert worst_bucket_test(even, bits) > LIMIT


# --- Every bit of a seed matters ------------------------------------------------------------------------------------


def flipped(seed: bytes, bit: int) -> bytes:
    return (int.from_bytes(seed, "big") ^ 1 << bit).to_bytes(len(seed), "big")


def changed(one: bytes, other: bytes) -> float:
    """Share of bits that differ."""
    assert len(one) == len(other)
    return (int.from_bytes(one, "big") ^ int.from_bytes(other, "big")).bit_count() / (8 * len(one))


def test_every_bit_of_a_streams_key_changes_half_of_the_stream() -> None:
    """131 072 bits each: beyond 1.1 % from a half once in 10^13."""
    key = secrets.token_bytes(32)
    before = stream(key, 4096).tobytes()
    for bit in range(256):
        assert abs(changed(before, stream(flipped(key, bit), 4096).tobytes()) - 0.5) < 0.011


def test_every_bit_of_a_self_mask_seed_changes_half_of_the_streams_key() -> None:
    """256 bits each: beyond a quarter to three quarters once in 10^15."""
    attempt, digest, seed = make_attempt(4), bytes(32), secrets.token_bytes(32)
    before = stream_key(attempt, digest, "self mask", seed, "alder")
    masks = {before}
    for bit in range(256):
        found = stream_key(attempt, digest, "self mask", flipped(seed, bit), "alder")
        assert 0.25 < changed(before, found) < 0.75
        assert abs(changed(stream(before, 256).tobytes(), stream(found, 256).tobytes()) - 0.5) < 0.05
        masks.add(found)
    assert len(masks) == 257


def test_every_bit_of_a_mask_seed_changes_half_of_the_pair_seed_and_of_the_mask_key() -> None:
    attempt, digest, seed = make_attempt(4), bytes(32), secrets.token_bytes(32)

    def pair(seed: bytes) -> bytes:
        return derive(seed, attempt.pair_statement(digest, "alder", "birch"))

    def public(seed: bytes) -> bytes:
        return mask_key_of(attempt, "alder", seed).public

    pairs, keys = pair(seed), public(seed)
    for bit in range(256):
        other = flipped(seed, bit)
        assert 0.25 < changed(pairs, pair(other)) < 0.75
        # A coefficient of ML-KEM lies below 3329 of 4096, so that high bits differ a little less often than not.
        assert 0.45 < changed(keys[:1184], public(other)[:1184]) < 0.52
        assert 0.25 < changed(keys[1184:], public(other)[1184:]) < 0.75


def test_every_bit_of_a_pair_seed_changes_half_of_the_streams_key() -> None:
    attempt, digest, seed = make_attempt(4), bytes(32), secrets.token_bytes(32)
    before = stream_key(attempt, digest, "pairwise mask", seed, "alder", "birch")
    for bit in range(256):
        found = stream_key(attempt, digest, "pairwise mask", flipped(seed, bit), "alder", "birch")
        assert 0.25 < changed(before, found) < 0.75


def test_streams_of_different_purposes_names_lists_or_attempts_have_different_keys() -> None:
    seed = secrets.token_bytes(32)
    attempts = [make_attempt(4), make_attempt(4, number=2), make_attempt(4, run="run-2"), make_attempt(4, plan="q")]
    found = [
        stream_key(attempt, digest, purpose, seed, *names)
        for attempt in attempts
        for digest in (bytes(32), b"\1" * 32)
        for purpose, names in (
            ("self mask", ("alder",)),
            ("self mask", ("birch",)),
            ("pairwise mask", ("alder",)),
            ("pairwise mask", ("alder", "birch")),
            ("pairwise mask", ("birch", "alder")),
            ("pairwise mask", ("alder", "cedar")),
        )
    ]
    assert len(set(found)) == len(found)
