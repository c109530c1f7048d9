"""A member against a coordinator and members who lie: what it refuses, why, and that it then keeps silent."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from common.errors import Refusal
from common.fixed_point import unpack
from common.secagg import reasons
from common.secagg.attempt import key_list_digest
from common.secagg.identity import Identity
from common.secagg.masks import add_masks
from common.secagg.messages import Consents, Inbox, KeyList, Keys, Sealed, Survivors
from common.secagg.participant import Participant, Phase, restore_in_simulation, snapshot_for_simulation, stream_key
from common.secagg.sealing import PUBLIC_BYTES, derive, seal
from common.secagg.shamir import SHARE_BYTES
from tests.common.secagg.conftest import (
    IDENTITIES,
    PHASES,
    ROSTER,
    Played,
    assert_ends,
    assert_hidden,
    assert_wiped,
    give,
    held_by,
    make_attempt,
    make_vector,
    play,
    refused,
    texts_of,
)

# In the attempt of `played`: alder and birch stand before cedar, fir after it, and elm falls silent after the shares.
VICTIM = "cedar"
LOWER, LOWEST, HIGHER, SILENT = "birch", "alder", "fir", "elm"


@pytest.fixture(scope="module", autouse=True)
def _names_are_as_said(played: Played) -> None:
    assert played.attempt.cohort == (LOWEST, LOWER, VICTIM, SILENT, HIGHER)
    assert played.survivors.names == (LOWEST, LOWER, VICTIM, HIGHER)


@pytest.fixture(scope="module")
def again() -> Played:
    """The attempt after that one: everyone's signatures are right, for another number."""
    attempt = make_attempt(5, number=2)
    return play(attempt, {name: make_vector(attempt, 0) for name in attempt.cohort}, {"elm": "masked"})


@pytest.fixture(scope="module")
def repeated() -> Played:
    """Another start of the very same attempt, with other keys: what a coordinator could have kept."""
    attempt = make_attempt(5)
    return play(attempt, {name: make_vector(attempt, 0) for name in attempt.cohort}, {"elm": "masked"})


def flipped(text: bytes, bit: int) -> bytes:
    return (int.from_bytes(text, "big") ^ 1 << bit).to_bytes(len(text), "big")


def signed(played: Played, identity: Identity, keys: Keys) -> Keys:
    """Those keys under a signature of `identity`, for this attempt."""
    unsigned = replace(keys, plan=played.attempt.plan)
    return replace(unsigned, signature=identity.sign(played.attempt.keys_statement(identity.name, unsigned)))


# --- Order ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("waits_for", PHASES, ids=lambda phase: phase.value)
@pytest.mark.parametrize("comes", PHASES, ids=lambda phase: phase.value)
def test_every_message_in_the_wrong_phase_ends_the_attempt(played: Played, waits_for: Phase, comes: Phase) -> None:
    member = played.member(VICTIM, waits_for)
    if comes is waits_for:
        played.give(member, played.message(VICTIM, comes))
        if member.phase is Phase.OVER:
            assert refused(lambda: played.give(member, played.message(VICTIM, comes))) == reasons.ATTEMPT_OVER
        else:  # the same message once more
            assert_ends(played, member, played.message(VICTIM, comes), reasons.PHASE_WRONG)
    else:
        assert_ends(played, member, played.message(VICTIM, comes), reasons.PHASE_WRONG)


@pytest.mark.parametrize("waits_for", PHASES, ids=lambda phase: phase.value)
@pytest.mark.parametrize("comes", PHASES, ids=lambda phase: phase.value)
def test_a_message_of_another_plan_changes_nothing(
    played: Played, again: Played, waits_for: Phase, comes: Phase
) -> None:
    member = played.member(VICTIM, waits_for)
    before = snapshot_for_simulation(member)
    for stranger in (again.message(VICTIM, comes), replace(played.message(VICTIM, comes), plan="")):
        assert refused(lambda stranger=stranger: played.give(member, stranger)) == reasons.ATTEMPT_UNKNOWN
        assert snapshot_for_simulation(member) == before
    played.give(member, played.message(VICTIM, waits_for))  # and it goes on


@pytest.mark.parametrize("waits_for", PHASES, ids=lambda phase: phase.value)
def test_a_member_that_is_wiped_answers_nothing_more(played: Played, waits_for: Phase) -> None:
    member = played.member(VICTIM, waits_for)
    member.wipe()
    assert_wiped(member)
    for phase in PHASES:
        assert refused(lambda phase=phase: played.give(member, played.message(VICTIM, phase))) == reasons.ATTEMPT_OVER
    assert refused(member.keys) == reasons.ATTEMPT_OVER  # they would follow from zeros, which everyone knows
    member.wipe()


def test_a_member_that_revealed_is_wiped(played: Played) -> None:
    member = played.member(VICTIM, Phase.CONSENTS)
    hidden = member._secrets
    seeds, shares = (hidden.share_seed, hidden.mask_seed, hidden.self_seed), list(hidden.shares.values())
    assert all(map(any, (*seeds, *shares)))
    assert len(member.on_consents(played.consents).shares) == len(shares) == 5
    assert_wiped(member)
    assert not any(map(any, (*seeds, *shares)))  # overwritten where they stood, not only forgotten


def test_whatever_goes_wrong_inside_a_step_ends_the_attempt(played: Played) -> None:
    member = played.member(VICTIM, Phase.INBOX)
    with pytest.raises(AttributeError):
        member.on_inbox(played.inboxes[VICTIM], None)  # type: ignore[arg-type]
    member_broken = played.member(VICTIM, Phase.INBOX)
    with pytest.raises(TypeError):
        member_broken.on_inbox(replace(played.inboxes[VICTIM], sealed=None), played.vectors[VICTIM])  # type: ignore[arg-type]
    for broken in (member, member_broken):
        assert_wiped(broken)


def test_keys_are_the_same_whenever_they_are_asked_for(played: Played) -> None:
    for phase in PHASES:
        assert played.member(VICTIM, phase).keys() == played.keys[VICTIM]


def test_keys_are_fresh_in_every_attempt_and_every_start_of_one(played: Played, repeated: Played) -> None:
    found = [*played.keys.values(), *repeated.keys.values()]
    parts = [part for keys in found for part in (keys.share_key, keys.mask_key, keys.commitment)]
    assert len(set(parts)) == 3 * len(found)


# --- Keys -----------------------------------------------------------------------------------------------------------

Changes = Callable[[Played, Played, Played], Mapping[str, Any]]


def with_keys(played: Played, **changes: Keys | None) -> KeyList:
    keys = {**played.key_list.keys, **changes}
    return KeyList(played.attempt.plan, {name: entry for name, entry in keys.items() if entry is not None})


def of_fir(played: Played, **changes: bytes) -> KeyList:
    """fir, who lies, signs keys of its choice."""
    return with_keys(played, fir=signed(played, IDENTITIES["fir"], replace(played.keys["fir"], **changes)))


KEY_LISTS: dict[str, Changes] = {
    "without its own keys": lambda p, a, r: {"cedar": None},
    "its own share key exchanged": lambda p, a, r: {
        "cedar": replace(p.keys["cedar"], share_key=r.keys["cedar"].share_key)
    },
    "its own mask key exchanged": lambda p, a, r: {
        "cedar": replace(p.keys["cedar"], mask_key=r.keys["cedar"].mask_key)
    },
    "its own commitment exchanged": lambda p, a, r: {"cedar": replace(p.keys["cedar"], commitment=bytes(32))},
    "its own signature altered": lambda p, a, r: {
        "cedar": replace(p.keys["cedar"], signature=flipped(p.keys["cedar"].signature, 0))
    },
    "its own keys from another start of this attempt": lambda p, a, r: {"cedar": r.keys["cedar"]},
    "its own keys from another attempt": lambda p, a, r: {"cedar": a.keys["cedar"]},
    "keys of two others swapped": lambda p, a, r: {"alder": p.keys["birch"], "birch": p.keys["alder"]},
    "another's keys in place of its own": lambda p, a, r: {"cedar": p.keys["birch"]},
    "a share key exchanged": lambda p, a, r: {"birch": replace(p.keys["birch"], share_key=r.keys["birch"].share_key)},
    "a mask key exchanged": lambda p, a, r: {"birch": replace(p.keys["birch"], mask_key=r.keys["birch"].mask_key)},
    "share key and mask key exchanged": lambda p, a, r: {
        "birch": replace(p.keys["birch"], share_key=p.keys["birch"].mask_key, mask_key=p.keys["birch"].share_key)
    },
    "one bit of a share key": lambda p, a, r: {
        "birch": replace(p.keys["birch"], share_key=flipped(p.keys["birch"].share_key, 5))
    },
    "one bit of a commitment": lambda p, a, r: {
        "birch": replace(p.keys["birch"], commitment=flipped(p.keys["birch"].commitment, 5))
    },
    "one bit of a signature": lambda p, a, r: {
        "birch": replace(p.keys["birch"], signature=flipped(p.keys["birch"].signature, 5))
    },
    "no signature": lambda p, a, r: {"birch": replace(p.keys["birch"], signature=b"")},
    "signed by an outsider": lambda p, a, r: {"birch": signed(p, Identity.generate("birch"), r.keys["birch"])},
    "signed by another member": lambda p, a, r: {
        "birch": replace(
            r.keys["birch"], signature=IDENTITIES["fir"].sign(p.attempt.keys_statement("birch", r.keys["birch"]))
        )
    },
    "from the attempt before": lambda p, a, r: {"birch": a.keys["birch"]},
    "from the attempt before, said to be of this plan": lambda p, a, r: {
        "birch": replace(a.keys["birch"], plan=p.attempt.plan)
    },
    "of another plan": lambda p, a, r: {"birch": replace(p.keys["birch"], plan="another plan")},
    "a name outside the cohort": lambda p, a, r: {"gum": signed(p, IDENTITIES["gum"], a.keys["birch"])},
    "a name that nobody knows": lambda p, a, r: {"willow": signed(p, Identity.generate("willow"), a.keys["birch"])},
}


@pytest.mark.parametrize("case", KEY_LISTS)
def test_a_list_of_keys_that_is_not_everyones_own_is_refused(
    played: Played, again: Played, repeated: Played, case: str
) -> None:
    message = with_keys(played, **KEY_LISTS[case](played, again, repeated))
    assert_ends(played, played.member(VICTIM, Phase.KEY_LIST), message, reasons.KEYS_UNVERIFIED)


def test_keys_of_the_same_run_and_plan_but_another_attempt_number_are_refused(played: Played) -> None:
    """The plan's digest alone would tell; the number does as well."""
    other = replace(played.attempt, attempt=2)
    member = Participant(other, IDENTITIES["birch"], ROSTER)
    message = with_keys(played, birch=member.keys())
    assert_ends(played, played.member(VICTIM, Phase.KEY_LIST), message, reasons.KEYS_UNVERIFIED)


TWICE: dict[str, Callable[[Played], KeyList]] = {
    "another's share key": lambda p: of_fir(p, share_key=p.keys["birch"].share_key),
    "another's mask key": lambda p: of_fir(p, mask_key=p.keys["birch"].mask_key),
    "another's mask key for shares": lambda p: of_fir(p, share_key=p.keys["birch"].mask_key),
    "another's commitment": lambda p: of_fir(p, commitment=p.keys["birch"].commitment),
    "the victim's share key": lambda p: of_fir(p, share_key=p.keys["cedar"].share_key),
    "one key for both": lambda p: of_fir(p, share_key=p.keys["fir"].mask_key),
    "all of another's": lambda p: with_keys(p, fir=signed(p, IDENTITIES["fir"], p.keys["birch"])),
}


@pytest.mark.parametrize("case", TWICE)
def test_one_key_under_two_names_is_refused_although_it_is_signed(played: Played, case: str) -> None:
    assert_ends(played, played.member(VICTIM, Phase.KEY_LIST), TWICE[case](played), reasons.KEYS_UNVERIFIED)


@pytest.mark.parametrize(
    "changes",
    [
        {"share_key": b""},
        {"share_key": bytes(PUBLIC_BYTES)},
        {"share_key": b"\xff" * PUBLIC_BYTES},
        {"share_key": b"\1" * (PUBLIC_BYTES - 1)},
        {"mask_key": b""},
        {"mask_key": bytes(PUBLIC_BYTES)},
        {"mask_key": b"\1" * (PUBLIC_BYTES + 1)},
    ],
    ids=lambda changes: ", ".join(f"{part}: {len(value)} of {value[:1].hex()}" for part, value in changes.items()),
)
def test_what_is_no_key_is_refused_although_it_is_signed(played: Played, changes: dict[str, bytes]) -> None:
    message = of_fir(played, **changes)
    assert_ends(played, played.member(VICTIM, Phase.KEY_LIST), message, reasons.KEYS_UNVERIFIED)


@pytest.mark.parametrize("left", [(), ("cedar",), ("alder", "birch", "cedar")], ids=len)
def test_a_list_below_the_fewest_survivors_is_refused(played: Played, left: tuple[str, ...]) -> None:
    message = KeyList(played.attempt.plan, {name: played.keys[name] for name in left})
    assert_ends(played, played.member(VICTIM, Phase.KEY_LIST), message, reasons.TOO_FEW_LEFT)


def test_outsiders_do_not_fill_a_list_that_is_too_small(played: Played) -> None:
    outsiders = {name: signed(played, IDENTITIES[name], played.keys["fir"]) for name in ("gum", "holly", "ivy")}
    keys = {name: played.keys[name] for name in ("alder", "birch", "cedar")}
    message = KeyList(played.attempt.plan, {**keys, **outsiders})
    assert_ends(played, played.member(VICTIM, Phase.KEY_LIST), message, reasons.KEYS_UNVERIFIED)


def test_everyone_on_the_list_but_the_member_itself_gets_shares(played: Played) -> None:
    for name, shares in played.shares.items():
        assert set(shares.sealed) == set(played.attempt.cohort) - {name}
        for recipient, sealed in shares.sealed.items():
            assert bool(sealed.pair) == (name < recipient)


# --- Inbox ----------------------------------------------------------------------------------------------------------


def with_sealed(played: Played, **changes: Sealed | None) -> Inbox:
    sealed = {**played.inboxes[VICTIM].sealed, **changes}
    return Inbox(played.attempt.plan, {name: found for name, found in sealed.items() if found is not None})


def good(played: Played, sender: str = LOWER) -> Sealed:
    return played.inboxes[VICTIM].sealed[sender]


def forged(played: Played, sender: str, signer: Identity) -> Sealed:
    """What anyone can make from public keys: contents that open, for the right info, signed by whoever it is."""
    attempt, entry, digest = played.attempt, played.key_list.keys[VICTIM], played.digest
    shares = seal(bytes(2 * SHARE_BYTES), entry.share_key, attempt.shares_info(digest, sender, VICTIM))
    pair = seal(bytes(32), entry.mask_key, attempt.pair_info(digest, sender, VICTIM)) if sender < VICTIM else b""
    statement = attempt.sealed_statement(digest, sender, VICTIM, shares, pair)
    return Sealed(shares, pair, signer.sign(statement))


def under_another_list(played: Played, repeated: Played, sender: str) -> Sealed:
    """The sender was shown other keys of fir, rightly signed, and sealed for the victim under that list."""
    member = played.member(sender, Phase.KEY_LIST)
    return member.on_key_list(with_keys(played, fir=repeated.keys["fir"])).sealed[VICTIM]


INBOXES: dict[str, Changes] = {
    "forged without the sender's key": lambda p, a, r: {LOWER: forged(p, LOWER, Identity.generate(LOWER))},
    "forged by another member": lambda p, a, r: {LOWER: forged(p, LOWER, IDENTITIES[HIGHER])},
    "forged from the higher name": lambda p, a, r: {HIGHER: forged(p, HIGHER, IDENTITIES[LOWER])},
    "forged, with the signature of the real one": lambda p, a, r: {
        LOWER: replace(forged(p, LOWER, IDENTITIES[HIGHER]), signature=good(p).signature)
    },
    "under another list of keys": lambda p, a, r: {LOWER: under_another_list(p, r, LOWER)},
    "two senders swapped": lambda p, a, r: {LOWER: good(p, LOWEST), LOWEST: good(p, LOWER)},
    "one sender twice": lambda p, a, r: {LOWER: good(p, LOWEST)},
    "shares of two senders swapped": lambda p, a, r: {LOWER: replace(good(p), shares=good(p, LOWEST).shares)},
    "pair seeds of two senders swapped": lambda p, a, r: {LOWER: replace(good(p), pair=good(p, LOWEST).pair)},
    "meant for another member": lambda p, a, r: {LOWER: p.shares[LOWER].sealed[HIGHER]},
    "the way back": lambda p, a, r: {LOWER: p.shares[VICTIM].sealed[LOWER]},
    "from another attempt": lambda p, a, r: {LOWER: a.inboxes[VICTIM].sealed[LOWER]},
    "from another start of this attempt": lambda p, a, r: {LOWER: r.inboxes[VICTIM].sealed[LOWER]},
    "shares cut short": lambda p, a, r: {LOWER: replace(good(p), shares=good(p).shares[:-1])},
    "shares cut at the front": lambda p, a, r: {LOWER: replace(good(p), shares=good(p).shares[1:])},
    "pair cut short": lambda p, a, r: {LOWER: replace(good(p), pair=good(p).pair[:-1])},
    "a byte moved from one part to the other": lambda p, a, r: {
        LOWER: replace(good(p), shares=good(p).shares + good(p).pair[:1], pair=good(p).pair[1:])
    },
    "one bit of the shares": lambda p, a, r: {LOWER: replace(good(p), shares=flipped(good(p).shares, 3))},
    "one bit of the pair": lambda p, a, r: {LOWER: replace(good(p), pair=flipped(good(p).pair, 3))},
    "one bit of the signature": lambda p, a, r: {LOWER: replace(good(p), signature=flipped(good(p).signature, 3))},
    "no signature": lambda p, a, r: {LOWER: replace(good(p), signature=b"")},
    "no pair from the lower name": lambda p, a, r: {LOWER: replace(good(p), pair=b"")},
    "no pair from the lower name, signed": lambda p, a, r: {LOWER: p.sealed_by(LOWER, VICTIM, pair=b"", raw=True)},
    "a pair from the higher name": lambda p, a, r: {HIGHER: replace(good(p, HIGHER), pair=good(p).pair)},
    "a pair from the higher name, signed": lambda p, a, r: {HIGHER: p.sealed_by(HIGHER, VICTIM, pair=bytes(32))},
    "its own name": lambda p, a, r: {VICTIM: p.shares[VICTIM].sealed[LOWER]},
    "its own name, signed by itself": lambda p, a, r: {VICTIM: forged(p, VICTIM, IDENTITIES[VICTIM])},
    "a sender outside the cohort": lambda p, a, r: {"gum": forged(p, "gum", IDENTITIES["gum"])},
    "a sender that nobody knows": lambda p, a, r: {"willow": forged(p, "willow", Identity.generate("willow"))},
}


@pytest.mark.parametrize("case", INBOXES)
def test_shares_that_are_not_their_senders_own_are_refused(
    played: Played, again: Played, repeated: Played, case: str
) -> None:
    message = with_sealed(played, **INBOXES[case](played, again, repeated))
    assert_ends(played, played.member(VICTIM, Phase.INBOX), message, reasons.SHARES_UNVERIFIED)


def test_a_sender_that_is_not_on_the_list_of_keys_is_refused_although_it_is_of_the_cohort(played: Played) -> None:
    """The coordinator left elm's keys out of the list, then delivers something that elm signed."""
    member = played.member(VICTIM, Phase.KEY_LIST)
    keys = with_keys(played, elm=None)
    member.on_key_list(keys)
    digest = key_list_digest(played.attempt, keys.keys)
    sealed = {}
    for sender in (LOWEST, LOWER, HIGHER):
        sealed[sender] = played.member(sender, Phase.KEY_LIST).on_key_list(keys).sealed[VICTIM]
    statement = played.attempt.sealed_statement(digest, SILENT, VICTIM, b"shares", b"")
    sealed[SILENT] = Sealed(b"shares", b"", IDENTITIES[SILENT].sign(statement))
    message = Inbox(played.attempt.plan, sealed)
    assert_ends(played, member, message, reasons.SHARES_UNVERIFIED)


def test_contents_that_are_forged_rightly_do_open_so_only_the_signature_stands_against_them(played: Played) -> None:
    member = played.member(VICTIM, Phase.INBOX)
    member.on_inbox(with_sealed(played, birch=forged(played, LOWER, IDENTITIES[LOWER])), played.vectors[VICTIM])
    assert member.phase is Phase.SURVIVORS


LIES: dict[str, Callable[[Played], dict[str, Sealed]]] = {
    "one share": lambda p: {LOWER: p.sealed_by(LOWER, VICTIM, bytes(SHARE_BYTES))},
    "no shares": lambda p: {LOWER: p.sealed_by(LOWER, VICTIM, b"")},
    "a byte too few": lambda p: {LOWER: p.sealed_by(LOWER, VICTIM, bytes(2 * SHARE_BYTES - 1))},
    "a byte too many": lambda p: {HIGHER: p.sealed_by(HIGHER, VICTIM, bytes(2 * SHARE_BYTES + 1))},
    "no pair seed": lambda p: {LOWER: p.sealed_by(LOWER, VICTIM, pair=b"")},
    "a pair seed too short": lambda p: {LOWER: p.sealed_by(LOWER, VICTIM, pair=bytes(31))},
    "a pair seed too long": lambda p: {LOWER: p.sealed_by(LOWER, VICTIM, pair=bytes(33))},
    "noise for shares": lambda p: {LOWER: p.sealed_by(LOWER, VICTIM, bytes(1268), raw=True)},
    "nothing for shares": lambda p: {HIGHER: p.sealed_by(HIGHER, VICTIM, b"", raw=True)},
    "noise for a pair": lambda p: {LOWER: p.sealed_by(LOWER, VICTIM, pair=bytes(1168), raw=True)},
    "a byte for a pair": lambda p: {LOWER: p.sealed_by(LOWER, VICTIM, pair=b"x", raw=True)},
    "shares sealed for another": lambda p: {
        LOWER: p.sealed_by(LOWER, VICTIM, p.shares[LOWER].sealed[HIGHER].shares, raw=True)
    },
    "shares that another sealed": lambda p: {LOWER: p.sealed_by(LOWER, VICTIM, good(p, LOWEST).shares, raw=True)},
    "a pair seed that another sealed": lambda p: {
        LOWER: p.sealed_by(LOWER, VICTIM, pair=good(p, LOWEST).pair, raw=True)
    },
    "shares in place of the pair seed": lambda p: {LOWER: p.sealed_by(LOWER, VICTIM, pair=good(p).shares, raw=True)},
}


@pytest.mark.parametrize("case", LIES)
def test_signed_contents_that_cannot_be_opened_or_used_are_refused(played: Played, case: str) -> None:
    message = with_sealed(played, **LIES[case](played))
    assert_ends(played, played.member(VICTIM, Phase.INBOX), message, reasons.SHARES_UNREADABLE)


@pytest.mark.parametrize("left", [(), (LOWER,), (LOWEST, LOWER)], ids=len)
def test_an_inbox_below_the_fewest_survivors_is_refused(played: Played, left: tuple[str, ...]) -> None:
    message = Inbox(played.attempt.plan, {name: good(played, name) for name in left})
    assert_ends(played, played.member(VICTIM, Phase.INBOX), message, reasons.TOO_FEW_LEFT)


def test_the_members_own_vector_is_left_as_it_was(played: Played) -> None:
    vector = played.vectors[VICTIM].copy()
    played.member(VICTIM, Phase.INBOX).on_inbox(played.inboxes[VICTIM], vector)
    assert vector.tobytes() == played.vectors[VICTIM].tobytes()


def test_masked_input_is_the_vector_under_its_own_mask_and_one_a_pair(played: Played) -> None:
    """Rebuilt from the secrets of all: nothing else hides it, and each of these does."""
    attempt, digest, layout = played.attempt, played.digest, played.attempt.layout
    expected = played.vectors[VICTIM].copy()
    add_masks(expected, [stream_key(attempt, digest, "self mask", played.held(VICTIM).self_seed, VICTIM)], [])
    for other in sorted(set(attempt.cohort) - {VICTIM}):
        lower, higher = sorted((VICTIM, other))
        seed = derive(played.held(lower).mask_seed, attempt.pair_statement(digest, lower, higher))
        key = stream_key(attempt, digest, "pairwise mask", seed, lower, higher)
        add_masks(expected, [key] if lower == VICTIM else [], [key] if higher == VICTIM else [])
    found = unpack(played.masked[VICTIM].vector, layout.length, layout.ring_bits)
    assert found.tolist() == (expected & np.uint32(layout.ring_mask)).tolist()


# --- Survivors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ("birch", "alder", "cedar", "fir"),
        ("fir", "elm", "cedar", "birch", "alder"),
        ("alder", "alder", "birch", "cedar", "fir"),
        ("alder", "birch", "cedar", "cedar", "fir"),
        ("alder", "birch", "elm", "fir"),
        (),
        ("alder", "birch", "cedar", "fir", "gum"),
        ("alder", "birch", "cedar", "willow"),
        ("alder", "birch", "cedar", "fir", "\ud800"),
        ("", "alder", "birch", "cedar"),
    ],
    ids=repr,
)
def test_a_survivor_set_that_cannot_be_is_refused(played: Played, names: tuple[str, ...]) -> None:
    message = Survivors(played.attempt.plan, names)
    assert_ends(played, played.member(VICTIM, Phase.SURVIVORS), message, reasons.SURVIVORS_UNKNOWN)


def test_a_survivor_who_had_no_part_in_the_shares_is_refused(played: Played) -> None:
    """On the list of keys and in the cohort, but what it sealed never came: no mask of a pair with it is in place."""
    member = played.member(VICTIM, Phase.INBOX)
    member.on_inbox(with_sealed(played, elm=None), played.vectors[VICTIM])
    message = Survivors(played.attempt.plan, played.attempt.cohort)
    assert_ends(played, member, message, reasons.SURVIVORS_UNKNOWN)


@pytest.mark.parametrize("names", [("cedar",), ("cedar", "fir"), ("alder", "birch", "cedar")], ids=len)
def test_a_survivor_set_that_is_too_small_is_refused(played: Played, names: tuple[str, ...]) -> None:
    message = Survivors(played.attempt.plan, names)
    assert_ends(played, played.member(VICTIM, Phase.SURVIVORS), message, reasons.TOO_FEW_LEFT)


def test_a_member_signs_nothing_that_it_could_not_keep(played: Played) -> None:
    class DiskFull(Exception):
        pass

    for error in (DiskFull(), Refusal(reasons.SURVIVORS_DIFFER, "signed another set"), KeyboardInterrupt()):
        member = played.member(VICTIM, Phase.SURVIVORS)

        def fail(names: tuple[str, ...], error: BaseException = error) -> None:
            raise error

        with pytest.raises(type(error)) as caught:
            member.on_survivors(played.survivors, fail)
        assert caught.value is error
        assert_wiped(member)
        assert refused(lambda member=member: member.on_consents(played.consents)) == reasons.ATTEMPT_OVER


def test_the_set_is_kept_before_it_is_signed_and_only_a_good_one(played: Played) -> None:
    kept: list[tuple[str, ...]] = []
    member = played.member(VICTIM, Phase.SURVIVORS)

    def commit(names: tuple[str, ...]) -> None:
        assert member.phase is Phase.SURVIVORS
        kept.append(names)

    assert member.on_survivors(played.survivors, commit) == played.consent[VICTIM]
    assert kept == [played.survivors.names]
    for names in (("alder", "birch", "cedar"), ("birch", "alder", "cedar", "fir"), ("alder", "birch", "elm", "fir")):
        other = played.member(VICTIM, Phase.SURVIVORS)
        refused(lambda other=other, names=names: other.on_survivors(Survivors(played.attempt.plan, names), kept.append))
    assert len(kept) == 1


@pytest.mark.parametrize("names", [("alder", "birch", "cedar", "elm"), ("alder", "birch", "cedar", "fir")])
def test_a_second_survivor_set_is_refused_even_if_it_is_the_first(played: Played, names: tuple[str, ...]) -> None:
    member = played.member(VICTIM, Phase.CONSENTS)
    assert_ends(played, member, Survivors(played.attempt.plan, names), reasons.PHASE_WRONG)


# --- Consents -------------------------------------------------------------------------------------------------------


def consents(played: Played, **changes: bytes | None) -> Consents:
    signatures = {**played.consents.signatures, **changes}
    return Consents(played.attempt.plan, {name: found for name, found in signatures.items() if found is not None})


def consent_of(played: Played, identity: Identity, names: tuple[str, ...], digest: bytes | None = None) -> bytes:
    return identity.sign(played.attempt.survivors_statement(digest or played.digest, names))


OTHER_SET = ("alder", "birch", "cedar", "elm")
CONSENTS: dict[str, Changes] = {
    "none": lambda p, a, r: dict.fromkeys(p.consents.signatures),
    "one too few": lambda p, a, r: {"alder": None},
    "its own alone": lambda p, a, r: {"alder": None, "birch": None, "fir": None},
    "a stranger's in place of one": lambda p, a, r: {
        "alder": None,
        "willow": consent_of(p, Identity.generate("willow"), p.survivors.names),
    },
    "a stranger's besides": lambda p, a, r: {"willow": consent_of(p, Identity.generate("willow"), p.survivors.names)},
    "one on the roster but not invited": lambda p, a, r: {
        "alder": None,
        "gum": consent_of(p, IDENTITIES["gum"], p.survivors.names),
    },
    "one who took part but did not survive": lambda p, a, r: {
        "alder": None,
        "elm": consent_of(p, IDENTITIES["elm"], p.survivors.names),
    },
    "the same, besides enough others": lambda p, a, r: {"elm": consent_of(p, IDENTITIES["elm"], p.survivors.names)},
    "another set": lambda p, a, r: {"alder": consent_of(p, IDENTITIES["alder"], OTHER_SET)},
    "another set, by all others": lambda p, a, r: {
        name: consent_of(p, IDENTITIES[name], OTHER_SET) for name in ("alder", "birch", "fir")
    },
    "the same names in another order": lambda p, a, r: {
        "alder": consent_of(p, IDENTITIES["alder"], p.survivors.names[::-1])
    },
    "under another list of keys": lambda p, a, r: {
        "alder": consent_of(p, IDENTITIES["alder"], p.survivors.names, bytes(32))
    },
    "from another attempt": lambda p, a, r: {"alder": a.consents.signatures["alder"]},
    "all from another attempt": lambda p, a, r: dict(a.consents.signatures),
    "from another start of this attempt": lambda p, a, r: {"alder": r.consents.signatures["alder"]},
    "signed for another purpose": lambda p, a, r: {"alder": p.keys["alder"].signature},
    "swapped": lambda p, a, r: {
        "alder": p.consents.signatures["birch"],
        "birch": p.consents.signatures["alder"],
    },
    "one signature under two names": lambda p, a, r: {"alder": p.consents.signatures["birch"]},
    "one bit": lambda p, a, r: {"alder": flipped(p.consents.signatures["alder"], 9)},
    "empty": lambda p, a, r: {"alder": b""},
    "its own false": lambda p, a, r: {"cedar": bytes(64)},
}


@pytest.mark.parametrize("case", CONSENTS)
def test_consents_that_are_not_those_of_t_survivors_to_this_very_set_reveal_nothing(
    played: Played, again: Played, repeated: Played, case: str
) -> None:
    message = consents(played, **CONSENTS[case](played, again, repeated))
    assert_ends(played, played.member(VICTIM, Phase.CONSENTS), message, reasons.SIGNATURES_UNVERIFIED)


def test_one_false_signature_among_more_than_enough_is_refused() -> None:
    attempt = make_attempt(8)
    whole = play(attempt, {name: make_vector(attempt, 0) for name in attempt.cohort})
    assert len(whole.consents.signatures) == attempt.terms.threshold + 3
    signatures = dict(whole.consents.signatures)
    whole.member("cedar", Phase.CONSENTS).on_consents(whole.consents)
    signatures["ivy"] = bytes(64)
    message = Consents(attempt.plan, signatures)
    assert_ends(whole, whole.member("cedar", Phase.CONSENTS), message, reasons.SIGNATURES_UNVERIFIED)


def test_exactly_t_consents_are_enough(played: Played) -> None:
    assert len(played.consents.signatures) == played.attempt.terms.threshold == 4


@pytest.mark.parametrize("other", ["the same", "another"])
def test_nothing_is_revealed_twice(played: Played, other: str) -> None:
    member = played.member(VICTIM, Phase.CONSENTS)
    member.on_consents(played.consents)
    message = played.consents if other == "the same" else consents(played, alder=None)
    assert refused(lambda: member.on_consents(message)) == reasons.ATTEMPT_OVER
    for phase in PHASES:
        assert refused(lambda phase=phase: played.give(member, played.message(VICTIM, phase))) == reasons.ATTEMPT_OVER


def test_of_every_name_one_share_and_of_the_right_secret_is_revealed(played: Played) -> None:
    for name, revealed in played.revealed.items():
        held = played.held(name).shares
        assert set(revealed.shares) == set(played.attempt.cohort) == set(held)
        for other, share in revealed.shares.items():
            of_self, of_mask = held[other][:SHARE_BYTES], held[other][SHARE_BYTES:]
            assert share == (of_mask if other == SILENT else of_self)
            assert of_self != of_mask


# --- What nobody sees -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("waits_for", PHASES, ids=lambda phase: phase.value)
def test_no_text_form_of_a_member_shows_a_secret(played: Played, waits_for: Phase) -> None:
    member = played.member(VICTIM, waits_for)
    text = texts_of(member) + repr(vars(member)) + repr(member._secrets) + str(member._secrets)
    assert VICTIM in repr(member)
    assert waits_for.value in repr(member)
    assert_hidden(text, played.secrets())
    assert_hidden(repr(member), [IDENTITIES[VICTIM].sign(b"")])


@pytest.mark.parametrize(
    "take",
    [copy.copy, copy.deepcopy, *(lambda it, p=p: pickle.dumps(it, p) for p in range(pickle.HIGHEST_PROTOCOL + 1))],
)
def test_a_member_is_neither_pickled_nor_copied(played: Played, take: Callable[[Any], Any]) -> None:
    for phase in PHASES:
        with pytest.raises(TypeError, match="a participant is never pickled"):
            take(played.member(VICTIM, phase))


def test_secrets_are_taken_out_of_simulated_members_only(played: Played) -> None:
    attempt = played.attempt
    for member in (
        Participant(attempt, IDENTITIES[VICTIM], ROSTER),
        Participant(attempt, IDENTITIES[VICTIM], ROSTER, simulated=False),
    ):
        with pytest.raises(RuntimeError, match="round secrets leave a process only in a simulation") as caught:
            snapshot_for_simulation(member)
        hidden = member._secrets
        assert_hidden(str(caught.value), map(bytes, (hidden.share_seed, hidden.mask_seed, hidden.self_seed)))


@pytest.mark.parametrize("waits_for", PHASES, ids=lambda phase: phase.value)
def test_a_simulated_member_comes_back_exactly(played: Played, waits_for: Phase) -> None:
    snapshot = played.before[waits_for][VICTIM]
    member = played.member(VICTIM, waits_for)
    assert (member.phase, member.simulated, member.name) == (waits_for, True, VICTIM)
    assert snapshot_for_simulation(member) == snapshot
    whole = held_by(snapshot)
    assert (bytes(member._secrets.self_seed), len(whole.shares)) == (
        whole.self_seed,
        {Phase.KEY_LIST: 0, Phase.INBOX: 1}.get(waits_for, 5),
    )


def test_a_wiped_member_comes_back_wiped(played: Played) -> None:
    member = played.member(VICTIM, Phase.CONSENTS)
    member.wipe()
    found = restore_in_simulation(snapshot_for_simulation(member), played.attempt, IDENTITIES[VICTIM], ROSTER)
    assert_wiped(found)
    assert refused(lambda: found.on_consents(played.consents)) == reasons.ATTEMPT_OVER


def test_a_snapshot_of_one_moment_does_not_change_with_the_member(played: Played) -> None:
    member = played.member(VICTIM, Phase.INBOX)
    snapshot = snapshot_for_simulation(member)
    give(member, played.inboxes[VICTIM], played.vectors[VICTIM])
    member.wipe()
    assert snapshot == played.before[Phase.INBOX][VICTIM]
