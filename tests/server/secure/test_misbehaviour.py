"""Members that lie, answer twice, late or unreadably: whoever misbehaves costs the sum only itself."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from common.fixed_point import Ring
from common.messages import (
    MALFORMED,
    PROTOCOL,
    TIMED_OUT,
    Contribution,
    Introduction,
    Plan,
    Refused,
    Reply,
    Request,
    TrainRequest,
)
from common.secagg import reasons
from common.secagg.identity import Identity
from common.secagg.messages import Consent, Consents, Inbox, KeyList, Keys, MaskedInput, Shares, Survivors
from common.secagg.participant import Participant
from common.wire import Wire, from_wire
from tests.federations import BASE, NAMES, Federation, WiredMembers, told
from tests.server.secure.conftest import (
    ABCD,
    FIVE,
    LOG,
    PHASES,
    A,
    Ask,
    B,
    E,
    both,
    collect,
    is_the_plain_sum,
    who_falls,
)
from tests.server.secure.liars import Change, Liar, consent, keys, masked, revealed, shares


def signed_by_an_outsider(federation: Federation, plan: Plan, honest: Keys) -> Keys:
    return Participant(plan.attempt, Identity.generate(E), federation.roster).keys()


def self_signed(federation: Federation, plan: Plan, honest: Keys, **parts: bytes) -> Keys:
    changed = replace(honest, **parts)
    return replace(changed, signature=federation.identities[E].sign(plan.attempt.keys_statement(E, changed)))


def with_padding(vector: Ring, plan: Plan) -> Ring:
    """A bit set where the wire form has only zeros."""
    spoilt = vector.copy()
    spoilt[-1] |= np.uint32(1 << 31)
    return spoilt


def without(parts: Any, name: str) -> dict[str, Any]:
    return {key: value for key, value in parts.items() if key != name}


def other_set(federation: Federation, honest: bytes) -> bytes:
    return federation.identities[E].sign(b"a set of my own")


MEMBERS = [
    pytest.param(TrainRequest, keys(signed_by_an_outsider), reasons.KEYS_UNVERIFIED, id="keys of an outsider"),
    pytest.param(
        TrainRequest,
        keys(lambda f, p, k: self_signed(f, p, k, share_key=k.share_key[:-1])),
        reasons.KEYS_UNVERIFIED,
        id="a key too short",
    ),
    pytest.param(
        TrainRequest,
        keys(lambda f, p, k: self_signed(f, p, k, mask_key=k.share_key)),
        reasons.KEYS_UNVERIFIED,
        id="one key for both uses",
    ),
    pytest.param(
        TrainRequest,
        keys(lambda f, p, k: self_signed(f, p, k, commitment=b"")),
        reasons.KEYS_UNVERIFIED,
        id="no commitment",
    ),
    pytest.param(
        TrainRequest,
        keys(lambda f, p, k: replace(k, plan="0" * 64)),
        reasons.ATTEMPT_UNKNOWN,
        id="keys for another plan",
    ),
    pytest.param(
        KeyList,
        shares(lambda s: replace(s, sealed=without(s.sealed, A))),
        reasons.SHARES_UNVERIFIED,
        id="nothing for one of them",
    ),
    pytest.param(
        KeyList,
        shares(lambda s: replace(s, sealed={**s.sealed, "mallory": s.sealed[A]})),
        reasons.SHARES_UNVERIFIED,
        id="something for a stranger",
    ),
    pytest.param(
        KeyList,
        shares(lambda s: replace(s, sealed={**s.sealed, A: s.sealed[B], B: s.sealed[A]})),
        reasons.SHARES_UNVERIFIED,
        id="two recipients swapped",
    ),
    pytest.param(
        KeyList,
        shares(lambda s: replace(s, sealed={**s.sealed, A: replace(s.sealed[A], shares=s.sealed[A].shares[:-1])})),
        reasons.SHARES_UNVERIFIED,
        id="a ciphertext cut short",
    ),
    pytest.param(
        KeyList, shares(lambda s: replace(s, plan="0" * 64)), reasons.ATTEMPT_UNKNOWN, id="shares of another attempt"
    ),
    pytest.param(Inbox, masked(lambda v, p: v[:-1]), reasons.VECTOR_DIFFERS, id="a vector too short"),
    pytest.param(Inbox, masked(lambda v, p: np.append(v, v[:1])), reasons.VECTOR_DIFFERS, id="a vector too long"),
    pytest.param(Inbox, masked(lambda v, p: v[:0]), reasons.VECTOR_DIFFERS, id="no vector"),
    pytest.param(Inbox, masked(with_padding), reasons.VECTOR_DIFFERS, id="elements that are none"),
    pytest.param(
        Inbox,
        lambda f, p, r: MaskedInput("0" * 64, r.vector),
        reasons.ATTEMPT_UNKNOWN,
        id="a vector of another attempt",
    ),
    pytest.param(Survivors, consent(other_set), reasons.SIGNATURES_UNVERIFIED, id="it signs another set"),
    pytest.param(Survivors, consent(lambda f, s: s[:-1]), reasons.SIGNATURES_UNVERIFIED, id="a signature cut short"),
    pytest.param(
        Consents,
        revealed(lambda s: {**s, A: s[A][:-1]}),
        reasons.SHARES_UNVERIFIED,
        id="a share cut short",
    ),
    pytest.param(Consents, revealed(lambda s: without(s, A)), reasons.SHARES_UNVERIFIED, id="a share too few"),
    pytest.param(
        Consents, revealed(lambda s: {**s, "mallory": s[A]}), reasons.SHARES_UNVERIFIED, id="a share too many"
    ),
    *[
        pytest.param(kind, lambda f, p, r: wrong(r), MALFORMED, id=f"a wrong answer to {kind.__name__}")
        for kind in PHASES
    ],
    *[
        pytest.param(
            kind,
            lambda f, p, r: Introduction(E, PROTOCOL, "0.1.0", BASE),
            MALFORMED,
            id=f"an introduction after {kind.__name__}",
        )
        for kind in (TrainRequest, Inbox)
    ],
    pytest.param(
        TrainRequest,
        lambda f, p, r: Contribution(p.digest(), f.total(p, (E,))),
        MALFORMED,
        id="an update in the clear",
    ),
]


def wrong(reply: Reply) -> Reply:
    """An answer of another kind than the one that was asked for."""
    return (
        Consent(reply.plan, bytes(64))
        if isinstance(reply, Keys)
        else Shares("0" * 64, {})
        if not isinstance(reply, Shares)
        else MaskedInput(reply.plan, np.zeros(3, np.uint32))
    )


@pytest.mark.parametrize(("kind", "change", "code"), MEMBERS)
def test_a_member_that_misbehaves_costs_only_itself(
    kind: type[Request], change: Change, code: str, five: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    collected = collect(five, Liar(five, E, kind, change))
    late = kind in (Survivors, Consents)
    assert is_the_plain_sum(five, collected, FIVE if late else ABCD)
    assert dict(collected.refused) == ({} if late else {E: code})
    assert collected.attempts == 1
    assert told(caplog.records, LOG, f"round 1, attempt 1: elm left: {code}")


def test_a_member_that_takes_anothers_keys_for_its_own_costs_only_itself(five: Federation) -> None:
    seen: dict[str, Keys] = {}

    def answer(name: str, request: Request, ask: Ask) -> Reply:
        reply = ask(request)
        if isinstance(reply, Keys):
            seen[name] = reply
            if name == E:
                assert isinstance(request, TrainRequest)
                return self_signed(five, request.plan, reply, mask_key=seen[A].mask_key)
        return reply

    collected = collect(five, answer)
    assert is_the_plain_sum(five, collected, ABCD)
    assert dict(collected.refused) == {E: reasons.KEYS_UNVERIFIED}


@pytest.mark.parametrize("kind", PHASES)
def test_a_member_that_answers_twice_counts_once(
    kind: type[Request], five: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    class Twice(WiredMembers):
        def ask(self, requests: Any, timeout_s: float) -> Any:
            for name, reply in super().ask(requests, timeout_s):
                yield name, reply
                if name == A and self.asked[-1][1] is kind:
                    yield name, reply

    collected = collect(five, Twice(five))
    assert is_the_plain_sum(five, collected, FIVE)
    assert dict(collected.refused) == {}
    assert told(caplog.records, LOG, f"alder left: {reasons.PHASE_WRONG}")


@pytest.mark.parametrize(("kind", "next_kind"), itertools.pairwise(PHASES))
def test_an_answer_after_the_deadline_is_not_taken(
    kind: type[Request], next_kind: type[Request], seven: Federation
) -> None:
    """It arrives with the answers to the next question, of which it is none."""
    members = WiredMembers(seven)

    def answer(name: str, request: Request, ask: Ask) -> Reply:
        if name != B or type(request) is not kind:
            return ask(request)
        members.late[next_kind] = [(B, ask(request))]
        return Refused(TIMED_OUT)

    members.answer = answer
    collected = collect(seven, members)
    assert not members.late
    assert is_the_plain_sum(seven, collected, NAMES if kind is Survivors else (A, *NAMES[2:]))
    assert collected.attempts == 1


def test_an_answer_of_the_attempt_before_is_not_taken(five: Federation) -> None:
    """The masked input of an attempt that failed comes when the next one waits for masked inputs."""
    kept: list[Reply] = []

    def answer(name: str, request: Request, ask: Ask) -> Reply:
        reply = ask(request)
        if name == E and isinstance(reply, MaskedInput):
            kept.append(reply)
            return kept[0] if len(kept) > 1 else reply
        return reply

    collected = collect(five, both(answer, who_falls("silent", Inbox, A, B, attempts=1)))
    assert is_the_plain_sum(five, collected, ABCD)
    assert dict(collected.refused) == {E: reasons.ATTEMPT_UNKNOWN}
    assert collected.attempts == 2


def test_what_cannot_be_read_is_malformed() -> None:
    """What FlowerMembers makes of these; a vector of another type never reaches the sum."""
    for wire in (
        Wire("MaskedInput", '{"plan": "x"}', {"array": np.zeros(3, np.int32)}),
        Wire("MaskedInput", '{"plan": "x"}', {"array": np.zeros((3, 1), np.uint32)}),
        Wire("MaskedInput", '{"plan": "x"}', {}),
        Wire("Consent", '{"plan": "x", "signature": "*"}'),
        Wire("Revealed", '{"plan": "x", "shares": {"alder": 3}}'),
    ):
        with pytest.raises(Exception, match=MALFORMED):
            from_wire(wire)
