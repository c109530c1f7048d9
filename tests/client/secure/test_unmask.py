"""Unmasking: only with t signatures on the very set, only once, and one of the two secrets of each name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from common.messages import Refused
from common.secagg import reasons
from common.secagg.messages import Consents, Revealed, Survivors
from tests.client.secure.attacks import by_an_outsider, consents, statement, with_signature
from tests.client.secure.conftest import (
    ABC,
    ABCD,
    A,
    Attack,
    B,
    C,
    D,
    Halves,
    ends_the_attempt,
    gives_nothing_more,
)
from tests.federations import Federation, told


def replayed_consent(federation: Federation) -> Attack:
    """Honest signatures on the same set, of the attempt before."""
    old = federation.coordinator().consents().signatures[B]
    coordinator = federation.coordinator(federation.plan(2))
    return coordinator, A, with_signature(coordinator.consents(), B, old)


CONSENTS = [
    pytest.param(
        consents(lambda f, c, h: replace(h, signatures={})), reasons.SIGNATURES_UNVERIFIED, id="no signatures"
    ),
    pytest.param(
        consents(lambda f, c, h: replace(h, signatures={n: h.signatures[n] for n in (A, B)})),
        reasons.SIGNATURES_UNVERIFIED,
        id="fewer than t",
    ),
    pytest.param(
        consents(lambda f, c, h: with_signature(h, C, h.signatures[B])),
        reasons.SIGNATURES_UNVERIFIED,
        id="one signature under two names",
    ),
    pytest.param(
        consents(lambda f, c, h: with_signature(h, "mallory", h.signatures[B])),
        reasons.SIGNATURES_UNVERIFIED,
        id="padded with a stranger",
    ),
    pytest.param(
        consents(lambda f, c, h: with_signature(h, D, f.identities[D].sign(statement(c, ABC)))),
        reasons.SIGNATURES_UNVERIFIED,
        id="with one who is no survivor",
    ),
    pytest.param(consents(by_an_outsider), reasons.SIGNATURES_UNVERIFIED, id="by an outsider"),
    pytest.param(
        consents(lambda f, c, h: with_signature(h, B, f.identities[B].sign(statement(c, ABCD)))),
        reasons.SIGNATURES_UNVERIFIED,
        id="a member signed another set",
    ),
    pytest.param(
        consents(lambda f, c, h: with_signature(h, B, h.signatures[B][:-1])),
        reasons.SIGNATURES_UNVERIFIED,
        id="cut short",
    ),
    pytest.param(replayed_consent, reasons.SIGNATURES_UNVERIFIED, id="an old signature"),
]


@pytest.mark.parametrize(("attack", "reason"), CONSENTS)
def test_without_t_signatures_on_the_very_set_nothing_is_revealed(
    attack: Callable[[Federation], Attack], reason: str, routed: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    ends_the_attempt(routed, attack(routed), reason, caplog)


def test_one_request_reveals_one_of_the_two_secrets_of_each_name(routed: Federation) -> None:
    coordinator = routed.coordinator()
    coordinator.masked(without=(C,))
    signatures = coordinator.consents()
    held = Halves.of(routed.member(A))
    answer = routed.ask(A, signatures)
    assert isinstance(answer, Revealed)
    assert answer.shares == {name: held.of_self_seed[name] for name in (A, B, D)} | {C: held.of_mask_seed[C]}


def test_a_second_request_reveals_nothing(routed: Federation, caplog: pytest.LogCaptureFixture) -> None:
    """Whether it is the same request or one for another set, with signatures of that set or without."""
    coordinator = routed.coordinator()
    signatures = coordinator.consents()
    assert isinstance(routed.ask(A, signatures), Revealed)
    caplog.clear()
    digest = coordinator.plan.digest()
    others = {name: routed.identities[name].sign(statement(coordinator, ABC)) for name in ABC}
    for request in (signatures, Survivors(digest, ABC), Consents(digest, others)):
        assert routed.ask(A, request) == Refused(reasons.ATTEMPT_OVER, A)
    assert told(caplog.records, f"silotune.client.{A}", reasons.ATTEMPT_OVER)
    gives_nothing_more(routed, coordinator, A)
