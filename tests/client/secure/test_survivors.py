"""Survivor sets that cannot be meant, a second one, and one for each member: none of them is signed or opened."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from common.messages import Refused
from common.secagg import reasons
from common.secagg.messages import Consent, Consents, Inbox, Survivors
from tests.client.secure.attacks import survivors
from tests.client.secure.conftest import ABC, ABCD, A, Attack, B, C, D, consented, ends_the_attempt
from tests.federations import Federation


def without_shares(federation: Federation) -> Attack:
    """Dogwood announced keys but gave no shares, so its mask could never be taken off."""
    coordinator = federation.coordinator()
    coordinator.shares(without=(D,))
    coordinator.masked()
    return coordinator, A, Survivors(coordinator.plan.digest(), ABCD)


def with_two_inboxes(federation: Federation) -> Attack:
    """Alder was shown an inbox without birch, so it put no mask on for the pair."""
    coordinator = federation.coordinator()
    boxes = coordinator.shares()
    boxes[A] = Inbox(boxes[A].plan, {name: boxes[A].sealed[name] for name in (C, D)})
    coordinator.masked()
    return coordinator, A, Survivors(coordinator.plan.digest(), ABCD)


SURVIVORS = [
    pytest.param(survivors(B, C, D), reasons.SURVIVORS_UNKNOWN, id="without the member"),
    pytest.param(survivors(A, B, C, "mallory"), reasons.SURVIVORS_UNKNOWN, id="with a stranger"),
    pytest.param(survivors(A, B, B, C), reasons.SURVIVORS_UNKNOWN, id="a name twice"),
    pytest.param(survivors(B, A, C), reasons.SURVIVORS_UNKNOWN, id="out of order"),
    pytest.param(survivors(), reasons.SURVIVORS_UNKNOWN, id="nobody"),
    pytest.param(survivors(A), reasons.TOO_FEW_LEFT, id="the member alone"),
    pytest.param(survivors(A, B), reasons.TOO_FEW_LEFT, id="two of them"),
    pytest.param(without_shares, reasons.SURVIVORS_UNKNOWN, id="with one who gave no shares"),
    pytest.param(with_two_inboxes, reasons.SURVIVORS_UNKNOWN, id="with one whom its inbox did not have"),
]


@pytest.mark.parametrize(("attack", "reason"), SURVIVORS)
def test_a_survivor_set_that_cannot_be_meant_is_not_signed(
    attack: Callable[[Federation], Attack], reason: str, routed: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    ends_the_attempt(routed, attack(routed), reason, caplog)
    assert consented(routed, A) is None


def test_a_second_survivor_set_is_not_signed(routed: Federation, caplog: pytest.LogCaptureFixture) -> None:
    coordinator = routed.coordinator()
    consents = coordinator.consents()
    lie = Survivors(coordinator.plan.digest(), ABC)
    ends_the_attempt(routed, (coordinator, A, lie), reasons.PHASE_WRONG, caplog)
    assert routed.ask(A, consents) == Refused(reasons.ATTEMPT_OVER, A)  # not even the first set's sum
    assert consented(routed, A) == list(ABCD)


def test_survivor_sets_that_differ_between_members_are_opened_by_nobody(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    """Birch, cedar and dogwood are shown a set without alder; three signatures on one set cannot be collected."""
    coordinator = federation.coordinator()
    coordinator.masked()
    digest = coordinator.plan.digest()
    signatures = {}
    for name, names in ((A, ABCD), (B, ABCD), (C, (B, C, D)), (D, (B, C, D))):
        answer = federation.ask(name, Survivors(digest, names))
        assert isinstance(answer, Consent)
        signatures[name] = answer.signature
    for name in ABCD:
        lie = Consents(digest, signatures)
        ends_the_attempt(federation, (coordinator, name, lie), reasons.SIGNATURES_UNVERIFIED, caplog)
