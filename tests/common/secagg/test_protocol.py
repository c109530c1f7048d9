"""Both sides together: the exact sum of the survivors or a clean end, and nothing of anyone but that sum."""

from __future__ import annotations

import itertools
import logging
import math
import secrets
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.fixed_point import Layout, Ring, decode, encode, unpack, void
from common.secagg import reasons
from common.secagg.aggregator import Aggregator, AttemptFailed
from common.secagg.attempt import Attempt
from common.secagg.masks import add_masks
from common.secagg.messages import Consents
from common.secagg.participant import (
    Participant,
    Phase,
    restore_in_simulation,
    snapshot_for_simulation,
    stream_key,
)
from common.secagg.sealing import derive
from common.secagg.shamir import SHARE_BYTES, combine, weights
from common.secagg.terms import Terms, smallest_cohort, threshold
from tests.common.secagg.conftest import (
    IDENTITIES,
    NAMES,
    ROSTER,
    Played,
    assert_hidden,
    assert_wiped,
    everything_in,
    make_attempt,
    make_vector,
    plain_sum,
    play,
    refused,
)

SILENCES = ("keys", "shares", "masked", "consent", "revealed")

# --- Any cohort, any silence, any vectors ---------------------------------------------------------------------------


@st.composite
def attempts(draw: st.DrawFn) -> Attempt:
    """Any terms that are allowed, for up to nine members, and any cohort that is; a repeat may have fewer."""
    colluders = draw(st.integers(1, 3))
    least = smallest_cohort(colluders)
    members = draw(st.one_of(st.integers(least, 9), st.integers(6, 9)))
    lowest = threshold(members, colluders)
    smallest = draw(st.one_of(st.just(least), st.integers(least, members)))
    t = draw(st.one_of(st.just(lowest), st.integers(lowest, members)))
    terms = Terms(members, colluders, t, smallest)
    count = draw(st.one_of(st.just(members), st.integers(terms.survivors, members)))
    cohort = tuple(sorted(draw(st.permutations(NAMES))[:count]))
    bits, weight_bits = draw(st.sampled_from([(16, 4), (2, 1), (20, 8), (24, 4)]))
    layout = Layout(draw(st.integers(0, 40)), members, 1.0, bits, weight_bits)
    return Attempt("run", draw(st.integers(1, 9)), draw(st.integers(1, 9)), "plan", cohort, terms, layout)


def drawn_vector(draw: st.DrawFn, layout: Layout, seed: int) -> Ring:
    kind = draw(st.sampled_from(["any", "void", "zero", "largest", "smallest", "infinite"]))
    rng, length = np.random.default_rng(seed), layout.parameters
    weight = draw(st.sampled_from([1, layout.max_weight]))
    counters = {"train_loss": draw(st.sampled_from([0, 1, 2**62 - 1])), "train_tokens": seed}
    updates = {
        "any": rng.normal(0, 1, length),
        "zero": np.zeros(length),
        "largest": np.full(length, 1e30),
        "smallest": np.full(length, -1e30),
        "infinite": np.full(length, np.inf),
    }
    return void(layout) if kind == "void" else encode(updates[kind].astype(np.float32), weight, counters, layout, rng)


@st.composite
def silences(draw: st.DrawFn, cohort: tuple[str, ...], tolerated: int) -> dict[str, str]:
    """Who falls silent when; mostly as many as an attempt bears, and now and then any number."""
    count = draw(st.sampled_from([tolerated, max(0, tolerated - 1), tolerated + 1, draw(st.integers(0, len(cohort)))]))
    names = draw(st.permutations(cohort))[:count]
    return {name: draw(st.sampled_from(SILENCES)) for name in names}


def outcome(attempt: Attempt, silent: Mapping[str, str]) -> tuple[str, ...] | None:
    """The survivors; None where too few are left at some point."""
    needed = {"consent": attempt.terms.threshold, "revealed": attempt.terms.threshold}
    left, survivors = list(attempt.cohort), ()
    for kind in SILENCES:
        left = [name for name in left if silent.get(name) != kind]
        if len(left) < needed.get(kind, attempt.terms.survivors):
            return None
        if kind == "masked":
            survivors = tuple(left)
    return survivors


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(attempts(), st.data())
def test_the_exact_sum_of_the_survivors_or_a_clean_end(attempt: Attempt, data: st.DataObject) -> None:
    layout = attempt.layout
    if data.draw(st.booleans()):
        vectors = {n: drawn_vector(data.draw, layout, seed) for seed, n in enumerate(attempt.cohort)}
        readable = True
    else:  # any elements of the ring, which need not be an update
        rng = np.random.default_rng(1)
        vectors = {n: rng.integers(0, layout.ring_mask, layout.length, np.uint32, True) for n in attempt.cohort}
        readable = False
    silent = data.draw(silences(attempt.cohort, len(attempt.cohort) - attempt.terms.survivors))
    survivors = outcome(attempt, silent)
    try:
        played = play(attempt, vectors, silent)
    except AttemptFailed as error:
        event("a clean end")
        assert survivors is None
        ended: Played = error.played  # type: ignore[attr-defined]
        assert_clean_end(ended, error.aggregator)  # type: ignore[attr-defined]
        return
    event(f"a sum without {len(attempt.cohort) - len(played.survivors.names)}")
    assert played.survivors.names == survivors
    expected = plain_sum((vectors[name] for name in survivors), layout)
    assert (played.total.dtype, played.total.tobytes()) == (np.dtype(np.uint32), expected.tobytes())
    assert_one_secret_of_each(played)
    if readable:
        found, plain = decode(played.total, layout, members=len(survivors)), decode(expected, layout)
        assert found.counters == plain.counters
        assert found.update.tobytes() == plain.update.tobytes()
        assert found.void == sum(bool((vectors[name] == void(layout)).all()) for name in survivors)


def assert_clean_end(played: Played, aggregator: Aggregator) -> None:
    """The aggregator holds nothing; a share was revealed only after t consents, else nobody gives one now either."""
    for part in everything_in(aggregator):
        assert not part.any() if isinstance(part, np.ndarray) else part in {*ROSTER.keys.values(), aggregator._key_list}
    t = played.attempt.terms.threshold
    if len(played.consents.signatures) >= t:
        return
    assert not played.revealed
    signatures = {name: consent.signature for name, consent in played.consent.items()}
    for name in played.before[Phase.CONSENTS]:
        member = played.member(name, Phase.CONSENTS)
        message = Consents(played.attempt.plan, signatures)
        if member.phase is Phase.CONSENTS:
            assert refused(lambda member=member, message=message: member.on_consents(message)) == (
                reasons.SIGNATURES_UNVERIFIED
            )
            assert_wiped(member)


def assert_one_secret_of_each(played: Played) -> None:
    """By what members hold: all shares revealed of a name are of one secret, the right one, and they open to it."""
    members = set(played.shares)
    for name in members:
        survives = name in played.survivors.names
        for revealer, message in played.revealed.items():
            assert set(message.shares) == members
            both = played.held(revealer).shares[name]
            assert message.shares[name] == (both[:SHARE_BYTES] if survives else both[SHARE_BYTES:])
        secret = opened(played, name, {revealer: m.shares[name] for revealer, m in played.revealed.items()})
        hidden = played.held(name)
        assert secret == (hidden.self_seed if survives else hidden.mask_seed)


def opened(played: Played, name: str, shares: Mapping[str, bytes]) -> bytes:
    points = [played.attempt.point(revealer) for revealer in shares]
    return combine(weights(points), list(shares.values()))


@pytest.mark.parametrize("silent", SILENCES)
@pytest.mark.parametrize("who", [0, 2, 3])
def test_four_members_bear_the_silence_of_any_one_at_any_time(silent: str, who: int) -> None:
    attempt = make_attempt(4)
    vectors = {name: make_vector(attempt, seed) for seed, name in enumerate(attempt.cohort)}
    played = play(attempt, vectors, {attempt.cohort[who]: silent})
    assert len(played.survivors.names) == (4 if silent in ("consent", "revealed") else 3)
    assert played.total.tolist() == plain_sum((vectors[n] for n in played.survivors.names), attempt.layout).tolist()


@pytest.mark.parametrize("silent", SILENCES)
def test_three_members_bear_none(silent: str) -> None:
    attempt = make_attempt(3)
    vectors = {name: make_vector(attempt, seed) for seed, name in enumerate(attempt.cohort)}
    assert len(play(attempt, vectors).survivors.names) == 3
    with pytest.raises(AttemptFailed, match="2 of 3 members are left, 3 are needed"):
        play(attempt, vectors, {"birch": silent})


@pytest.mark.parametrize("when", SILENCES)
def test_as_many_as_the_terms_say_may_fall_silent_and_not_one_more(when: str) -> None:
    attempt = make_attempt(9, colluders=2)
    assert attempt.terms.dropouts == 3
    vectors = {name: make_vector(attempt, seed) for seed, name in enumerate(attempt.cohort)}
    silent = dict.fromkeys(("alder", "fir", "juniper"), when)
    played = play(attempt, vectors, silent)
    assert played.total.tolist() == plain_sum((vectors[n] for n in played.survivors.names), attempt.layout).tolist()
    with pytest.raises(AttemptFailed):
        play(attempt, vectors, {**silent, "cedar": when})


def test_long_vectors_over_the_borders_of_every_block() -> None:
    for length in (1 << 15, (1 << 17) - 29, (1 << 17) + 3):
        attempt = make_attempt(4, parameters=length)
        vectors = {name: make_vector(attempt, seed) for seed, name in enumerate(attempt.cohort)}
        played = play(attempt, vectors, {"birch": "masked"})
        survivors = played.survivors.names
        expected = np.sum([vectors[name].astype(np.uint64) for name in survivors], axis=0) % 2**attempt.layout.ring_bits
        assert np.array_equal(played.total, expected)


def test_a_repeat_has_nothing_of_the_attempt_before() -> None:
    """Fresh keys among fewer members, on the first attempt's terms: the same vectors, the sum of those who are left."""
    first = make_attempt(6, number=1)
    vectors = {name: make_vector(first, seed) for seed, name in enumerate(first.cohort)}
    with pytest.raises(AttemptFailed) as caught:
        play(first, vectors, {"fir": "masked", "gum": "shares", "alder": "masked"})
    before: Played = caught.value.played  # type: ignore[attr-defined]
    second = make_attempt(("birch", "cedar", "elm", "fir"), members=6, number=2)
    after = play(second, {name: vectors[name] for name in second.cohort})
    assert after.total.tolist() == plain_sum((vectors[n] for n in second.cohort), second.layout).tolist()
    assert not said_by_members(before) & said_by_members(after)


# --- Snapshots ------------------------------------------------------------------------------------------------------


def test_an_attempt_goes_on_from_snapshots_after_every_phase() -> None:
    attempt = make_attempt(5)
    vectors = {name: make_vector(attempt, seed) for seed, name in enumerate(attempt.cohort)}
    aggregator = Aggregator(attempt, ROSTER)
    members = {name: Participant(attempt, IDENTITIES[name], ROSTER, simulated=True) for name in attempt.cohort}

    def elsewhere() -> None:
        for name, member in members.items():
            snapshot = snapshot_for_simulation(member)
            members[name] = restore_in_simulation(snapshot, attempt, IDENTITIES[name], ROSTER)
            assert snapshot_for_simulation(members[name]) == snapshot
            member.wipe()

    for name, member in members.items():
        aggregator.on_keys(name, member.keys())
    elsewhere()
    key_list = aggregator.key_list()
    for name, member in members.items():
        aggregator.on_shares(name, member.on_key_list(key_list))
    elsewhere()
    inboxes = aggregator.inboxes()
    del members["birch"]
    for name, member in members.items():
        aggregator.on_masked(name, member.on_inbox(inboxes[name], vectors[name]))
    elsewhere()
    survivors = aggregator.survivors()
    for name, member in members.items():
        aggregator.on_consent(name, member.on_survivors(survivors, lambda names: None))
    elsewhere()
    consents = aggregator.consents()
    for name, member in members.items():
        aggregator.on_revealed(name, member.on_consents(consents))
    elsewhere()
    assert aggregator.unmask().tolist() == plain_sum((vectors[name] for name in members), attempt.layout).tolist()
    for member in members.values():
        assert_wiped(member)


# --- Two runs over equal input --------------------------------------------------------------------------------------


def said_by_members(played: Played) -> set[bytes]:
    """Every key, commitment, ciphertext, signature and share that left a member."""
    found: list[bytes] = []
    for keys in played.keys.values():
        found += [keys.share_key, keys.mask_key, keys.commitment, keys.signature]
    for shares in played.shares.values():
        for sealed in shares.sealed.values():
            found += [sealed.shares, sealed.pair, sealed.signature]
    found += [consent.signature for consent in played.consent.values()]
    found += [share for revealed in played.revealed.values() for share in revealed.shares.values()]
    found += [masked.vector.tobytes() for masked in played.masked.values()]
    return {part for part in found if part}


LENGTH = 50_000


@pytest.fixture(scope="module")
def twice() -> tuple[Played, Played]:
    """The very same attempt at the very same vectors, started twice."""
    attempt = make_attempt(4, parameters=LENGTH)
    vectors = {name: make_vector(attempt, seed) for seed, name in enumerate(attempt.cohort)}
    return play(attempt, vectors, {"cedar": "masked"}), play(attempt, vectors, {"cedar": "masked"})


def masked_elements(played: Played, name: str) -> NDArray[np.uint32]:
    layout = played.attempt.layout
    return unpack(played.masked[name].vector, layout.length, layout.ring_bits)


def correlation(one: NDArray[np.uint32], other: NDArray[np.uint32]) -> float:
    """In standard errors."""
    return abs(float(np.corrcoef(one.astype(np.float64), other.astype(np.float64))[0, 1])) * math.sqrt(len(one))


def test_two_runs_over_equal_input_have_nothing_in_common_but_the_sum(twice: tuple[Played, Played]) -> None:
    one, other = twice
    assert one.total.tolist() == other.total.tolist()
    assert one.attempt == other.attempt
    assert not said_by_members(one) & said_by_members(other)
    for held, again in ((one.held(name), other.held(name)) for name in one.attempt.cohort):
        first = {held.share_seed, held.mask_seed, held.self_seed}
        assert len(first | {again.share_seed, again.mask_seed, again.self_seed}) == 6


def test_masked_vectors_of_two_runs_are_independent(twice: tuple[Played, Played]) -> None:
    """Equal elements as often as chance has it, no correlation, and a difference that is uniform."""
    one, other = twice
    bits, names = one.attempt.layout.ring_bits, one.survivors.names
    expected = one.attempt.layout.length / 2**bits  # a fiftieth of an element
    for name in names:
        first, second = masked_elements(one, name), masked_elements(other, name)
        assert int((first == second).sum()) <= expected + 5  # six or more: once in 10^12
        assert correlation(first, second) < 7
        assert buckets(first - second, bits) < LIMIT
        assert correlation(first, one.vectors[name]) < 7
    for name, neighbour in itertools.pairwise(names):
        assert correlation(masked_elements(one, name), masked_elements(one, neighbour)) < 7


LIMIT = 426.0  # chi-square of 255 degrees of freedom goes beyond it once in 10^10


def buckets(elements: NDArray[np.uint32], bits: int) -> float:
    """The larger chi-square of 256 buckets by the highest and the lowest eight bits of k."""
    found = []
    for shift in (bits - 8, 0):
        counts = np.bincount(elements >> np.uint32(shift) & np.uint32(255), minlength=256)
        expected = len(elements) / 256
        found.append(float(((counts - expected) ** 2).sum()) / expected)
    return max(found)


@pytest.mark.parametrize("vector", ["zero", "largest", "smallest", "void"])
def test_what_a_member_sends_is_uniform_over_the_ring_whatever_it_holds(vector: str) -> None:
    attempt = make_attempt(3, parameters=100_000)
    layout, rng = attempt.layout, np.random.default_rng(0)
    values = {"zero": 0.0, "largest": 1e30, "smallest": -1e30}
    mine = (
        void(layout)
        if vector == "void"
        else encode(np.full(layout.parameters, values[vector], np.float32), layout.max_weight, {}, layout, rng)
    )
    played = play(attempt, dict.fromkeys(attempt.cohort, mine))
    assert buckets(mine, layout.ring_bits) > LIMIT
    sent = [masked_elements(played, name) for name in attempt.cohort]
    for found in (*sent, sent[0] - sent[1], sent[0] + sent[1]):
        assert buckets(found, layout.ring_bits) < LIMIT
    # All three together are still under their self masks.
    assert buckets(sent[0] + sent[1] + sent[2], layout.ring_bits) < LIMIT


def test_one_secret_of_a_name_alone_leaves_its_vector_uniform(twice: tuple[Played, Played]) -> None:
    """After the end the coordinator can take off self masks; the masks of pairs of survivors stay."""
    played = twice[0]
    attempt, digest, bits = played.attempt, played.digest, played.attempt.layout.ring_bits
    for name in played.survivors.names:
        own = stream_key(attempt, digest, "self mask", played.held(name).self_seed, name)
        found = masked_elements(played, name)
        add_masks(found, [], [own])
        found &= np.uint32(attempt.layout.ring_mask)
        assert buckets(found, bits) < LIMIT
        assert correlation(found, played.vectors[name]) < 7


# --- What nobody sees -----------------------------------------------------------------------------------------------


def test_a_whole_attempt_logs_no_secret(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    attempt = make_attempt(5)
    vectors = {name: make_vector(attempt, seed) for seed, name in enumerate(attempt.cohort)}
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("common.secagg").debug("shown")
        played = play(attempt, vectors, {"elm": "masked"})
        with pytest.raises(AttemptFailed):
            play(attempt, vectors, {"elm": "masked", "fir": "masked"})
    assert "shown" in caplog.text
    digest, pairs = played.digest, []
    for name in attempt.cohort:
        for other in attempt.cohort:
            if name < other:
                seed = derive(played.held(name).mask_seed, attempt.pair_statement(digest, name, other))
                pairs += [seed, stream_key(attempt, digest, "pairwise mask", seed, name, other)]
    captured = capfd.readouterr()
    text = caplog.text + captured.out + captured.err + "".join(repr(vars(record)) for record in caplog.records)
    assert_hidden(text, [*played.secrets(), *pairs])
    assert_hidden(text, [vector[:8].tobytes() for vector in vectors.values()])


def test_the_check_for_hidden_secrets_finds_every_form() -> None:
    secret = secrets.token_bytes(32)
    for text in (repr(secret), f"{secret.hex()}", str(int.from_bytes(secret, "big")), str(list(secret))):
        with pytest.raises(AssertionError):
            assert_hidden(f"in the middle {text} of a line", [secret])
    assert_hidden("nothing", [secret])


def test_pair_seeds_meet_on_both_sides_and_differ_between_pairs(played: Played) -> None:
    attempt, digest = played.attempt, played.digest
    seeds = [
        derive(played.held(lower).mask_seed, attempt.pair_statement(digest, lower, higher))
        for lower in attempt.cohort
        for higher in attempt.cohort
        if lower < higher
    ]
    assert len(set(seeds)) == math.comb(len(attempt.cohort), 2)
