"""What a coordinator, alone or with a colluding member, puts in place of an honest list, inbox, set or consent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from common.messages import Plan
from common.secagg import shamir
from common.secagg.attempt import key_list_digest
from common.secagg.identity import Identity
from common.secagg.messages import Consents, Inbox, KeyList, Keys, Sealed, Survivors
from common.secagg.participant import Participant
from common.secagg.sealing import seal
from tests.client.secure.conftest import ABC, A, Attack, B, D
from tests.federations import Coordinator, Federation


def lied_about(change: Callable[[Federation, Plan, KeyList], KeyList]) -> Callable[[Federation], Attack]:
    """An attack with a list of keys that `change` makes of the honest one."""

    def attack(federation: Federation) -> Attack:
        coordinator = federation.coordinator()
        return coordinator, A, change(federation, coordinator.plan, coordinator.keys())

    return attack


def with_keys(key_list: KeyList, **keys: Keys) -> KeyList:
    return replace(key_list, keys={**key_list.keys, **keys})


def made_by(identity: Identity, federation: Federation, plan: Plan) -> Keys:
    """Keys that anybody with that identity can make for an attempt."""
    return Participant(plan.attempt, identity, federation.roster).keys()


def outsider(federation: Federation, plan: Plan, key_list: KeyList) -> KeyList:
    return with_keys(key_list, **{B: made_by(Identity.generate(B), federation, plan)})


def delivered(victim: str, change: Callable[[Federation, Coordinator, Inbox], Inbox]) -> Callable[[Federation], Attack]:
    """An attack with an inbox that `change` makes of the victim's honest one."""

    def attack(federation: Federation) -> Attack:
        coordinator = federation.coordinator()
        return coordinator, victim, change(federation, coordinator, coordinator.shares()[victim])

    return attack


def with_sealed(box: Inbox, **sealed: Sealed) -> Inbox:
    return replace(box, sealed={**box.sealed, **sealed})


def resealed(
    federation: Federation,
    coordinator: Coordinator,
    sender: str,
    recipient: str,
    signer: Identity | None = None,
    shares: bytes | None = None,
    pair: bytes | None = None,
) -> Sealed:
    """What `sender` sealed for `recipient`, with other contents, signed by `signer` or by itself, if it colludes."""
    assert coordinator.list is not None
    attempt = coordinator.plan.attempt
    digest = key_list_digest(attempt, coordinator.list.keys)
    honest = coordinator.boxes[recipient].sealed[sender]
    shares = honest.shares if shares is None else shares
    pair = honest.pair if pair is None else pair
    statement = attempt.sealed_statement(digest, sender, recipient, shares, pair)
    return Sealed(shares, pair, (signer or federation.identities[sender]).sign(statement))


def sealed_shares(coordinator: Coordinator, sender: str, recipient: str, content: bytes) -> bytes:
    """Anybody can encrypt to a public key, with the right info too: all of it is public."""
    assert coordinator.list is not None
    attempt = coordinator.plan.attempt
    info = attempt.shares_info(key_list_digest(attempt, coordinator.list.keys), sender, recipient)
    return seal(content, coordinator.list.keys[recipient].share_key, info)


def forged(signer: str) -> Callable[[Federation, Coordinator, Inbox], Inbox]:
    """A whole new ciphertext in birch's name, signed by an outsider, by dogwood, or with birch's old signature."""

    def change(federation: Federation, coordinator: Coordinator, box: Inbox) -> Inbox:
        shares = sealed_shares(coordinator, B, A, bytes(2 * shamir.SHARE_BYTES))
        if signer == "nobody":
            return with_sealed(box, **{B: replace(box.sealed[B], shares=shares)})
        identity = federation.identities[D] if signer == D else Identity.generate(B)
        return with_sealed(box, **{B: resealed(federation, coordinator, B, A, identity, shares=shares)})

    return change


def by_member(
    sender: str, recipient: str, **content: Callable[[Coordinator, Sealed], bytes]
) -> Callable[[Federation, Coordinator, Inbox], Inbox]:
    """A colluding member signs what it should not have sealed."""

    def change(federation: Federation, coordinator: Coordinator, box: Inbox) -> Inbox:
        parts = {part: make(coordinator, box.sealed[sender]) for part, make in content.items()}
        return with_sealed(box, **{sender: resealed(federation, coordinator, sender, recipient, **parts)})

    return change


def survivors(*names: str) -> Callable[[Federation], Attack]:
    def attack(federation: Federation) -> Attack:
        coordinator = federation.coordinator()
        coordinator.masked()
        return coordinator, A, Survivors(coordinator.plan.digest(), names)

    return attack


def consents(change: Callable[[Federation, Coordinator, Consents], Consents]) -> Callable[[Federation], Attack]:
    def attack(federation: Federation) -> Attack:
        coordinator = federation.coordinator()
        coordinator.masked(without=(D,))
        return coordinator, A, change(federation, coordinator, coordinator.consents())

    return attack


def with_signature(consents: Consents, name: str, signature: bytes) -> Consents:
    return replace(consents, signatures={**consents.signatures, name: signature})


def statement(coordinator: Coordinator, names: tuple[str, ...]) -> bytes:
    """What survivors sign."""
    assert coordinator.list is not None
    attempt = coordinator.plan.attempt
    return attempt.survivors_statement(key_list_digest(attempt, coordinator.list.keys), names)


def by_an_outsider(federation: Federation, coordinator: Coordinator, honest: Consents) -> Consents:
    return with_signature(honest, B, Identity.generate(B).sign(statement(coordinator, ABC)))
