"""A coordinator who shows different things to different members, with one member on its side, tried exhaustively.

Of four members one is corrupt, T = 1. Every honest member may be shown any list of keys (of all or of some, with one
or the other of two sets of keys of the corrupt member), then any inbox, then any survivor set; the corrupt member signs
whatever helps. What the honest members reveal is collected, with all that the corrupt member holds itself. A vector is
bare when its own mask and the mask of each of its pairs can be computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import pytest

from common.errors import Refusal
from common.secagg import reasons
from common.secagg.attempt import Attempt, key_list_digest
from common.secagg.messages import Consents, Inbox, KeyList, Keys, Shares, Survivors
from common.secagg.participant import (
    Participant,
    Phase,
    restore_in_simulation,
    snapshot_for_simulation,
)
from common.secagg.shamir import SHARE_BYTES, combine, weights
from tests.common.secagg.conftest import IDENTITIES, NAMES, ROSTER, held_by, make_attempt, make_vector

COHORT = NAMES[:4]
ListId = tuple[tuple[str, ...], int]  # whose keys, and which keys of the corrupt member
SECRET_SELF, SECRET_MASK = 0, 1


def subsets(names: tuple[str, ...], least: int) -> Iterator[tuple[str, ...]]:
    for size in range(least, len(names) + 1):
        yield from itertools.combinations(names, size)


@dataclass(frozen=True)
class View:
    """All that an honest member was shown until it consents, as far as it went along."""

    keys: ListId
    inbox: tuple[str, ...]
    survivors: tuple[str, ...]


Answer = TypeVar("Answer")


def unless_refused(call: Callable[[], Answer], *allowed: str) -> Answer | None:
    """The answer; None when it is refused for one of these reasons."""
    try:
        return call()
    except Refusal as refusal:
        if refusal.reason not in allowed:
            raise
    return None


class Attack:
    """Everything that the coordinator and the corrupt member can bring about; each answer is asked for once."""

    def __init__(self, attempt: Attempt, corrupt: str) -> None:
        self.attempt = attempt
        self.corrupt = corrupt
        self.honest = tuple(name for name in COHORT if name != corrupt)
        self.vector = make_vector(attempt, 1)
        members = {name: Participant(attempt, IDENTITIES[name], ROSTER, simulated=True) for name in self.honest}
        self.start = {name: snapshot_for_simulation(member) for name, member in members.items()}
        # The corrupt member has two sets of keys, each properly its own.
        self.corrupt_start = [
            snapshot_for_simulation(Participant(attempt, IDENTITIES[corrupt], ROSTER, simulated=True)) for _ in range(2)
        ]
        self.announced = {name: member.keys() for name, member in members.items()}
        self.corrupt_keys = [self.restored(corrupt, snapshot).keys() for snapshot in self.corrupt_start]
        self.digests: dict[ListId, bytes] = {}
        self.sent: dict[tuple[str, ListId], Shares] = {}  # by sender
        self.after_keys: dict[tuple[str, ListId], str] = {}
        self.after_survivors: dict[tuple[str, View], str] = {}
        self.signature: dict[tuple[str, View], bytes] = {}
        self.given: dict[tuple[str, View, frozenset[str]], Mapping[str, bytes]] = {}
        self.shares_of_corrupt: dict[tuple[ListId, str], bytes] = {}
        self.prepare()

    def restored(self, name: str, snapshot: str) -> Participant:
        return restore_in_simulation(snapshot, self.attempt, IDENTITIES[name], ROSTER)

    def lists(self) -> list[ListId]:
        return [
            (names, version) for names in subsets(COHORT, 2) for version in ((0, 1) if self.corrupt in names else (0,))
        ]

    def keys_in(self, keys: ListId) -> dict[str, Keys]:
        names, version = keys
        return {name: self.corrupt_keys[version] if name == self.corrupt else self.announced[name] for name in names}

    def prepare(self) -> None:
        """Every honest member's answer to every list, inbox and survivor set that it accepts."""
        for keys in self.lists():
            entries = self.keys_in(keys)
            self.digests[keys] = key_list_digest(self.attempt, entries)
            for name in keys[0]:
                member = self.restored(name, self.corrupt_start[keys[1]] if name == self.corrupt else self.start[name])
                message = KeyList(self.attempt.plan, entries)
                if shares := unless_refused(lambda: member.on_key_list(message), reasons.TOO_FEW_LEFT):  # noqa: B023
                    self.sent[name, keys] = shares
                    self.after_keys[name, keys] = snapshot_for_simulation(member)
        for name, keys in [found for found in self.after_keys if found[0] != self.corrupt]:
            for senders in subsets(tuple(other for other in keys[0] if other != name), 1):
                self.take_inbox(name, keys, senders)
        for keys in self.lists():  # the corrupt member opens all that anyone sealed for it
            if (self.corrupt, keys) in self.after_keys:
                self.open_as_corrupt(keys)

    def take_inbox(self, name: str, keys: ListId, senders: tuple[str, ...]) -> None:
        inbox = Inbox(self.attempt.plan, {sender: self.sent[sender, keys].sealed[name] for sender in senders})
        member = self.restored(name, self.after_keys[name, keys])
        if unless_refused(lambda: member.on_inbox(inbox, self.vector), reasons.TOO_FEW_LEFT) is None:
            return
        waiting = snapshot_for_simulation(member)
        for survivors in subsets(COHORT, 1):
            message, asked = Survivors(self.attempt.plan, survivors), self.restored(name, waiting)
            consent = unless_refused(
                lambda: asked.on_survivors(message, lambda names: None),  # noqa: B023
                reasons.TOO_FEW_LEFT,
                reasons.SURVIVORS_UNKNOWN,
            )
            if consent is not None:
                view = View(keys, senders, survivors)
                self.signature[name, view] = consent.signature
                self.after_survivors[name, view] = snapshot_for_simulation(asked)

    def open_as_corrupt(self, keys: ListId) -> None:
        member = self.restored(self.corrupt, self.after_keys[self.corrupt, keys])
        sealed = {name: self.sent[name, keys].sealed[self.corrupt] for name in keys[0] if name != self.corrupt}
        member.on_inbox(Inbox(self.attempt.plan, sealed), self.vector)
        for name, both in held_by(snapshot_for_simulation(member)).shares.items():
            self.shares_of_corrupt[keys, name] = both

    def views(self, name: str) -> list[View]:
        return [view for who, view in self.after_survivors if who == name]

    def consent_of_corrupt(self, view: View) -> bytes:
        statement = self.attempt.survivors_statement(self.digests[view.keys], view.survivors)
        return IDENTITIES[self.corrupt].sign(statement)

    def reveal(self, name: str, view: View, signers: frozenset[str]) -> Mapping[str, bytes]:
        """What `name` reveals when it is shown the consents of these; nothing when it refuses."""
        if (name, view, signers) not in self.given:
            signatures = {
                other: self.consent_of_corrupt(view) if other == self.corrupt else self.consent_to(other, view)
                for other in sorted(signers)
            }
            member = self.restored(name, self.after_survivors[name, view])
            assert member.phase is Phase.CONSENTS
            message = Consents(self.attempt.plan, signatures)
            revealed = unless_refused(lambda: member.on_consents(message), reasons.SIGNATURES_UNVERIFIED)
            found = {} if revealed is None else revealed.shares
            self.given[name, view, signers] = found
        return self.given[name, view, signers]

    def consent_to(self, name: str, view: View) -> bytes:
        """A signature says nothing of an inbox, so any view with that list and set has it."""
        for (who, other), signature in self.signature.items():
            if who == name and (other.keys, other.survivors) == (view.keys, view.survivors):
                return signature
        raise KeyError(name)

    def scenarios(self) -> Iterator[dict[str, View]]:
        """Everything that the honest members can be shown together; a sender seals under one list only."""
        choices = [[None, *self.views(name)] for name in self.honest]
        for shown in itertools.product(*choices):
            found = {name: view for name, view in zip(self.honest, shown, strict=True) if view is not None}
            if all(
                sender == self.corrupt or sender not in found or found[sender].keys == view.keys
                for view in found.values()
                for sender in view.inbox
            ):
                yield found

    def learnt(self, shown: Mapping[str, View]) -> set[tuple[str, int, ListId]]:
        """Which secrets can be reconstructed: whose, which of the two, and from shares under which list."""
        held: dict[tuple[str, int, ListId], dict[str, bytes]] = {}
        for name, view in shown.items():
            signers = frozenset(
                other
                for other, seen in shown.items()
                if (seen.keys, seen.survivors) == (view.keys, view.survivors) and other in view.survivors
            ) | ({self.corrupt} & set(view.survivors))
            for other, share in self.reveal(name, view, signers).items():
                which = SECRET_SELF if other in view.survivors else SECRET_MASK
                held.setdefault((other, which, view.keys), {})[name] = share
        for (keys, name), both in self.shares_of_corrupt.items():
            if name in shown and shown[name].keys != keys:
                continue  # that member sealed under another list
            held.setdefault((name, SECRET_SELF, keys), {})[self.corrupt] = both[:SHARE_BYTES]
            held.setdefault((name, SECRET_MASK, keys), {})[self.corrupt] = both[SHARE_BYTES:]
        return {found for found, shares in held.items() if self.opens(found, shares)}

    def opens(self, found: tuple[str, int, ListId], shares: Mapping[str, bytes]) -> bool:
        """By trying: whether these shares give the secret that `name` really has."""
        name, which, _ = found
        if name == self.corrupt or len(shares) < self.attempt.terms.threshold:
            return False
        real = held_by(self.start[name])
        secret = combine(weights([self.attempt.point(revealer) for revealer in shares]), list(shares.values()))
        assert secret == (real.mask_seed if which else real.self_seed)
        return True

    def bare(self, victim: str, shown: Mapping[str, View]) -> bool:
        """Whether every mask on the victim's vector can be computed."""
        learnt = self.learnt(shown)
        known_masks = {name for name, which, _ in learnt if which == SECRET_MASK} | {self.corrupt}
        own = any(found[:2] == (victim, SECRET_SELF) for found in learnt)
        pairs = all(victim in known_masks or other in known_masks for other in shown[victim].inbox)
        return own and pairs


CORRUPT = (COHORT[0], COHORT[2], COHORT[3])  # seeds of pairs come from the lower name


@pytest.mark.parametrize("corrupt", CORRUPT)
def test_no_two_views_together_bare_a_vector(corrupt: str) -> None:
    attack = Attack(make_attempt(COHORT), corrupt)
    tried, revealed = 0, 0
    for shown in attack.scenarios():
        tried += 1
        learnt = attack.learnt(shown)
        revealed += bool(learnt)
        assert not any(attack.bare(victim, shown) for victim in shown)
        # More than that: never both secrets of one name, whatever list they were shared under.
        assert not {n for n, which, _ in learnt if which == SECRET_SELF} & {
            n for n, which, _ in learnt if which == SECRET_MASK
        }
    assert tried > 1000
    assert revealed > 20  # honest members do reveal, where they agree


@pytest.mark.parametrize("corrupt", CORRUPT)
def test_the_same_attack_succeeds_where_t_is_too_small(corrupt: str) -> None:
    """So the search can find something: with t = 2 of four, two disjoint pairs of signers each open their own set."""
    attempt = make_attempt(COHORT)
    weak = replace(attempt.terms)
    object.__setattr__(weak, "threshold", 2)  # `Terms` refuses it
    attack = Attack(replace(attempt, terms=weak), corrupt)
    assert any(attack.bare(victim, shown) for shown in attack.scenarios() for victim in shown)


def test_a_member_signs_for_one_list_of_keys_only() -> None:
    """Consents of members who were shown different lists do not count together."""
    attack = Attack(make_attempt(COHORT), COHORT[3])
    lists = [(COHORT, 0), (COHORT, 1)]
    signatures = [{name: attack.consent_to(name, View(keys, (), COHORT)) for name in attack.honest} for keys in lists]
    assert not set(signatures[0].values()) & set(signatures[1].values())
    name = attack.honest[0]
    view = next(view for view in attack.views(name) if (view.keys, view.survivors) == (lists[0], COHORT))
    member = attack.restored(name, attack.after_survivors[name, view])
    mixed = {**signatures[0], attack.honest[1]: signatures[1][attack.honest[1]]}
    with pytest.raises(Refusal) as caught:
        member.on_consents(Consents(attack.attempt.plan, mixed))
    assert caught.value.reason == reasons.SIGNATURES_UNVERIFIED
