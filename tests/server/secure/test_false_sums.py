"""False shares, spoilt vectors and false seeds: never a false sum, but the sum of a repeat or none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from common.errors import RunStopped
from common.messages import TIMED_OUT, Plan, Reply, Request
from common.secagg import shamir
from common.secagg.attempt import key_list_digest
from common.secagg.messages import Consents, Inbox, KeyList, MaskedInput, Shares
from common.secagg.sealing import seal
from tests.federations import Answer, Federation, WiredMembers, adapter_of, told
from tests.server.secure.conftest import (
    FIVE,
    LOG,
    A,
    Ask,
    B,
    C,
    D,
    E,
    both,
    collect,
    is_the_plain_sum,
    sets_named,
    who_falls,
)
from tests.server.secure.liars import Liar, revealed, shares


def test_a_false_share_of_one_who_is_not_needed_changes_nothing(five: Federation) -> None:
    liar = Liar(five, E, Consents, revealed(lambda found: dict.fromkeys(found, bytes(shamir.SHARE_BYTES))))
    assert is_the_plain_sum(five, collect(five, liar), FIVE)


FALSE_SHARES = [
    pytest.param(lambda s: dict.fromkeys(s, bytes(shamir.SHARE_BYTES)), id="zeros"),
    pytest.param(lambda s: dict.fromkeys(s, b"\xff" * shamir.SHARE_BYTES), id="above the prime"),
    pytest.param(lambda s: {**s, A: s[B], B: s[A]}, id="two names swapped"),
    pytest.param(lambda s: {**s, C: (int.from_bytes(s[C], "big") ^ 1).to_bytes(66, "big")}, id="one bit of one"),
]


@pytest.mark.parametrize("change", FALSE_SHARES)
def test_false_shares_never_give_a_false_sum(
    change: Callable[[dict[str, bytes]], dict[str, bytes]], five: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    """One of five may lie where four are enough. When two do, once, the attempt is repeated; always, the run stops. The
    set stays the one that was named.
    """

    def liars(attempts: int = 99) -> Answer:
        return both(*(Liar(five, name, Consents, revealed(change), attempts=attempts) for name in (A, D)))

    one = collect(five, WiredMembers(five, Liar(five, A, Consents, revealed(change))))
    assert is_the_plain_sum(five, one, FIVE)
    assert one.attempts == 1
    later = adapter_of(2)
    collected = collect(five, WiredMembers(five, liars(attempts=1)), later, 2)
    assert is_the_plain_sum(five, collected, FIVE, adapter=later)
    assert collected.attempts == 2
    assert told(caplog.records, LOG, "attempt 2 gave no sum", "cannot be reconstructed")
    later = adapter_of(3)
    members = WiredMembers(five, liars())
    with pytest.raises(RunStopped, match=r"3 attempts gave no sum; .* cannot be reconstructed.*\(nobody refused\)"):
        collect(five, members, later, 3)
    assert set(sets_named(members)) == {FIVE}


def spoiling(name: str, attempts: int) -> Answer:
    """A member whose masked input is wrong in one bit of the first element."""

    def answer(asked: str, request: Request, ask: Ask) -> Reply:
        nonlocal attempts
        reply = ask(request)
        if asked != name or not isinstance(reply, MaskedInput) or not attempts:
            return reply
        attempts -= 1
        spoilt = reply.vector.copy()
        spoilt[0] ^= np.uint32(1)
        return replace(reply, vector=spoilt)

    return answer


def test_a_corrupt_sum_is_not_used_and_the_attempt_is_repeated(
    five: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    members = WiredMembers(five, both(spoiling(C, attempts=1), who_falls("silent", Inbox, A, attempts=1)))
    collected = collect(five, members)
    assert is_the_plain_sum(five, collected, FIVE[1:])
    assert collected.attempts == 2
    assert told(caplog.records, LOG, "round 1: attempt 1 gave no sum: the sum is corrupt")
    assert set(sets_named(members)) == {FIVE[1:]}


def test_a_sum_that_stays_corrupt_stops_the_run(five: Federation) -> None:
    with pytest.raises(RunStopped, match=r"3 attempts gave no sum; the last: the sum is corrupt.*nobody refused"):
        collect(five, spoiling(C, attempts=99))


def test_a_false_pair_seed_of_one_who_falls_silent_is_found_in_the_sum(five: Federation) -> None:
    """Alder seals seeds that do not follow from its mask seed, and leaves: its masks cannot be taken off."""
    liar = Liar(five, A, KeyList, shares(lambda s: s), attempts=1)

    def reseal(federation: Federation, plan: Plan, reply: Reply) -> Reply:
        assert isinstance(reply, Shares)
        assert liar.list is not None
        attempt, digest = plan.attempt, key_list_digest(plan.attempt, liar.list.keys)
        false = {}
        for name, sealed in reply.sealed.items():
            pair = seal(bytes(32), liar.list.keys[name].mask_key, attempt.pair_info(digest, A, name))
            statement = attempt.sealed_statement(digest, A, name, sealed.shares, pair)
            false[name] = replace(sealed, pair=pair, signature=federation.identities[A].sign(statement))
        return replace(reply, sealed=false)

    liar.change = reseal
    members = WiredMembers(five, both(liar, who_falls("lost", Inbox, A)))
    collected = collect(five, members)
    assert is_the_plain_sum(five, collected, FIVE[1:])
    assert collected.attempts == 2
    assert dict(collected.refused) == {A: TIMED_OUT}
