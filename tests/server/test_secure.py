"""The coordinator under secure aggregation: exact sums over whoever is left, and never a sum over too few.

Its members are real ones with marks on disk; each message goes through its wire form. A few of them misbehave.
"""

from __future__ import annotations

import itertools
import json
import logging
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from common import fixed_point
from common.adapter import Adapter
from common.config import Config
from common.errors import RunStopped, StorageError
from common.fixed_point import Decoded, Layout, Ring
from common.messages import (
    INTERNAL_ERROR,
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
from common.randomness import seeded
from common.secagg import reasons, shamir
from common.secagg.attempt import key_list_digest
from common.secagg.identity import Identity
from common.secagg.messages import (
    Consent,
    Consents,
    Inbox,
    KeyList,
    Keys,
    MaskedInput,
    Revealed,
    Shares,
    Survivors,
)
from common.secagg.participant import Participant
from common.secagg.sealing import seal
from common.secagg.terms import Terms
from common.wire import Wire, from_wire, size, to_wire
from server.attempts import Attempts
from server.collect import Clock, Collected, Heard, OnHeard
from server.rounds import cohort_of, groups_of
from server.secure import collect_securely
from tests.federations import (
    ADAPTER,
    BASE,
    NAMES,
    PARAMETERS,
    Answer,
    Federation,
    WiredMembers,
    adapter_of,
    federation_config,
    fitting,
    honestly,
    told,
)

A, B, C, D, E = NAMES[:5]
ABCD, FIVE = NAMES[:4], NAMES[:5]
PHASES: tuple[type[Request], ...] = (TrainRequest, KeyList, Inbox, Survivors, Consents)
LOG = "silotune.server"

Ask = Callable[[Request], Reply]


@pytest.fixture(autouse=True)
def _all_lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("silotune"), "propagate", True)
    monkeypatch.setattr(logging.getLogger(LOG), "propagate", True)
    caplog.set_level(logging.DEBUG, "silotune")


@pytest.fixture
def five(tmp_path: Path) -> Federation:
    """Five members, of whom t = 4 must stay: one may fall silent, at any time."""
    return Federation(tmp_path, federation_config(FIVE))


@pytest.fixture
def seven(tmp_path: Path) -> Federation:
    """Seven members, of whom t = 5 must stay."""
    return Federation(tmp_path, federation_config(NAMES))


def collect(
    federation: Federation,
    answer: Answer | WiredMembers = honestly,
    adapter: Adapter = ADAPTER,
    number: int = 1,
    cohort: tuple[str, ...] = (),
    on_heard: OnHeard = lambda _: None,
) -> Collected:
    """The sum as a coordinator comes to it whose process has just begun, or gone on after a kill."""
    members = answer if isinstance(answer, WiredMembers) else WiredMembers(federation, answer)
    plan = replace(federation.plan(cohort=cohort, adapter=adapter, round=number), secure=None)
    attempts = Attempts(attempts_file(federation))
    return collect_securely(plan, adapter, members, federation.config, federation.roster, attempts, Clock(), on_heard)


def attempts_file(federation: Federation) -> Path:
    return federation.root / "coordinator" / "attempts.json"


def written(federation: Federation) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(attempts_file(federation).read_text())[0]
    return found


def is_the_plain_sum(
    federation: Federation, collected: Collected, names: tuple[str, ...], members: int = 0, adapter: Adapter = ADAPTER
) -> bool:
    """Whether it holds the vectors of `names`, of a layout for `members` (all, unless said), bit for bit."""
    plan = federation.plan(first=members or len(federation.names), cohort=names, adapter=adapter)
    expected = fixed_point.decode(federation.total(plan, names), plan.layout)
    assert collected.contributors == names
    return same(collected.summed, expected)


def same(one: Decoded, other: Decoded) -> bool:
    return one.update.tobytes() == other.update.tobytes() and dict(one.counters) == dict(other.counters)


def who_falls(how: str, kind: type[Request], *names: str, attempts: int = 99) -> Answer:
    """`names` fall silent when asked for `kind`, in the first `attempts` attempts that come this far.

    how: `refused`, they say so; `silent`, the question never arrives; `lost`, the answer does not.
    """
    seen: dict[str, int] = {}

    def answer(name: str, request: Request, ask: Ask) -> Reply:
        if name not in names or type(request) is not kind:
            return ask(request)
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > attempts:
            return ask(request)
        if how == "refused":
            return Refused(INTERNAL_ERROR, name)
        if how == "lost":
            ask(request)
        return Refused(TIMED_OUT)

    return answer


def both(*answers: Answer) -> Answer:
    """Several of these, one around the other."""

    def answer(name: str, request: Request, ask: Ask) -> Reply:
        for one in answers:
            ask = _around(one, name, ask)
        return ask(request)

    return answer


def _around(answer: Answer, name: str, ask: Ask) -> Ask:
    return lambda request: answer(name, request, ask)


def attempts_of(members: WiredMembers) -> list[Plan]:
    """The plans of all attempts, in order."""
    first = [next(iter(asked.values())) for asked in members.requests]
    return [request.plan for request in first if isinstance(request, TrainRequest)]


def sets_named(members: WiredMembers) -> list[tuple[str, ...]]:
    first = [next(iter(asked.values())) for asked in members.requests]
    return [request.names for request in first if isinstance(request, Survivors)]


# ---- an honest round -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [3, 4, 7])
def test_the_sum_is_the_plain_sum_bit_for_bit(count: int, tmp_path: Path) -> None:
    names = NAMES[:count]
    federation = Federation(tmp_path, federation_config(names))
    members = WiredMembers(federation)
    collected = collect(federation, members)
    assert is_the_plain_sum(federation, collected, names)
    assert (dict(collected.refused), collected.attempts) == ({}, 1)
    assert members.asked == [(names, kind) for kind in PHASES]
    assert members.patience == [60.0, 7.0, 7.0, 7.0, 7.0]


def test_rounds_follow_each_other(five: Federation) -> None:
    for number in (1, 2, 3):
        adapter = adapter_of(number)
        cohort = FIVE if number != 2 else ABCD
        collected = collect(five, adapter=adapter, number=number, cohort=cohort)
        assert is_the_plain_sum(five, collected, cohort, members=len(cohort), adapter=adapter)
    assert written(five)["number"] == 3


def test_bytes_are_the_most_that_anybody_sent_and_received(five: Federation) -> None:
    members = WiredMembers(five, who_falls("refused", Inbox, E))
    collected = collect(five, members)
    down = sum(max(size(to_wire(request)) for request in asked.values()) for asked in members.requests)
    up = sum(max(size(to_wire(reply)) for name, reply in replies if name != E) for replies in members.replies)
    assert (collected.bytes_up, collected.bytes_down) == (up, down)


WORDS = ("train", "shares", "masked input", "consent", "unmask")
"""What is told of each of PHASES."""


def asked_and_answered(number: int, attempt: int, phase: str, names: tuple[str, ...]) -> list[Heard]:
    """What is told of a question to `names` which all answer in order, with what they were asked for or a refusal."""
    return [Heard(number, attempt, phase, names[:count], names[count:]) for count in range(len(names) + 1)]


def test_whoever_watches_is_told_of_every_question_and_every_answer(five: Federation) -> None:
    seen: list[Heard] = []
    collect(five, on_heard=seen.append, number=3)
    assert seen == [heard for phase in WORDS for heard in asked_and_answered(3, 1, phase, FIVE)]


@pytest.mark.parametrize(("place", "kind"), list(enumerate(PHASES)))
def test_who_leaves_at_a_question_is_waited_for_at_none_that_follows(
    place: int, kind: type[Request], five: Federation
) -> None:
    seen: list[Heard] = []
    collect(five, who_falls("silent", kind, B), on_heard=seen.append, number=3)
    left = tuple(name for name in FIVE if name != B)
    # The set that consents is named when all vectors are in; who leaves then is asked no more either.
    assert seen == [
        heard
        for number, phase in enumerate(WORDS)
        for heard in asked_and_answered(3, 1, phase, FIVE if number <= place else left)
    ]


def test_whoever_watches_is_told_which_attempt_it_is(five: Federation) -> None:
    seen: list[Heard] = []
    collect(five, who_falls("silent", KeyList, B, D, attempts=1), on_heard=seen.append)
    # With two of five gone at the second question, and one who may be, nobody is asked the third.
    assert seen == [
        *asked_and_answered(1, 1, "train", FIVE),
        *asked_and_answered(1, 1, "shares", FIVE),
        *(heard for phase in WORDS for heard in asked_and_answered(1, 2, phase, FIVE)),
    ]


# ---- dropouts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["refused", "silent", "lost"])
@pytest.mark.parametrize("kind", PHASES)
@pytest.mark.parametrize("gone", [(A,), (D, NAMES[6])], ids=["the first", "two others"])
def test_up_to_n_minus_t_may_fall_at_any_phase(
    gone: tuple[str, ...], kind: type[Request], how: str, seven: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    members = WiredMembers(seven, who_falls(how, kind, *gone))
    collected = collect(seven, members)
    late = kind in (Survivors, Consents)  # their vectors are in the sum already
    left = NAMES if late else tuple(name for name in NAMES if name not in gone)
    assert is_the_plain_sum(seven, collected, left)
    code = INTERNAL_ERROR if how == "refused" else TIMED_OUT
    assert dict(collected.refused) == ({} if late else dict.fromkeys(gone, code))
    assert collected.attempts == 1
    assert all(told(caplog.records, LOG, f"round 1, attempt 1: {name} left: {code}") for name in gone)


def test_different_members_may_fall_at_different_phases(seven: Federation) -> None:
    answer = both(who_falls("silent", KeyList, B), who_falls("lost", Inbox, D))
    assert is_the_plain_sum(seven, collect(seven, answer), (A, C, *NAMES[4:]))


@pytest.mark.parametrize("how", ["refused", "silent", "lost"])
@pytest.mark.parametrize("kind", PHASES)
def test_one_more_and_there_is_no_sum_however_often_it_is_tried(
    kind: type[Request], how: str, five: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    members = WiredMembers(five, who_falls(how, kind, B, D))
    code = INTERNAL_ERROR if how == "refused" else TIMED_OUT
    with pytest.raises(RunStopped) as raised:
        collect(five, members)
    said = str(raised.value)
    assert "round 1: 3 attempts gave no sum" in said
    assert f"3 of 5 members are left, 4 are needed (birch: {code}, dogwood: {code})" in said
    assert "then resume" in said
    plans = attempts_of(members)
    assert [plan.secure.attempt for plan in plans if plan.secure] == [1, 2, 3]
    assert all(told(caplog.records, LOG, f"round 1: attempt {number} gave no sum") for number in (1, 2, 3))
    nothing_is_known(members, five)


def nothing_is_known(members: WiredMembers, federation: Federation) -> None:
    """In no attempt did t members reveal their shares, and no two sets were named."""
    revealed = [
        sum(isinstance(reply, Revealed) for _, reply in replies)
        for replies, (_, kind) in zip(members.replies, members.asked, strict=True)
        if kind is Consents
    ]
    assert all(count < Terms.of(len(federation.names), 1, 3).threshold for count in revealed)
    assert len(set(sets_named(members))) <= 1


def test_no_more_repeats_than_the_configuration_says(tmp_path: Path) -> None:
    federation = Federation(tmp_path, federation_config(FIVE, repeats=0))
    members = WiredMembers(federation, who_falls("silent", Inbox, A, B, attempts=1))
    with pytest.raises(RunStopped, match="round 1: 1 attempts gave no sum"):
        collect(federation, members)
    assert is_the_plain_sum(federation, collect(federation, members), FIVE)


def test_a_repeat_keeps_n_and_t_and_leaves_out_who_fell_silent(five: Federation) -> None:
    """Birch is gone for good, dogwood and elm for one attempt and in another phase."""
    answer = both(who_falls("silent", KeyList, B), who_falls("silent", Inbox, D, attempts=1))
    members = WiredMembers(five, answer)
    collected = collect(five, members)
    assert is_the_plain_sum(five, collected, (A, C, D, E))
    first, second = attempts_of(members)
    assert first.secure is not None
    assert second.secure is not None
    assert second.secure == replace(first.secure, attempt=2)
    assert collected.attempts == 2
    # Three are too few, so all five were asked again.
    assert (first.cohort, second.cohort) == (FIVE, FIVE)
    assert dict(collected.refused) == {B: TIMED_OUT}


def test_a_round_that_was_killed_before_a_set_was_named_may_go_on_with_fewer(five: Federation) -> None:
    with pytest.raises(Killed):
        collect(five, killed_at(Inbox, C))
    with pytest.raises(RunStopped, match="3 institutions are left of the 5 that this round began with, 4 are needed"):
        collect(five, cohort=ABCD[:3])
    members = WiredMembers(five)
    collected = collect(five, members, cohort=ABCD)
    assert is_the_plain_sum(five, collected, ABCD)
    (plan,) = attempts_of(members)
    assert plan.secure is not None
    assert (plan.secure.attempt, plan.secure.terms) == (2, Terms.of(5, 1, 3))


def test_members_train_once_for_all_attempts(five: Federation) -> None:
    collect(five, who_falls("lost", Inbox, A, B, attempts=2))
    assert five.trained == dict.fromkeys(FIVE, 1)


# ---- once a set is named -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["silent", "lost"])
def test_once_survivors_were_named_a_repeat_names_exactly_them(how: str, seven: Federation) -> None:
    """Alder's vector is not in the set, so alder is not asked again, however well it is by then."""
    left = NAMES[1:]
    answer = both(who_falls("silent", Inbox, A, attempts=1), who_falls(how, Survivors, B, C, attempts=1))
    members = WiredMembers(seven, answer)
    collected = collect(seven, members)
    assert is_the_plain_sum(seven, collected, left)
    assert [plan.cohort for plan in attempts_of(members)] == [NAMES, left]
    assert set(sets_named(members)) == {left}
    assert dict(collected.refused) == {A: TIMED_OUT}


def test_a_named_set_that_is_not_whole_is_asked_again_and_no_smaller_one_is_named(
    five: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    """All five signed, two signatures were lost, and in the repeat elm is away for a while: nobody may sign for four,
    and the sum of five is still there to be had.
    """
    seen = 0

    def answer(name: str, request: Request, ask: Ask) -> Reply:
        nonlocal seen
        if isinstance(request, Inbox) and name == E:
            seen += 1
            if seen == 2:
                return Refused(TIMED_OUT)
        return ask(request)

    members = WiredMembers(five, both(who_falls("lost", Survivors, A, B, attempts=1), answer))
    collected = collect(five, members)
    assert is_the_plain_sum(five, collected, FIVE)
    assert collected.attempts == 3
    assert set(sets_named(members)) == {FIVE}
    assert told(caplog.records, LOG, "attempt 2 gave no sum", "4 of the 5", "without elm", f"elm: {TIMED_OUT}")


def test_a_named_set_of_whom_one_is_gone_stops_the_run_until_it_is_back(five: Federation) -> None:
    gone = WiredMembers(five, both(who_falls("lost", Survivors, A, B, attempts=1), away_after(E, attempts=1)))
    with pytest.raises(RunStopped, match=r"3 attempts gave no sum; .* 4 of the 5 .* \(elm: timed_out\)"):
        collect(five, gone)
    assert written(five)["survivors"] == list(FIVE)
    nothing_is_known(gone, five)
    assert is_the_plain_sum(five, collect(five), FIVE)


def away_after(name: str, attempts: int) -> Answer:
    """A member that is there for so many attempts and then no more."""
    seen = 0

    def answer(asked: str, request: Request, ask: Ask) -> Reply:
        nonlocal seen
        seen += asked == name and isinstance(request, TrainRequest)
        return Refused(TIMED_OUT) if asked == name and seen > attempts else ask(request)

    return answer


def test_a_set_is_on_disk_before_anybody_is_asked_to_sign_it_and_a_number_before_it_is_used(five: Federation) -> None:
    seen: list[tuple[type[Request], int, list[str] | None]] = []

    def answer(name: str, request: Request, ask: Ask) -> Reply:
        if isinstance(request, TrainRequest | Survivors):
            seen.append((type(request), written(five)["number"], written(five)["survivors"]))
        return ask(request)

    collect(five, answer)
    assert seen == [(TrainRequest, 1, None)] * 5 + [(Survivors, 1, list(FIVE))] * 5


class Killed(BaseException):
    """The coordinator's process ends."""


def killed_at(kind: type[Request], name: str) -> Answer:
    def answer(asked: str, request: Request, ask: Ask) -> Reply:
        if asked == name and type(request) is kind:
            raise Killed
        return ask(request)

    return answer


@pytest.mark.parametrize("kind", PHASES)
def test_a_coordinator_that_was_killed_goes_on_under_the_same_rules(kind: type[Request], five: Federation) -> None:
    with pytest.raises(Killed):
        collect(five, both(who_falls("silent", Inbox, A), killed_at(kind, C)))
    members = WiredMembers(five)
    collected = collect(five, members)
    named = kind in (Survivors, Consents)
    assert is_the_plain_sum(five, collected, FIVE[1:] if named else FIVE)
    (plan,) = attempts_of(members)
    assert plan.secure is not None
    assert plan.secure.attempt == 2
    assert plan.secure.terms == Terms.of(5, 1, 3)
    assert collected.attempts == 1


def test_a_coordinator_that_forgot_its_attempts_gets_no_second_sum(five: Federation) -> None:
    """A coordinator that deletes its file, or lies about it, meets the members' own marks."""
    collect(five)
    attempts_file(five).unlink()
    with pytest.raises(RunStopped, match=r"alder: terms_differ, birch: terms_differ"):
        collect(five, cohort=ABCD)
    forged = {"number": 9, "adapter": ADAPTER.digest(), "members": FIVE, "survivors": None}
    attempts_file(five).write_text(json.dumps([forged]))
    with pytest.raises(RunStopped, match=r"alder: survivors_differ, birch: survivors_differ"):
        collect(five, cohort=ABCD)
    assert is_the_plain_sum(five, collect(five), FIVE)  # the one that they consented to is nothing new


def test_a_file_of_attempts_that_is_damaged_stops_everything(five: Federation) -> None:
    collect(five)
    attempts_file(five).write_text("{")
    sent = len(five.sent)
    with pytest.raises(StorageError, match=r"attempts\.json cannot be read"):
        collect(five)
    assert len(five.sent) == sent


# ---- members that misbehave ----------------------------------------------------------------------------------------

Change = Callable[[Federation, Plan, Reply], Reply]


class Liar:
    """One member's answers to one kind of request, as `change` makes them; it knows the plan and its own identity."""

    def __init__(
        self, federation: Federation, name: str, kind: type[Request], change: Change, attempts: int = 99
    ) -> None:
        self.federation, self.name, self.kind, self.change, self.attempts = federation, name, kind, change, attempts
        self.plan: Plan | None = None
        self.list: KeyList | None = None

    def __call__(self, name: str, request: Request, ask: Ask) -> Reply:
        if isinstance(request, TrainRequest):
            self.plan = request.plan
        if isinstance(request, KeyList):
            self.list = request
        reply = ask(request)
        if name != self.name or type(request) is not self.kind or self.attempts == 0:
            return reply
        self.attempts -= 1
        assert self.plan is not None
        return self.change(self.federation, self.plan, reply)


def keys(change: Callable[[Federation, Plan, Keys], Keys]) -> Change:
    def changed(federation: Federation, plan: Plan, reply: Reply) -> Reply:
        assert isinstance(reply, Keys)
        return change(federation, plan, reply)

    return changed


def shares(change: Callable[[Shares], Shares]) -> Change:
    def changed(federation: Federation, plan: Plan, reply: Reply) -> Reply:
        assert isinstance(reply, Shares)
        return change(reply)

    return changed


def masked(change: Callable[[Ring, Plan], Ring]) -> Change:
    def changed(federation: Federation, plan: Plan, reply: Reply) -> Reply:
        assert isinstance(reply, MaskedInput)
        return replace(reply, vector=change(reply.vector, plan))

    return changed


def consent(change: Callable[[Federation, bytes], bytes]) -> Change:
    def changed(federation: Federation, plan: Plan, reply: Reply) -> Reply:
        assert isinstance(reply, Consent)
        return replace(reply, signature=change(federation, reply.signature))

    return changed


def revealed(change: Callable[[dict[str, bytes]], dict[str, bytes]]) -> Change:
    def changed(federation: Federation, plan: Plan, reply: Reply) -> Reply:
        assert isinstance(reply, Revealed)
        return replace(reply, shares=change(dict(reply.shares)))

    return changed


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


def test_a_false_share_of_one_who_is_not_needed_changes_nothing(five: Federation) -> None:
    liar = Liar(five, E, Consents, revealed(lambda found: dict.fromkeys(found, bytes(shamir.SHARE_BYTES))))
    assert is_the_plain_sum(five, collect(five, liar), FIVE)


FALSE_SHARES = [
    pytest.param(lambda s: dict.fromkeys(s, bytes(shamir.SHARE_BYTES)), id="zeros"),
    pytest.param(lambda s: dict.fromkeys(s, b"\xff" * shamir.SHARE_BYTES), id="above the prime"),
    pytest.param(lambda s: {**s, A: s[B], B: s[A]}, id="two names swapped"),
    pytest.param(lambda s: {**s, C: (int.from_bytes(s[C], "big") ^ 1).to_bytes(66, "big")}, id="one bit of one"),
]


@pytest.mark.parametrize("change", FALSE_SHARES)
def test_false_shares_never_give_a_false_sum(
    change: Callable[[dict[str, bytes]], dict[str, bytes]], five: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    """One of five may lie where four are enough. When two do, once, the attempt is repeated; always, the run stops. The
    set stays the one that was named.
    """

    def liars(attempts: int = 99) -> Answer:
        return both(*(Liar(five, name, Consents, revealed(change), attempts=attempts) for name in (A, D)))

    one = collect(five, WiredMembers(five, Liar(five, A, Consents, revealed(change))))
    assert is_the_plain_sum(five, one, FIVE)
    assert one.attempts == 1
    later = adapter_of(2)
    collected = collect(five, WiredMembers(five, liars(attempts=1)), later, 2)
    assert is_the_plain_sum(five, collected, FIVE, adapter=later)
    assert collected.attempts == 2
    assert told(caplog.records, LOG, "attempt 2 gave no sum", "cannot be reconstructed")
    later = adapter_of(3)
    members = WiredMembers(five, liars())
    with pytest.raises(RunStopped, match=r"3 attempts gave no sum; .* cannot be reconstructed.*\(nobody refused\)"):
        collect(five, members, later, 3)
    assert set(sets_named(members)) == {FIVE}


def spoiling(name: str, attempts: int) -> Answer:
    """A member whose masked input is wrong in one bit of the first element."""

    def answer(asked: str, request: Request, ask: Ask) -> Reply:
        nonlocal attempts
        reply = ask(request)
        if asked != name or not isinstance(reply, MaskedInput) or not attempts:
            return reply
        attempts -= 1
        spoilt = reply.vector.copy()
        spoilt[0] ^= np.uint32(1)
        return replace(reply, vector=spoilt)

    return answer


def test_a_corrupt_sum_is_not_used_and_the_attempt_is_repeated(
    five: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    members = WiredMembers(five, both(spoiling(C, attempts=1), who_falls("silent", Inbox, A, attempts=1)))
    collected = collect(five, members)
    assert is_the_plain_sum(five, collected, FIVE[1:])
    assert collected.attempts == 2
    assert told(caplog.records, LOG, "round 1: attempt 1 gave no sum: the sum is corrupt")
    assert set(sets_named(members)) == {FIVE[1:]}


def test_a_sum_that_stays_corrupt_stops_the_run(five: Federation) -> None:
    with pytest.raises(RunStopped, match=r"3 attempts gave no sum; the last: the sum is corrupt.*nobody refused"):
        collect(five, spoiling(C, attempts=99))


def test_a_false_pair_seed_of_one_who_falls_silent_is_found_in_the_sum(five: Federation) -> None:
    """Alder seals seeds that do not follow from its mask seed, and leaves: its masks cannot be taken off."""
    liar = Liar(five, A, KeyList, shares(lambda s: s), attempts=1)

    def reseal(federation: Federation, plan: Plan, reply: Reply) -> Reply:
        assert isinstance(reply, Shares)
        assert liar.list is not None
        attempt, digest = plan.attempt, key_list_digest(plan.attempt, liar.list.keys)
        false = {}
        for name, sealed in reply.sealed.items():
            pair = seal(bytes(32), liar.list.keys[name].mask_key, attempt.pair_info(digest, A, name))
            statement = attempt.sealed_statement(digest, A, name, sealed.shares, pair)
            false[name] = replace(sealed, pair=pair, signature=federation.identities[A].sign(statement))
        return replace(reply, sealed=false)

    liar.change = reseal
    members = WiredMembers(five, both(liar, who_falls("lost", Inbox, A)))
    collected = collect(five, members)
    assert is_the_plain_sum(five, collected, FIVE[1:])
    assert collected.attempts == 2
    assert dict(collected.refused) == {A: TIMED_OUT}


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


# ---- any federation, any dropouts, any vectors ---------------------------------------------------------------------

falls = st.tuples(st.sampled_from(PHASES), st.sampled_from(["refused", "silent", "lost"]), st.integers(1, 3))
updates = arrays.arrays(np.float32, PARAMETERS, elements=st.floats(-3, 3, width=32) | st.just(float("nan")))


@st.composite
def federations(draw: st.DrawFn) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """How many; who falls where, how, and in how many attempts; and everybody's update with its weight."""
    count = draw(st.integers(3, 7))
    who = draw(st.lists(st.sampled_from(NAMES[:count]), max_size=4, unique=True))
    return (
        count,
        {name: draw(falls) for name in who},
        {name: (draw(updates), draw(st.integers(1, 63))) for name in NAMES[:count]},
    )


@given(federations())
@settings(deadline=None, derandomize=True, max_examples=30)
def test_whoever_falls_whenever_it_is_the_exact_sum_or_none(
    drawn: tuple[int, dict[str, Any], dict[str, Any]],
) -> None:
    count, falling, contents = drawn
    names = NAMES[:count]

    def vector(name: str, digest: str, layout: Layout) -> Ring:
        update, weight = contents[name]
        counters = {"train_loss": 1000, "train_tokens": len(name)}
        return fixed_point.encode(update, weight, counters, layout, seeded("rounding", name))

    with tempfile.TemporaryDirectory() as root:
        federation = Federation(Path(root), federation_config(names))
        federation.vector = vector
        answers = [who_falls(how, kind, name, attempts=n) for name, (kind, how, n) in falling.items()]
        members = WiredMembers(federation, both(*answers))
        terms = Terms.of(count, 1, 3)
        try:
            collected = collect(federation, members)
        except RunStopped:
            assert len(falling) > terms.dropouts
            nothing_is_known(members, federation)
            return
        assert len(collected.contributors) >= terms.survivors
        assert is_the_plain_sum(federation, collected, collected.contributors, members=count)
        assert set(sets_named(members)) == {collected.contributors}
        assert set(collected.contributors) | set(collected.refused) == set(names)
        assert set(collected.refused) <= set(falling)
        if len(falling) <= terms.dropouts:
            assert collected.attempts == 1


# ---- groups --------------------------------------------------------------------------------------------------------


def grouped(count: int, fraction: float, least: int, seed: int = 4) -> Config:
    names = tuple(f"clinic-{number:02d}" for number in range(count))
    return replace(federation_config(names, fraction=fraction, min_cohort=least), seed=seed)


@given(st.integers(3, 40), st.floats(0.05, 1.0), st.integers(3, 8), st.integers(0, 9))
@settings(deadline=None, derandomize=True, max_examples=100)
def test_groups_part_all_institutions_and_none_is_too_small(count: int, fraction: float, least: int, seed: int) -> None:
    if count < least:
        return
    config = grouped(count, fraction, least, seed)
    groups = groups_of(config)
    assert sorted(name for group in groups for name in group) == sorted(config.data.names)
    assert all(len(group) >= max(least, round(fraction * count)) for group in groups)
    assert groups == groups_of(replace(config, name="another", federation=replace(config.federation, rounds=9)))


def test_the_whole_federation_is_one_group_unless_a_fraction_is_asked_for() -> None:
    config = grouped(9, 1.0, 3)
    assert {cohort_of(config, config.data.names, number) for number in range(1, 9)} == {config.data.names}


def test_groups_take_turns_and_two_cohorts_are_the_same_or_have_nobody_in_common() -> None:
    """The sums of two cohorts that differ by one member would differ by its update."""
    config = grouped(12, 0.34, 3)
    cohorts = [cohort_of(config, config.data.names, number) for number in range(1, 10)]
    assert len(set(cohorts)) == 3
    assert cohorts == cohorts[:3] * 3
    assert all(one == other or not set(one) & set(other) for one in cohorts for other in cohorts)


@given(st.sets(st.integers(0, 11), max_size=9), st.integers(1, 6))
@settings(deadline=None, derandomize=True, max_examples=100)
def test_who_is_away_moves_nobody_to_another_group(away: set[int], number: int) -> None:
    config = grouped(12, 0.34, 3)
    groups = groups_of(config)
    present = tuple(name for index, name in enumerate(config.data.names) if index not in away)
    able = [group for group in groups if len(set(group) & set(present)) >= 3]
    if not able:
        with pytest.raises(RunStopped, match=f"{len(present)} institutions are present, but no group"):
            cohort_of(config, present, number)
        return
    cohort = cohort_of(config, present, number)
    (group,) = [group for group in able if set(cohort) <= set(group)]
    assert cohort == tuple(name for name in group if name in present)
    assert len(cohort) >= 3


def test_in_the_clear_cohorts_are_drawn_anew() -> None:
    config = grouped(12, 0.34, 3)
    config = replace(config, secure_aggregation=replace(config.secure_aggregation, enabled=False))
    assert len({cohort_of(config, config.data.names, number) for number in range(1, 10)}) > 3


def test_a_group_sums_under_terms_of_its_own(tmp_path: Path) -> None:
    federation = Federation(tmp_path, federation_config(NAMES, fraction=0.45))
    for number in (1, 2):
        adapter = adapter_of(number)
        cohort = cohort_of(federation.config, NAMES, number)
        members = WiredMembers(federation)
        collected = collect(federation, members, adapter, number, cohort)
        assert is_the_plain_sum(federation, collected, cohort, members=len(cohort), adapter=adapter)
        (plan,) = attempts_of(members)
        assert plan.secure is not None
        assert plan == fitting(plan)
        assert plan.secure.terms == Terms.of(len(cohort), 1, 3)
    assert sum(federation.trained.values()) == len(NAMES)
