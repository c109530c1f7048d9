"""Secret sharing, against the published example and against what it promises: t shares give all, fewer nothing."""

from __future__ import annotations

import itertools
import secrets
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.secagg.shamir import PRIME, SECRET_BYTES, SHARE_BYTES, combine, evaluate, split, weights

some_secrets = st.one_of(
    st.binary(min_size=32, max_size=32),
    st.sampled_from([bytes(32), b"\xff" * 32, bytes(31) + b"\1", b"\1" + bytes(31)]),
)


def test_the_worked_example_that_everyone_knows() -> None:
    """Secret 1234, coefficients 166 and 94, p = 1613 (Wikipedia, "Shamir's secret sharing")."""
    values = evaluate([1234, 166, 94], 6, 1613)
    assert values == [1494, 329, 965, 176, 1188, 775]
    for points in ((2, 4, 5), (1, 2, 3), (6, 1, 4)):
        found = weights(points, 1613)
        assert sum(w * values[point - 1] for w, point in zip(found, points, strict=True)) % 1613 == 1234


def test_any_three_of_the_example_agree_and_two_do_not_tell() -> None:
    values = evaluate([1234, 166, 94], 6, 1613)
    for points in itertools.combinations(range(1, 7), 3):
        found = weights(points, 1613)
        assert sum(w * values[point - 1] for w, point in zip(found, points, strict=True)) % 1613 == 1234
    for points in itertools.combinations(range(1, 7), 2):
        found = weights(points, 1613)
        assert sum(w * values[point - 1] for w, point in zip(found, points, strict=True)) % 1613 != 1234


def test_the_field_is_that_of_a_mersenne_prime() -> None:
    """Lucas and Lehmer: 2^p - 1 is prime just when s of p - 2 is 0, with s of 0 = 4 and s -> s^2 - 2."""
    assert PRIME == 2**521 - 1
    s = 4
    for _ in range(521 - 2):
        s = (s * s - 2) % PRIME
    assert s == 0
    assert 8 * SHARE_BYTES >= PRIME.bit_length() > 8 * SECRET_BYTES


@given(some_secrets, st.integers(1, 12), st.data())
def test_any_t_shares_give_the_secret(secret: bytes, count: int, data: st.DataObject) -> None:
    threshold = data.draw(st.integers(1, count))
    shares = split(data.draw(st.sampled_from([bytes, bytearray]))(secret), threshold, count)
    assert [len(share) for share in shares] == [SHARE_BYTES] * count
    points = data.draw(st.permutations(range(1, count + 1)))[: data.draw(st.integers(threshold, count))]
    assert combine(weights(points), [shares[point - 1] for point in points]) == secret


def test_256_members() -> None:
    secret = secrets.token_bytes(32)
    shares = split(secret, 129, 256)
    points = range(100, 229)
    assert combine(weights(points), [shares[point - 1] for point in points]) == secret


# --- Fewer than t say nothing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prime", "threshold"), [(5, 2), (7, 3), (11, 3), (5, 4)])
def test_for_fewer_shares_every_secret_fits_equally_well(prime: int, threshold: int) -> None:
    """Exhaustive: over all coefficients, t - 1 shares take every value equally often, whatever the secret."""
    members = min(prime - 1, threshold + 1)
    for points in itertools.combinations(range(members), threshold - 1):
        for secret in range(prime):
            seen: Counter[tuple[int, ...]] = Counter()
            for coefficients in itertools.product(range(prime), repeat=threshold - 1):
                values = evaluate([secret, *coefficients], members, prime)
                seen[tuple(values[point] for point in points)] += 1
            assert len(seen) == prime ** (threshold - 1)
            assert set(seen.values()) == {1}


def test_two_of_three_needed_shares_leave_one_polynomial_for_every_secret() -> None:
    """For each candidate secret, exactly one value of the missing share."""
    prime, values = 13, evaluate([9, 4, 7], 3, 13)
    found = weights((1, 2, 3), prime)
    fits = {
        (found[0] * values[0] + found[1] * values[1] + found[2] * missing) % prime: missing for missing in range(prime)
    }
    assert sorted(fits) == list(range(prime))
    assert fits[9] == values[2]


def test_coefficients_come_from_the_systems_generator_over_the_whole_field(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def below(limit: int) -> int:
        asked.append(limit)
        return 0

    monkeypatch.setattr(secrets, "randbelow", below)
    assert split(b"\7" * 32, 4, 6) == [bytes(34) + b"\7" * 32] * 6
    assert asked == [PRIME] * 3


def test_one_share_is_uniform_whatever_the_secret() -> None:
    """Chi-square over the high and over the low bits of a share; beyond 79.1 once in 10^10."""
    draws = 3000
    for secret in (bytes(32), b"\xff" * 32):
        shares = [int.from_bytes(split(secret, 2, 3)[1], "big") for _ in range(draws)]
        for found in ([share >> 517 for share in shares], [share & 15 for share in shares]):
            counts = np.bincount(found, minlength=16)
            assert float(((counts - draws / 16) ** 2).sum()) / (draws / 16) < 79.1


def test_two_splits_of_one_secret_have_no_share_in_common() -> None:
    one, other = split(bytes(32), 3, 5), split(bytes(32), 3, 5)
    assert len({*one, *other}) == 10


# --- False and malformed ones --------------------------------------------------------------------------------------


@given(some_secrets, st.integers(2, 6), st.data())
def test_a_false_share_gives_another_secret_or_none(secret: bytes, threshold: int, data: st.DataObject) -> None:
    shares = split(secret, threshold, threshold)
    place = data.draw(st.integers(0, threshold - 1))
    false = data.draw(st.integers(0, PRIME - 1)).to_bytes(SHARE_BYTES, "big")
    if false == shares[place]:
        return
    shares[place] = false
    try:
        found = combine(weights(range(1, threshold + 1)), shares)
    except ValueError:
        return
    assert found != secret


def test_a_false_share_can_give_another_secret_that_looks_as_good() -> None:
    """So whoever opens shares must know what the secret has to fit."""
    secret, wanted = bytes(32), b"\7" * 32
    shares, found = split(secret, 3, 3), weights((1, 2, 3))
    shift = int.from_bytes(wanted, "big") * pow(found[0], -1, PRIME)
    shares[0] = ((int.from_bytes(shares[0], "big") + shift) % PRIME).to_bytes(SHARE_BYTES, "big")
    assert combine(found, shares) == wanted


def test_shares_of_two_secrets_do_not_mix() -> None:
    one, other = split(bytes(32), 3, 3), split(bytes(32), 3, 3)
    with pytest.raises(ValueError, match="do not belong together"):
        combine(weights((1, 2, 3)), [one[0], one[1], other[2]])


def test_shares_at_the_wrong_points_do_not_give_the_secret() -> None:
    shares = split(b"\7" * 32, 3, 5)
    with pytest.raises(ValueError, match="do not belong together"):
        combine(weights((1, 2, 4)), shares[:3])


@pytest.mark.parametrize(
    "share",
    [b"", bytes(65), bytes(67), b"\xff" * 66, PRIME.to_bytes(66, "big"), (PRIME + 1).to_bytes(66, "big")],
    ids=lambda share: f"{len(share)} bytes",
)
def test_malformed_shares_are_refused(share: bytes) -> None:
    with pytest.raises(ValueError, match="expected shares of 66 bytes below the prime"):
        combine(weights((1, 2)), [split(bytes(32), 2, 2)[0], share])


def test_no_error_shows_a_share_or_a_secret() -> None:
    shares = split(b"\7" * 32, 2, 3)
    for wrong in ([shares[0], shares[2]], [shares[0], b"\xff" * 66]):
        with pytest.raises(ValueError) as caught:
            combine(weights((1, 2)), wrong)
        assert not any(share.hex() in str(caught.value) for share in shares)
        assert len(str(caught.value)) < 60


def test_more_or_fewer_shares_than_weights_are_refused() -> None:
    shares = split(bytes(32), 2, 3)
    for count in (1, 3):
        with pytest.raises(ValueError):
            combine(weights((1, 2)), shares[:count])


@pytest.mark.parametrize(
    ("size", "threshold", "count"), [(32, 0, 3), (32, 4, 3), (32, -1, 3), (32, 1, 0), (31, 2, 3), (33, 2, 3), (0, 2, 3)]
)
def test_impossible_numbers_and_other_secrets_are_refused(size: int, threshold: int, count: int) -> None:
    with pytest.raises(ValueError, match="expected a secret of 32 bytes"):
        split(bytes(size), threshold, count)


@pytest.mark.parametrize("points", [(0, 1), (1, 1), (-1, 2), (1, PRIME), (1, PRIME + 1), (3, 2, 3)])
def test_points_that_are_not_different_ones_above_zero_are_refused(points: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected different points above 0"):
        weights(points)


def test_the_weights_of_a_set_sum_to_one() -> None:
    """A constant is its own value at 0."""
    for points in itertools.combinations(range(1, 8), 4):
        assert sum(weights(points)) % PRIME == 1
