"""False lists of keys: swapped, replayed, made up, signed by the wrong one, or another list for each member."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from common.messages import Plan, Refused
from common.secagg import reasons
from common.secagg.identity import Identity
from common.secagg.messages import Inbox, KeyList, Keys, Shares
from tests.client.secure.attacks import lied_about, made_by, outsider, with_keys
from tests.client.secure.conftest import ABC, A, Attack, B, C, D, ends_the_attempt
from tests.federations import Federation, adapter_of


def signed(federation: Federation, plan: Plan, name: str, keys: Keys, **changes: Any) -> Keys:
    """`keys`, changed, under the signature of the member `name`, who colludes."""
    unsigned = replace(keys, plan=plan.digest(), **changes)
    return replace(unsigned, signature=federation.identities[name].sign(plan.attempt.keys_statement(name, unsigned)))


def swapped_keys(federation: Federation, plan: Plan, key_list: KeyList) -> KeyList:
    return with_keys(key_list, **{B: key_list.keys[C], C: key_list.keys[B]})


def colluding_signer(federation: Federation, plan: Plan, key_list: KeyList) -> KeyList:
    """Keys of birch that dogwood, who is on the roster, signed."""
    unsigned = made_by(Identity.generate(B), federation, plan)
    statement = plan.attempt.keys_statement(B, unsigned)
    return with_keys(key_list, **{B: replace(unsigned, signature=federation.identities[D].sign(statement))})


def stranger(federation: Federation, plan: Plan, key_list: KeyList) -> KeyList:
    mallory = Identity.generate("mallory")
    keys = Keys(plan.digest(), bytes(1216), bytes(1216), bytes(32), b"")
    statement = plan.attempt.keys_statement("mallory", keys)
    return with_keys(key_list, mallory=replace(keys, signature=mallory.sign(statement)))


def changed_part(part: str) -> Callable[[Federation, Plan, KeyList], KeyList]:
    """The coordinator's own key, or a bit of its own, in place of one part of birch's, whose signature stays."""

    def change(federation: Federation, plan: Plan, key_list: KeyList) -> KeyList:
        mine = made_by(Identity.generate("coordinator"), federation, plan)
        return with_keys(key_list, **{B: replace(key_list.keys[B], **{part: getattr(mine, part)})})

    return change


def own(change: Callable[[Federation, Plan, Keys], Keys]) -> Callable[[Federation, Plan, KeyList], KeyList]:
    return lambda federation, plan, key_list: with_keys(key_list, **{A: change(federation, plan, key_list.keys[A])})


def same_key_twice(part: str, source: str) -> Callable[[Federation, Plan, KeyList], KeyList]:
    """Dogwood, who colludes, signs what is cedar's as its own."""

    def change(federation: Federation, plan: Plan, key_list: KeyList) -> KeyList:
        copied = {part: getattr(key_list.keys[C], source)}
        return with_keys(key_list, **{D: signed(federation, plan, D, key_list.keys[D], **copied)})

    return change


def invalid_key(part: str, key: bytes) -> Callable[[Federation, Plan, KeyList], KeyList]:
    """Dogwood signs something that is no key at all."""
    return lambda federation, plan, key_list: with_keys(
        key_list, **{D: signed(federation, plan, D, key_list.keys[D], **{part: key})}
    )


def of_another_attempt(relabelled: bool, **changes: Any) -> Callable[[Federation], Attack]:
    """Birch's honest keys of an earlier attempt; `relabelled`: under the name of the plan that is under way."""

    def attack(federation: Federation) -> Attack:
        before = federation.coordinator(federation.plan(1, **changes))
        replayed = before.keys().keys[B]
        coordinator = federation.coordinator(federation.plan(2, adapter=adapter_of(3)))
        if relabelled:
            replayed = replace(replayed, plan=coordinator.plan.digest())
        return coordinator, A, with_keys(coordinator.keys(), **{B: replayed})

    return attack


def uninvited(federation: Federation) -> Attack:
    """Dogwood is on the roster, but not in this cohort; it colludes, and signs keys all the same."""
    coordinator = federation.coordinator(federation.plan(cohort=ABC, first=4))
    keys = made_by(federation.identities[D], federation, coordinator.plan)
    return coordinator, A, with_keys(coordinator.keys(), **{D: keys})


KEY_LISTS = [
    pytest.param(uninvited, reasons.KEYS_UNVERIFIED, id="an entry of a member that was not invited"),
    pytest.param(lied_about(swapped_keys), reasons.KEYS_UNVERIFIED, id="two members' keys swapped"),
    pytest.param(lied_about(outsider), reasons.KEYS_UNVERIFIED, id="signed by an outsider"),
    pytest.param(lied_about(colluding_signer), reasons.KEYS_UNVERIFIED, id="signed by another member"),
    pytest.param(lied_about(stranger), reasons.KEYS_UNVERIFIED, id="an entry of nobody in the cohort"),
    *[
        pytest.param(lied_about(changed_part(part)), reasons.KEYS_UNVERIFIED, id=f"{part} replaced")
        for part in ("share_key", "mask_key", "commitment", "signature")
    ],
    pytest.param(
        lied_about(lambda f, p, k: with_keys(k, **{B: replace(k.keys[B], signature=k.keys[B].signature[:-1])})),
        reasons.KEYS_UNVERIFIED,
        id="signature cut short",
    ),
    pytest.param(
        lied_about(lambda f, p, k: with_keys(k, **{B: replace(k.keys[B], plan="0" * 64)})),
        reasons.KEYS_UNVERIFIED,
        id="an entry that names another plan",
    ),
    pytest.param(
        lied_about(own(lambda f, p, k: made_by(f.identities[B], f, p))),
        reasons.KEYS_UNVERIFIED,
        id="another's keys under the member's own name",
    ),
    pytest.param(
        lied_about(own(lambda f, p, k: made_by(f.identities[A], f, p))),
        reasons.KEYS_UNVERIFIED,
        id="keys that the member signed, but not in this process",
    ),
    pytest.param(
        lied_about(lambda f, p, k: replace(k, keys={n: e for n, e in k.keys.items() if n != A})),
        reasons.KEYS_UNVERIFIED,
        id="without the member's own",
    ),
    pytest.param(
        lied_about(same_key_twice("share_key", "share_key")), reasons.KEYS_UNVERIFIED, id="one share key twice"
    ),
    pytest.param(lied_about(same_key_twice("mask_key", "mask_key")), reasons.KEYS_UNVERIFIED, id="one mask key twice"),
    pytest.param(
        lied_about(same_key_twice("share_key", "mask_key")), reasons.KEYS_UNVERIFIED, id="a mask key as a share key"
    ),
    pytest.param(
        lied_about(same_key_twice("commitment", "commitment")), reasons.KEYS_UNVERIFIED, id="one commitment twice"
    ),
    pytest.param(lied_about(invalid_key("share_key", b"")), reasons.KEYS_UNVERIFIED, id="no share key"),
    pytest.param(lied_about(invalid_key("share_key", b"\xff" * 1216)), reasons.KEYS_UNVERIFIED, id="an invalid key"),
    pytest.param(lied_about(invalid_key("mask_key", bytes(1216))), reasons.KEYS_UNVERIFIED, id="a key of zeros"),
    pytest.param(
        lied_about(lambda f, p, k: replace(k, keys={n: k.keys[n] for n in (A, B)})),
        reasons.TOO_FEW_LEFT,
        id="two keys only",
    ),
    pytest.param(of_another_attempt(False), reasons.KEYS_UNVERIFIED, id="replayed from an earlier attempt"),
    pytest.param(of_another_attempt(True), reasons.KEYS_UNVERIFIED, id="replayed and relabelled"),
    pytest.param(of_another_attempt(True, run="other-run"), reasons.KEYS_UNVERIFIED, id="replayed from another run"),
    pytest.param(of_another_attempt(True, round=2), reasons.KEYS_UNVERIFIED, id="replayed from another round"),
]


@pytest.mark.parametrize(("attack", "reason"), KEY_LISTS)
def test_a_false_list_of_keys_ends_the_attempt(
    attack: Callable[[Federation], Attack], reason: str, routed: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    ends_the_attempt(routed, attack(routed), reason, caplog)


def test_two_lists_of_keys_shown_to_two_members_do_not_meet(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    """Dogwood colludes and signs two sets of keys, so both lists are valid; what was sealed under one is not under the
    other.
    """
    coordinator = federation.coordinator()
    one = coordinator.keys()
    other = with_keys(one, **{D: made_by(federation.identities[D], federation, coordinator.plan)})
    assert isinstance(federation.ask(A, one), Shares)
    to_alder = {}
    for name in (B, C):
        answer = federation.ask(name, other)
        assert isinstance(answer, Shares)
        to_alder[name] = answer.sealed[A]
    lie = Inbox(coordinator.plan.digest(), to_alder)
    ends_the_attempt(federation, (coordinator, A, lie), reasons.SHARES_UNVERIFIED, caplog)


@pytest.mark.parametrize("relabelled", [False, True])
def test_two_cohorts_shown_to_two_members_do_not_meet(
    relabelled: bool, federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    coordinator = federation.coordinator()
    other = federation.plan(cohort=ABC, first=4)
    key_list = {}
    for name, plan in ((A, coordinator.plan), (B, other), (C, other)):
        answer = federation.announce(name, plan)
        assert isinstance(answer, Keys)
        key_list[name] = replace(answer, plan=coordinator.plan.digest()) if relabelled else answer
    lie = KeyList(coordinator.plan.digest(), key_list)
    ends_the_attempt(federation, (coordinator, A, lie), reasons.KEYS_UNVERIFIED, caplog)


def test_a_list_of_keys_for_another_plan_is_of_no_attempt_and_changes_nothing(routed: Federation) -> None:
    coordinator = routed.coordinator()
    key_list = coordinator.keys()
    assert routed.ask(A, replace(key_list, plan="0" * 64)) == Refused(reasons.ATTEMPT_UNKNOWN, A)
    assert isinstance(routed.ask(A, key_list), Shares)
