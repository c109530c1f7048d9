"""False inboxes: shares and pair seeds that were forged, altered, misdirected, replayed or sealed wrongly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from common.secagg import reasons, shamir
from common.secagg.attempt import key_list_digest
from common.secagg.messages import Inbox, Sealed
from common.secagg.sealing import OVERHEAD, seal
from tests.client.secure.attacks import by_member, delivered, forged, sealed_shares, with_sealed
from tests.client.secure.conftest import A, Attack, B, C, D, ends_the_attempt
from tests.federations import Coordinator, Federation


def sealed_pair(coordinator: Coordinator, sender: str, recipient: str, content: bytes) -> bytes:
    assert coordinator.list is not None
    attempt = coordinator.plan.attempt
    info = attempt.pair_info(key_list_digest(attempt, coordinator.list.keys), sender, recipient)
    return seal(content, coordinator.list.keys[recipient].mask_key, info)


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def edited(sender: str, **changes: Callable[[Sealed], bytes]) -> Callable[[Federation, Coordinator, Inbox], Inbox]:
    """The coordinator changes what travels, and leaves the signature as it is."""
    return lambda federation, coordinator, box: with_sealed(
        box,
        **{sender: replace(box.sealed[sender], **{part: edit(box.sealed[sender]) for part, edit in changes.items()})},
    )


def replayed_sealed(federation: Federation) -> Attack:
    """An honest ciphertext with its honest signature, from the attempt before."""
    old = federation.coordinator().shares()[A].sealed[B]
    coordinator = federation.coordinator(federation.plan(2))
    return coordinator, A, with_sealed(coordinator.shares()[A], **{B: old})


def to_itself(federation: Federation, coordinator: Coordinator, box: Inbox) -> Inbox:
    """What a second process with alder's identity would have sealed for alder."""
    assert coordinator.list is not None
    attempt, shares = coordinator.plan.attempt, sealed_shares(coordinator, A, A, bytes(2 * shamir.SHARE_BYTES))
    said = attempt.sealed_statement(key_list_digest(attempt, coordinator.list.keys), A, A, shares, b"")
    return with_sealed(box, **{A: Sealed(shares, b"", federation.identities[A].sign(said))})


INBOXES = [
    pytest.param(delivered(A, to_itself), reasons.SHARES_UNVERIFIED, id="from the member itself, and signed"),
    pytest.param(delivered(A, forged("nobody")), reasons.SHARES_UNVERIFIED, id="forged, under the old signature"),
    pytest.param(delivered(A, forged("outsider")), reasons.SHARES_UNVERIFIED, id="forged, signed by an outsider"),
    pytest.param(delivered(A, forged(D)), reasons.SHARES_UNVERIFIED, id="forged, signed by another member"),
    pytest.param(
        delivered(A, edited(B, shares=lambda s: flipped(s.shares))), reasons.SHARES_UNVERIFIED, id="shares altered"
    ),
    pytest.param(
        delivered(A, edited(B, shares=lambda s: s.shares[:-1])), reasons.SHARES_UNVERIFIED, id="shares cut short"
    ),
    pytest.param(delivered(A, edited(B, shares=lambda s: b"")), reasons.SHARES_UNVERIFIED, id="no shares"),
    pytest.param(
        delivered(D, edited(B, pair=lambda s: flipped(s.pair))), reasons.SHARES_UNVERIFIED, id="pair seed altered"
    ),
    pytest.param(delivered(D, edited(B, pair=lambda s: b"")), reasons.SHARES_UNVERIFIED, id="pair seed missing"),
    pytest.param(
        delivered(A, edited(B, pair=lambda s: s.shares)), reasons.SHARES_UNVERIFIED, id="a pair seed too many"
    ),
    pytest.param(
        delivered(A, edited(B, signature=lambda s: s.signature[:-1])),
        reasons.SHARES_UNVERIFIED,
        id="signature cut short",
    ),
    pytest.param(
        delivered(A, lambda f, c, box: with_sealed(box, **{B: box.sealed[C], C: box.sealed[B]})),
        reasons.SHARES_UNVERIFIED,
        id="two senders swapped",
    ),
    pytest.param(
        delivered(A, lambda f, c, box: with_sealed(box, **{B: c.boxes[C].sealed[B]})),
        reasons.SHARES_UNVERIFIED,
        id="meant for another recipient",
    ),
    pytest.param(
        delivered(A, lambda f, c, box: with_sealed(box, **{A: c.boxes[B].sealed[A]})),
        reasons.SHARES_UNVERIFIED,
        id="from the member itself",
    ),
    pytest.param(
        delivered(A, lambda f, c, box: with_sealed(box, mallory=box.sealed[B])),
        reasons.SHARES_UNVERIFIED,
        id="from a stranger",
    ),
    pytest.param(replayed_sealed, reasons.SHARES_UNVERIFIED, id="replayed from an earlier attempt"),
    pytest.param(
        delivered(A, lambda f, c, box: replace(box, sealed={B: box.sealed[B]})),
        reasons.TOO_FEW_LEFT,
        id="from one only",
    ),
    pytest.param(
        delivered(A, by_member(D, A, shares=lambda c, s: bytes(len(s.shares)))),
        reasons.SHARES_UNREADABLE,
        id="a member sealed nothing",
    ),
    pytest.param(
        delivered(A, by_member(D, A, shares=lambda c, s: s.shares[: OVERHEAD - 1])),
        reasons.SHARES_UNREADABLE,
        id="a member cut its shares short",
    ),
    pytest.param(
        delivered(A, by_member(D, A, shares=lambda c, s: sealed_shares(c, D, B, bytes(132)))),
        reasons.SHARES_UNREADABLE,
        id="a member sealed to another's key",
    ),
    pytest.param(
        delivered(A, by_member(D, A, shares=lambda c, s: sealed_shares(c, D, A, bytes(131)))),
        reasons.SHARES_UNREADABLE,
        id="a member sealed a share too short",
    ),
    pytest.param(
        delivered(D, by_member(A, D, pair=lambda c, s: sealed_pair(c, A, D, bytes(31)))),
        reasons.SHARES_UNREADABLE,
        id="a member sealed a seed too short",
    ),
    pytest.param(
        delivered(D, by_member(A, D, pair=lambda c, s: sealed_pair(c, A, D, bytes(33)))),
        reasons.SHARES_UNREADABLE,
        id="a member sealed a seed too long",
    ),
    pytest.param(
        delivered(A, by_member(D, A, shares=lambda c, s: sealed_shares(c, D, A, bytes(133)))),
        reasons.SHARES_UNREADABLE,
        id="a member sealed a share too long",
    ),
    pytest.param(
        delivered(D, by_member(A, D, pair=lambda c, s: flipped(s.pair))),
        reasons.SHARES_UNREADABLE,
        id="a member sealed a seed that cannot be opened",
    ),
    pytest.param(
        delivered(A, by_member(D, A, pair=lambda c, s: sealed_pair(c, D, A, bytes(32)))),
        reasons.SHARES_UNVERIFIED,
        id="a member chose a seed that is not its to choose",
    ),
]


@pytest.mark.parametrize(("attack", "reason"), INBOXES)
def test_a_false_inbox_ends_the_attempt(
    attack: Callable[[Federation], Attack], reason: str, routed: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    ends_the_attempt(routed, attack(routed), reason, caplog)
