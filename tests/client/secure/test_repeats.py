"""Repeats of an attempt: fresh keys over the same update, n and t kept, and after a signature exactly that set."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from common.messages import Plan
from common.secagg import reasons
from common.secagg.messages import Keys, MaskedInput, Survivors
from tests.client.secure.conftest import (
    ABC,
    ABCD,
    A,
    B,
    C,
    D,
    consented,
    ends_the_attempt,
    refuses_plan,
)
from tests.federations import NAMES, Federation, adapter_of


def test_before_anybody_signed_a_repeat_may_have_fewer_members(federation: Federation) -> None:
    federation.coordinator().masked()
    repeat = federation.coordinator(federation.plan(2, ABC, first=4))
    assert repeat.sum().tobytes() == federation.total(repeat.plan, ABC).tobytes()


def test_a_repeat_goes_under_fresh_keys_and_masks(federation: Federation) -> None:
    first, second = federation.coordinator(), federation.coordinator(federation.plan(2))
    one = first.keys()
    first.masked()
    before = {name: reply.vector for name, reply in federation.sent if isinstance(reply, MaskedInput)}
    federation.sent.clear()
    two = second.keys()
    second.masked()
    after = {name: reply.vector for name, reply in federation.sent if isinstance(reply, MaskedInput)}
    for name in ABCD:
        parts = [{k.share_key, k.mask_key, k.commitment} for k in (one.keys[name], two.keys[name])]
        assert not parts[0] & parts[1]
        assert (before[name] != after[name]).mean() > 0.9


def test_a_repeat_asks_for_no_second_update_and_another_round_does(federation: Federation) -> None:
    for number in (1, 2, 3):
        federation.coordinator(federation.plan(number)).masked()
    assert federation.trained == dict.fromkeys(ABCD, 1)
    federation.coordinator(federation.plan(4, round=2)).keys()
    assert federation.trained == dict.fromkeys(ABCD, 2)
    federation.coordinator(federation.plan(5, adapter=adapter_of(2), round=2)).keys(adapter=adapter_of(2))
    assert federation.trained == dict.fromkeys(ABCD, 3)


def test_a_vector_of_one_run_is_not_sent_in_another(federation: Federation) -> None:
    federation.coordinator().masked()
    federation.coordinator(federation.plan(2, run="other-run")).keys()
    assert federation.trained == dict.fromkeys(ABCD, 2)


@pytest.mark.parametrize(
    ("repeat", "reason"),
    [
        pytest.param(lambda f: f.plan(2, ABC), reasons.TERMS_DIFFER, id="a lower n"),
        pytest.param(lambda f: f.plan(2, NAMES[:4], first=5), None, id="n kept"),
        pytest.param(lambda f: f.plan(2, NAMES[:4]), reasons.TERMS_DIFFER, id="a lower n and t"),
    ],
)
def test_a_repeat_keeps_n_and_t(
    repeat: Callable[[Federation], Plan], reason: str | None, five: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    five.coordinator().shares()
    if reason is None:
        assert isinstance(five.announce(A, repeat(five)), Keys)
    else:
        refuses_plan(five, repeat(five), reason, caplog)


def test_a_repeat_adds_no_members(five: Federation, caplog: pytest.LogCaptureFixture) -> None:
    five.coordinator(five.plan(1, ABCD, first=5)).masked()
    for cohort in (NAMES[:5], (A, B, C, NAMES[4])):
        refuses_plan(five, five.plan(2, cohort, first=5), reasons.COHORT_UNKNOWN, caplog)


def test_members_that_were_left_out_may_come_back_before_anybody_signed(five: Federation) -> None:
    five.coordinator().shares()
    five.coordinator(five.plan(2, ABCD, first=5)).shares()
    repeat = five.coordinator(five.plan(3))
    assert repeat.sum().tobytes() == five.total(repeat.plan, NAMES[:5]).tobytes()


def test_after_it_signed_a_member_repeats_with_exactly_that_set(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    """The attempt "failed", once more without dogwood: the difference of both sums would be dogwood's update."""
    federation.coordinator().consents()
    refuses_plan(federation, federation.plan(2, ABC, first=4), reasons.SURVIVORS_DIFFER, caplog)
    repeat = federation.coordinator(federation.plan(2))
    repeat.masked()
    lie = Survivors(repeat.plan.digest(), ABC)
    ends_the_attempt(federation, (repeat, A, lie), reasons.SURVIVORS_DIFFER, caplog)
    assert consented(federation, A) == list(ABCD)
    again = federation.coordinator(federation.plan(3))
    assert again.sum().tobytes() == federation.total(again.plan, ABCD).tobytes()
    assert federation.trained[A] == 1


def test_after_it_signed_a_smaller_set_a_member_repeats_with_no_larger_one(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    coordinator = federation.coordinator()
    coordinator.masked(without=(D,))
    coordinator.consents()
    refuses_plan(federation, federation.plan(2), reasons.SURVIVORS_DIFFER, caplog)
    refuses_plan(federation, federation.plan(2, (A, B, D), first=4), reasons.SURVIVORS_DIFFER, caplog)
    repeat = federation.coordinator(federation.plan(2, ABC, first=4))
    assert repeat.sum().tobytes() == federation.total(repeat.plan, ABC).tobytes()


def test_after_it_signed_another_round_over_the_same_adapter_is_bound_too(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    federation.coordinator().sum()
    refuses_plan(federation, federation.plan(2, ABC, first=4, round=2), reasons.SURVIVORS_DIFFER, caplog)
