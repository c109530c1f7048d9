"""The coordinator's side: whose answer counts, when it counts, and that what does not count leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from common.errors import Refusal
from common.fixed_point import CorruptSum, decode, pack, packed_length
from common.secagg import reasons
from common.secagg.aggregator import Aggregator, AttemptFailed, Phase
from common.secagg.attempt import key_list_digest
from common.secagg.identity import Identity
from common.secagg.messages import Consent, KeyList, Keys, MaskedInput, Revealed, Sealed, Shares
from common.secagg.sealing import PUBLIC_BYTES, seal
from common.secagg.shamir import PRIME, SHARE_BYTES, weights
from tests.common.secagg.conftest import (
    IDENTITIES,
    ROSTER,
    Played,
    assert_hidden,
    collector,
    everything_in,
    make_attempt,
    make_vector,
    plain_sum,
    play,
    refused,
    texts_of,
)

KINDS = ("keys", "shares", "masked", "consent", "revealed")
CLOSES = ("key_list", "inboxes", "survivors", "consents", "unmask")


def said(played: Played, kind: str) -> Mapping[str, Any]:
    return {
        "keys": played.keys,
        "shares": played.shares,
        "masked": played.masked,
        "consent": played.consent,
        "revealed": played.revealed,
    }[kind]


def take(aggregator: Aggregator, kind: str, name: str, message: Any) -> None:
    getattr(aggregator, f"on_{kind}")(name, message)


def state(aggregator: Aggregator) -> list[Any]:
    """All that it holds, to the bit."""
    return [
        aggregator.phase,
        aggregator._members,
        tuple(aggregator._added),
        aggregator._survivors,
        [part.tobytes() if isinstance(part, np.ndarray) else part for part in everything_in(aggregator)],
        aggregator._sum.count,
    ]


def refuses(aggregator: Aggregator, kind: str, name: str, message: Any, reason: str) -> None:
    """For that reason, and nothing changes."""
    before = state(aggregator)
    assert refused(lambda: take(aggregator, kind, name, message)) == reason
    assert state(aggregator) == before


def finishes(played: Played, aggregator: Aggregator, kind: str) -> None:
    """From phase `kind` on, with what everyone has said, to the exact sum."""
    for this, close in list(zip(KINDS, CLOSES, strict=True))[KINDS.index(kind) :]:
        for name, message in said(played, this).items():
            take(aggregator, this, name, message)
        total = getattr(aggregator, close)()
    expected = plain_sum((played.vectors[name] for name in played.survivors.names), played.attempt.layout)
    assert total.tolist() == expected.tolist()


# --- Order ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("phase", [*KINDS, "over"])
def test_every_answer_in_the_wrong_phase_is_refused_and_the_attempt_goes_on(
    played: Played, kind: str, phase: str
) -> None:
    aggregator = collector(played, phase)
    if kind != phase:
        for name, message in said(played, kind).items():
            refuses(aggregator, kind, name, message, reasons.PHASE_WRONG)
    if phase != "over":
        finishes(played, aggregator, phase)


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_counts_once(played: Played, kind: str) -> None:
    aggregator = collector(played, kind)
    for name, message in said(played, kind).items():
        take(aggregator, kind, name, message)
        refuses(aggregator, kind, name, message, reasons.PHASE_WRONG)
    before = state(aggregator)
    for name, message in said(played, kind).items():
        refuses(aggregator, kind, name, message, reasons.PHASE_WRONG)
    assert state(aggregator) == before


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_to_another_plan_changes_nothing(played: Played, kind: str) -> None:
    aggregator = collector(played, kind)
    for name, message in said(played, kind).items():
        refuses(aggregator, kind, name, replace(message, plan="another plan"), reasons.ATTEMPT_UNKNOWN)
    finishes(played, aggregator, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stranger", ["gum", "willow", ""])
def test_an_answer_from_a_stranger_changes_nothing(played: Played, kind: str, stranger: str) -> None:
    """On the roster but not invited; known to nobody; nameless. Even with the words of a member."""
    expected = {
        "keys": reasons.KEYS_UNVERIFIED,
        "shares": reasons.SHARES_UNVERIFIED,
        "masked": reasons.PHASE_WRONG,
        "consent": reasons.SIGNATURES_UNVERIFIED,
        "revealed": reasons.SHARES_UNVERIFIED,
    }[kind]
    aggregator = collector(played, kind)
    for message in said(played, kind).values():
        refuses(aggregator, kind, stranger, message, expected)
    finishes(played, aggregator, kind)


@pytest.mark.parametrize("phase", [*KINDS, "over"])
@pytest.mark.parametrize("close", CLOSES)
def test_no_phase_is_closed_before_its_turn_or_twice(played: Played, phase: str, close: str) -> None:
    aggregator = collector(played, phase)
    if phase != "over" and KINDS.index(phase) == CLOSES.index(close):
        return
    before = state(aggregator)
    with pytest.raises(AttemptFailed, match="the attempt is in phase"):
        getattr(aggregator, close)()
    assert state(aggregator) == before
    if phase != "over":
        finishes(played, aggregator, phase)


def test_a_member_whose_answer_was_refused_may_still_give_the_right_one(played: Played) -> None:
    for kind in KINDS:
        aggregator = collector(played, kind)
        for name, message in said(played, kind).items():
            refused(lambda: take(aggregator, kind, name, replace(message, plan="")))  # noqa: B023
            wrong = said(played, kind)["fir" if name != "fir" else "alder"]
            if kind not in ("masked", "revealed"):  # of which only the sum shows whose they are
                refused(lambda: take(aggregator, kind, name, wrong))  # noqa: B023
        finishes(played, aggregator, kind)


# --- Each answer ----------------------------------------------------------------------------------------------------


def signed(played: Played, name: str, keys: Keys, signer: Identity | None = None) -> Keys:
    signer = signer or IDENTITIES[name]
    return replace(keys, signature=signer.sign(played.attempt.keys_statement(name, keys)))


KEYS: dict[str, Callable[[Played], Keys]] = {
    "another's": lambda p: p.keys["alder"],
    "signed by an outsider": lambda p: signed(p, "fir", p.keys["fir"], Identity.generate("fir")),
    "no signature": lambda p: replace(p.keys["fir"], signature=b""),
    "another number": lambda p: replace(
        p.keys["fir"],
        signature=IDENTITIES["fir"].sign(replace(p.attempt, attempt=2).keys_statement("fir", p.keys["fir"])),
    ),
    "a share key too short": lambda p: signed(p, "fir", replace(p.keys["fir"], share_key=bytes(PUBLIC_BYTES - 1))),
    "a mask key too long": lambda p: signed(p, "fir", replace(p.keys["fir"], mask_key=bytes(PUBLIC_BYTES + 1))),
    "a commitment too short": lambda p: signed(p, "fir", replace(p.keys["fir"], commitment=bytes(31))),
    "of full size, and no key": lambda p: signed(p, "fir", replace(p.keys["fir"], share_key=b"\xff" * 1216)),
    "one key for both": lambda p: signed(p, "fir", replace(p.keys["fir"], share_key=p.keys["fir"].mask_key)),
    "another's share key": lambda p: signed(p, "fir", replace(p.keys["fir"], share_key=p.keys["alder"].share_key)),
    "another's mask key": lambda p: signed(p, "fir", replace(p.keys["fir"], mask_key=p.keys["alder"].mask_key)),
    "another's mask key for shares": lambda p: signed(
        p, "fir", replace(p.keys["fir"], share_key=p.keys["alder"].mask_key)
    ),
    "another's commitment": lambda p: signed(p, "fir", replace(p.keys["fir"], commitment=p.keys["alder"].commitment)),
}


@pytest.mark.parametrize("case", KEYS)
def test_keys_that_others_would_refuse_are_refused_here(played: Played, case: str) -> None:
    aggregator = collector(played, "keys")
    take(aggregator, "keys", "alder", played.keys["alder"])
    refuses(aggregator, "keys", "fir", KEYS[case](played), reasons.KEYS_UNVERIFIED)


SHARES: dict[str, Callable[[Played], dict[str, Sealed | None]]] = {
    "one missing": lambda p: {"alder": None},
    "for itself": lambda p: {"cedar": p.shares["cedar"].sealed["alder"]},
    "for a stranger": lambda p: {"gum": p.shares["cedar"].sealed["alder"]},
    "swapped": lambda p: {"alder": p.shares["cedar"].sealed["birch"], "birch": p.shares["cedar"].sealed["alder"]},
    "altered": lambda p: {"alder": replace(p.shares["cedar"].sealed["alder"], shares=b"altered")},
    "not signed": lambda p: {"alder": replace(p.shares["cedar"].sealed["alder"], signature=bytes(64))},
    "no pair for a higher name": lambda p: {"fir": p.sealed_by("cedar", "fir", pair=b"", raw=True)},
    "a pair for a lower name": lambda p: {"alder": p.sealed_by("cedar", "alder", pair=bytes(32))},
    "signed by another": lambda p: {"alder": p.shares["birch"].sealed["alder"]},
}


@pytest.mark.parametrize("case", SHARES)
def test_shares_that_somebody_would_have_to_leave_for_are_refused_here(played: Played, case: str) -> None:
    aggregator = collector(played, "shares")
    sealed = {**played.shares["cedar"].sealed, **SHARES[case](played)}
    message = Shares(played.attempt.plan, {name: found for name, found in sealed.items() if found is not None})
    refuses(aggregator, "shares", "cedar", message, reasons.SHARES_UNVERIFIED)
    finishes(played, aggregator, "shares")


def test_who_announced_no_keys_has_no_part_in_the_shares(played: Played) -> None:
    attempt = make_attempt(5)
    vectors = {name: make_vector(attempt, 1) for name in attempt.cohort}
    part = play(attempt, vectors, {"elm": "keys"})
    aggregator = collector(part, "shares")
    refuses(aggregator, "shares", "elm", played.shares["elm"], reasons.SHARES_UNVERIFIED)
    refuses(aggregator, "shares", "elm", Shares(attempt.plan, {}), reasons.SHARES_UNVERIFIED)


@pytest.mark.parametrize("name", ["alder", "fir"])
def test_masked_input_of_another_form_is_refused(played: Played, name: str) -> None:
    layout, words = played.attempt.layout, played.masked[name].vector
    padded = words.copy()
    padded[-1] |= np.uint32(1 << 31)  # behind the last element
    aggregator = collector(played, "masked")
    assert packed_length(layout.length, layout.ring_bits) == len(words)
    for vector in (
        words[:-1],
        words[:0],
        np.append(words, np.uint32(0)),
        words.astype(np.uint64),
        words.astype(np.float32),
        words.view(np.int32),
        words[None],
        np.zeros(layout.length, np.uint32),  # not packed
        *([padded] if layout.length % 32 else []),
    ):
        refuses(aggregator, "masked", name, MaskedInput(played.attempt.plan, vector), reasons.VECTOR_DIFFERS)
    finishes(played, aggregator, "masked")


def test_who_sealed_no_shares_has_no_part_in_the_sum(played: Played) -> None:
    attempt = make_attempt(5)
    part = play(attempt, {name: make_vector(attempt, 1) for name in attempt.cohort}, {"elm": "shares"})
    aggregator = collector(part, "masked")
    refuses(aggregator, "masked", "elm", MaskedInput(attempt.plan, part.masked["fir"].vector), reasons.PHASE_WRONG)
    finishes(part, aggregator, "masked")


def test_consents_to_anything_else_are_refused(played: Played) -> None:
    aggregator, attempt = collector(played, "consent"), played.attempt
    names = played.survivors.names
    for signature in (
        b"",
        bytes(64),
        played.consent["alder"].signature,
        IDENTITIES["fir"].sign(attempt.survivors_statement(played.digest, (*names, "elm"))),
        IDENTITIES["fir"].sign(attempt.survivors_statement(bytes(32), names)),
        IDENTITIES["fir"].sign(replace(attempt, attempt=2).survivors_statement(played.digest, names)),
        Identity.generate("fir").sign(attempt.survivors_statement(played.digest, names)),
    ):
        refuses(aggregator, "consent", "fir", Consent(attempt.plan, signature), reasons.SIGNATURES_UNVERIFIED)
    dropped = IDENTITIES["elm"].sign(attempt.survivors_statement(played.digest, names))
    refuses(aggregator, "consent", "elm", Consent(attempt.plan, dropped), reasons.SIGNATURES_UNVERIFIED)
    finishes(played, aggregator, "consent")


def test_revealed_shares_must_be_one_whole_one_for_each_name(played: Played) -> None:
    aggregator, whole = collector(played, "revealed"), dict(played.revealed["fir"].shares)
    for shares in (
        {},
        {name: share for name, share in whole.items() if name != "alder"},
        {**whole, "gum": whole["alder"]},
        {**whole, "alder": b""},
        {**whole, "alder": whole["alder"][:-1]},
        {**whole, "alder": whole["alder"] + b"\0"},
        {**whole, "alder": 2 * whole["alder"]},
    ):
        refuses(aggregator, "revealed", "fir", Revealed(played.attempt.plan, shares), reasons.SHARES_UNVERIFIED)
    finishes(played, aggregator, "revealed")


def test_who_did_not_consent_reveals_nothing_that_counts() -> None:
    attempt = make_attempt(6)
    part = play(attempt, {name: make_vector(attempt, 1) for name in attempt.cohort}, {"gum": "consent"})
    aggregator = collector(part, "revealed")
    message = Revealed(attempt.plan, part.revealed["fir"].shares)
    refuses(aggregator, "revealed", "gum", message, reasons.SHARES_UNVERIFIED)
    finishes(part, aggregator, "revealed")


# --- Too few --------------------------------------------------------------------------------------------------------


def assert_empty(aggregator: Aggregator) -> None:
    """Nothing of any member is left: no keys, ciphertexts, signatures or shares, and a sum of nothing."""
    assert aggregator.phase is Phase.OVER
    public = {*everything_in(ROSTER.keys), aggregator._key_list}
    for part in everything_in(aggregator):
        if isinstance(part, np.ndarray):
            assert len(part) < 60
            assert not part.any()
        else:
            assert part in public


@pytest.mark.parametrize("kind", KINDS)
def test_below_the_needed_number_the_attempt_ends_and_nothing_is_kept(played: Played, kind: str) -> None:
    aggregator = collector(played, kind)
    for name in ("alder", "birch", "cedar"):  # four are needed
        take(aggregator, kind, name, said(played, kind)[name])
    with pytest.raises(AttemptFailed, match="3 of 5 members are left, 4 are needed") as caught:
        getattr(aggregator, CLOSES[KINDS.index(kind)])()
    assert_empty(aggregator)
    assert_hidden(texts_of(caught.value), played.secrets())
    refuses(aggregator, kind, "fir", said(played, kind)["fir"], reasons.PHASE_WRONG)
    with pytest.raises(AttemptFailed):
        getattr(aggregator, CLOSES[KINDS.index(kind)])()


def test_nothing_is_kept_after_the_sum_either(played: Played) -> None:
    assert_empty(collector(played, "over"))


def test_masked_inputs_are_added_and_forgotten(played: Played) -> None:
    aggregator = collector(played, "masked")
    finished = []
    for name, message in played.masked.items():
        take(aggregator, "masked", name, message)
        finished.append(message.vector.tobytes())
        held = [part for part in everything_in(aggregator) if isinstance(part, np.ndarray)]
        assert sum(part.nbytes for part in held) == 4 * played.attempt.layout.length
    assert not set(finished) & {part for part in everything_in(aggregator) if isinstance(part, bytes)}


def test_what_was_handed_out_does_not_change_when_the_attempt_ends(played: Played) -> None:
    aggregator = Aggregator(played.attempt, ROSTER)
    for name, keys in played.keys.items():
        aggregator.on_keys(name, keys)
    handed = aggregator.key_list()
    with pytest.raises(AttemptFailed):
        aggregator.inboxes()
    assert handed == KeyList(played.attempt.plan, played.keys)


def test_everyone_is_shown_the_same_keys_in_order(played: Played) -> None:
    aggregator = collector(played, "keys")
    for name, keys in reversed(played.keys.items()):
        aggregator.on_keys(name, keys)
    assert list(aggregator.key_list().keys) == sorted(played.keys)
    assert all(set(inbox.sealed) == set(played.attempt.cohort) - {name} for name, inbox in played.inboxes.items())


# --- False secrets --------------------------------------------------------------------------------------------------


def moved(share: bytes) -> bytes:
    return ((int.from_bytes(share, "big") + 1) % PRIME).to_bytes(SHARE_BYTES, "big")


FALSE_SHARES: dict[str, Callable[[bytes], bytes]] = {
    "off by one": moved,
    "zero": lambda share: bytes(SHARE_BYTES),
    "noise": lambda share: (int.from_bytes(share, "big") ^ 1 << 300).to_bytes(SHARE_BYTES, "big"),
    "above the prime": lambda share: b"\xff" * SHARE_BYTES,
}


@pytest.mark.parametrize("of", ["alder", "elm"], ids=["of a survivor", "of who fell silent"])
@pytest.mark.parametrize("case", FALSE_SHARES)
def test_a_false_share_gives_no_sum_and_nothing_is_kept(played: Played, case: str, of: str) -> None:
    aggregator = collector(played, "revealed")
    for name, message in played.revealed.items():
        shares = dict(message.shares)
        if name == "birch":
            shares[of] = FALSE_SHARES[case](shares[of])
        aggregator.on_revealed(name, Revealed(message.plan, shares))
    with pytest.raises(AttemptFailed, match=f"a secret of {of} cannot be reconstructed") as caught:
        aggregator.unmask()
    assert_empty(aggregator)
    assert_hidden(texts_of(caught.value) + texts_of(caught.value.__cause__), played.secrets())
    with pytest.raises(AttemptFailed):
        aggregator.unmask()


@pytest.mark.parametrize("of", ["alder", "elm"])
def test_shares_that_open_to_another_secret_of_the_right_form_give_no_sum(played: Played, of: str) -> None:
    """A member who knows the others' shares can choose what they open to; the commitment and the key do not fit it."""
    aggregator = collector(played, "revealed")
    names = sorted(played.revealed)
    found = weights([played.attempt.point(name) for name in names])
    for name, message in played.revealed.items():
        shares = dict(message.shares)
        if name == "birch":
            shift = pow(found[names.index(name)], -1, PRIME)  # the secret becomes the next number
            shares[of] = ((int.from_bytes(shares[of], "big") + shift) % PRIME).to_bytes(SHARE_BYTES, "big")
        aggregator.on_revealed(name, Revealed(message.plan, shares))
    with pytest.raises(AttemptFailed, match=f"a secret of {of} cannot be reconstructed: the seed is not the one"):
        aggregator.unmask()
    assert_empty(aggregator)


def test_shares_of_the_other_secret_give_no_sum(played: Played) -> None:
    """What members would never reveal, both of one name, would be refused even so."""
    aggregator = collector(played, "revealed")
    for name, message in played.revealed.items():
        held = played.held(name).shares
        swapped = {
            other: both[:SHARE_BYTES] if message.shares[other] == both[SHARE_BYTES:] else both[SHARE_BYTES:]
            for other, both in held.items()
        }
        aggregator.on_revealed(name, Revealed(message.plan, swapped))
    with pytest.raises(AttemptFailed, match="the seed is not the one"):
        aggregator.unmask()
    assert_empty(aggregator)


def false_pair(so_far: dict[str, Any], sender: str, recipient: str) -> Callable[[str, Any], Any]:
    """A member that seals another seed for its pair with one other than it uses itself."""

    def change(name: str, answer: Any) -> Any:
        if isinstance(answer, Keys):
            so_far.setdefault("keys", {})[name] = answer
        if name != sender or not isinstance(answer, Shares):
            return answer
        attempt, keys = so_far["attempt"], dict(sorted(so_far["keys"].items()))
        digest = key_list_digest(attempt, keys)
        pair = seal(b"\7" * 32, keys[recipient].mask_key, attempt.pair_info(digest, sender, recipient))
        shares = answer.sealed[recipient].shares
        statement = attempt.sealed_statement(digest, sender, recipient, shares, pair)
        sealed = Sealed(shares, pair, IDENTITIES[sender].sign(statement))
        return Shares(answer.plan, {**answer.sealed, recipient: sealed})

    return change


@pytest.mark.parametrize(
    ("sender", "recipient", "silent"),
    [
        ("alder", "fir", {}),
        ("alder", "fir", {"birch": "masked"}),
        ("alder", "elm", {"alder": "masked"}),
        ("alder", "elm", {"elm": "masked"}),
    ],
    ids=["both survive", "both survive and another falls silent", "the liar falls silent", "the other falls silent"],
)
def test_a_false_pair_seed_makes_a_corrupt_sum(sender: str, recipient: str, silent: dict[str, str]) -> None:
    attempt = make_attempt(5)
    vectors = {name: make_vector(attempt, 1) for name in attempt.cohort}
    part = play(attempt, vectors, silent, false_pair({"attempt": attempt}, sender, recipient))
    expected = plain_sum((vectors[name] for name in part.survivors.names), attempt.layout)
    assert part.total.tolist() != expected.tolist()
    with pytest.raises(CorruptSum):
        decode(part.total, attempt.layout, members=len(part.survivors.names))


def test_a_masked_vector_that_is_altered_makes_a_corrupt_sum() -> None:
    attempt = make_attempt(4)
    vectors = {name: make_vector(attempt, 1) for name in attempt.cohort}

    def change(name: str, answer: Any) -> Any:
        if name == "cedar" and isinstance(answer, MaskedInput):
            words = answer.vector.copy()
            words[3] ^= np.uint32(1 << 7)
            return MaskedInput(answer.plan, words)
        return answer

    part = play(attempt, vectors, {}, change)
    with pytest.raises(CorruptSum):
        decode(part.total, attempt.layout, members=4)


def test_a_sum_without_unmasking_is_corrupt(played: Played) -> None:
    """What the coordinator holds before anybody reveals anything is noise to it."""
    aggregator = collector(played, "revealed")
    with pytest.raises(CorruptSum):
        decode(aggregator._sum.total(), played.attempt.layout, members=4)
    assert pack(aggregator._sum.total(), played.attempt.layout.ring_bits).any()


# --- What nobody sees -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [*KINDS, "over"])
def test_no_text_form_of_the_aggregator_or_of_a_message_shows_a_secret(played: Played, phase: str) -> None:
    aggregator = collector(played, phase)
    for name, message in said(played, phase).items() if phase != "over" else ():
        take(aggregator, phase, name, message)
        assert_hidden(texts_of(message), played.secrets())
    assert_hidden(texts_of(aggregator), played.secrets())
    messages = [played.key_list, played.survivors, played.consents, *played.inboxes.values()]
    assert_hidden(texts_of(messages), played.secrets())
    assert not any(word in repr(aggregator) for word in played.attempt.cohort)


def test_masked_vectors_and_revealed_shares_are_not_written_in_text(played: Played) -> None:
    for name in played.survivors.names:
        assert texts_of(played.masked[name]).count("vector") == 0
        assert texts_of(played.revealed[name]).count("shares") == 0


def test_a_refusal_tells_names_and_numbers_only(played: Played) -> None:
    aggregator = collector(played, "revealed")
    shares = {name: share[:-1] for name, share in played.revealed["fir"].shares.items()}
    with pytest.raises(Refusal) as caught:
        aggregator.on_revealed("fir", Revealed(played.attempt.plan, shares))
    assert_hidden(texts_of(caught.value), [*played.secrets(), *shares.values()])
