"""What an attempt binds its statements to: nothing that is said in one, for one purpose, holds anywhere else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from common.errors import ConfigError
from common.secagg.attempt import Attempt, key_list_digest
from common.secagg.messages import Keys
from tests.common.secagg.conftest import NAMES, Played, make_attempt

ATTEMPT = make_attempt(4)
KEYS = Keys(ATTEMPT.plan, b"share key", b"mask key", b"commitment", b"signature")


def statements(attempt: Attempt, list_: bytes = b"list", one: str = "alder", other: str = "birch") -> dict[str, bytes]:
    """One of each kind, with equal fields as far as they go."""
    return {
        "keys": attempt.keys_statement(one, KEYS),
        "sealed": attempt.sealed_statement(list_, one, other, b"shares", b"pair"),
        "survivors": attempt.survivors_statement(list_, (one, other)),
        "commitment": attempt.commitment(one, b"seed"),
        "pair": attempt.pair_statement(list_, one, other),
        "shares info": attempt.shares_info(list_, one, other),
        "pair info": attempt.pair_info(list_, one, other),
        "mask key": attempt.statement("mask key", one),
        "share key": attempt.statement("share key", one),
        "key list": key_list_digest(attempt, {one: KEYS}),
    }


def test_no_two_purposes_share_a_statement() -> None:
    assert len(set(statements(ATTEMPT).values())) == len(statements(ATTEMPT))


@pytest.mark.parametrize(
    "other",
    [
        replace(ATTEMPT, run="run-2"),
        replace(ATTEMPT, round=3),
        replace(ATTEMPT, attempt=2),
        replace(ATTEMPT, plan="another plan"),
        replace(ATTEMPT, run="run-", round=12),
    ],
    ids=["run", "round", "attempt", "plan", "digits that move"],
)
def test_no_statement_of_one_attempt_is_one_of_another(other: Attempt) -> None:
    assert not set(statements(ATTEMPT).values()) & set(statements(other).values())


@pytest.mark.parametrize(
    "kind", ["sealed", "survivors", "pair", "shares info", "pair info"]
)  # those that come after the list of keys
def test_what_comes_after_the_list_of_keys_is_bound_to_it(kind: str) -> None:
    assert statements(ATTEMPT)[kind] != statements(ATTEMPT, list_=b"lisu")[kind]


@pytest.mark.parametrize("kind", ["sealed", "survivors", "pair", "shares info", "pair info"])
def test_the_order_of_two_names_counts(kind: str) -> None:
    found = {statements(ATTEMPT, one=one, other=other)[kind] for one in NAMES[:3] for other in NAMES[:3]}
    assert len(found) == 9


@pytest.mark.parametrize(
    "change",
    [
        lambda said: {"share_key": said.share_key + b"\0"},
        lambda said: {"mask_key": b""},
        lambda said: {"commitment": b"c"},
        lambda said: {"share_key": said.mask_key, "mask_key": said.share_key},
        lambda said: {"share_key": said.share_key + said.mask_key[:1], "mask_key": said.mask_key[1:]},
    ],
)
def test_announced_keys_are_signed_whole(change: Callable[[Keys], dict[str, bytes]]) -> None:
    other = replace(KEYS, **change(KEYS))
    assert ATTEMPT.keys_statement("alder", other) != ATTEMPT.keys_statement("alder", KEYS)
    assert key_list_digest(ATTEMPT, {"alder": other}) != key_list_digest(ATTEMPT, {"alder": KEYS})


def test_the_digest_of_a_list_covers_names_keys_and_signatures_in_any_order(played: Played) -> None:
    keys, attempt = dict(played.key_list.keys), played.attempt
    one, other, *rest = keys
    found = [
        keys,
        {name: keys[name] for name in (one, *rest)},
        {**keys, one: keys[other], other: keys[one]},
        {**keys, one: replace(keys[one], signature=bytes(64))},
        {**keys, one: replace(keys[one], share_key=keys[one].mask_key)},
        {**keys, one: replace(keys[one], mask_key=keys[one].share_key)},
        {**keys, one: replace(keys[one], commitment=bytes(32))},
        {},
    ]
    digests = [key_list_digest(attempt, each) for each in found]
    assert len(set(digests)) == len(found)
    assert {len(digest) for digest in digests} == {32}
    assert key_list_digest(attempt, dict(reversed(keys.items()))) == digests[0]


def test_points_are_places_in_the_cohort_from_one() -> None:
    assert [ATTEMPT.point(name) for name in ATTEMPT.cohort] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "cohort",
    [("birch", "alder", "cedar", "elm"), ("alder", "alder", "birch", "cedar"), ("alder", "birch", "cedar", "cedar")],
)
def test_a_cohort_out_of_order_or_with_a_name_twice_is_refused(cohort: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="expected a cohort of different names in order"):
        replace(ATTEMPT, cohort=cohort)


@pytest.mark.parametrize("cohort", [NAMES[:2], NAMES[:5], ()], ids=len)
def test_a_cohort_that_does_not_fit_the_terms_is_refused(cohort: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=f"expected a cohort of 3 to 4 members, found {len(cohort)}"):
        replace(ATTEMPT, cohort=cohort)
