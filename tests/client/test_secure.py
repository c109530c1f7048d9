"""What a malicious coordinator, alone or with a member, sends to an honest one; and what that one answers.

Each attack goes through the real messages to a real member with its marks on disk. It ends in a reason code, a line in
the member's own log, and nothing more from that member in that attempt.
"""

from __future__ import annotations

import json
import logging
import threading
from base64 import b64encode
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client import marks as marks_module
from client.app import build_client_app
from client.institution import Institution
from client.policy import Policy
from client.secure import SecureMember, Update
from common import fixed_point
from common.adapter import Adapter
from common.config import QuantiseConfig
from common.errors import Refusal
from common.flower import ROUND, from_records, to_records
from common.messages import (
    ADAPTER_DIGEST_DIFFERS,
    INTERNAL_ERROR,
    MALFORMED,
    METHOD_UNKNOWN,
    NOT_INVITED,
    STORAGE_FAILED,
    Contribution,
    Plan,
    Refused,
    Reply,
    Request,
    SecurePlan,
    TrainRequest,
)
from common.policy_reasons import BUDGET_EXHAUSTED
from common.secagg import reasons, shamir
from common.secagg.aggregator import Aggregator
from common.secagg.attempt import key_list_digest
from common.secagg.identity import Identity, Roster
from common.secagg.messages import (
    Consent,
    Consents,
    Inbox,
    KeyList,
    Keys,
    MaskedInput,
    Revealed,
    Sealed,
    Shares,
    Survivors,
)
from common.secagg.participant import Participant, Phase
from common.secagg.sealing import OVERHEAD, seal
from common.secagg.terms import Terms
from common.wire import Wire, from_wire, to_wire
from tests.client.conftest import NAMES as REAL_NAMES
from tests.client.conftest import make_config, make_plan
from tests.federations import (
    ADAPTER,
    NAMES,
    PARAMETERS,
    Coordinator,
    Federation,
    adapter_of,
    federation_config,
    fitting,
    kept,
    told,
    with_secure,
    with_terms,
)

A, B, C, D = NAMES[:4]
ABC, ABCD = NAMES[:3], NAMES[:4]


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Flower's own runtime says who sends a message; a simulation keeps an institution's log to itself."""
    for name, value in (("_task_id", 1), ("_run_id", 5), ("_node_id", 1)):
        monkeypatch.setattr(TaskIdentity, name, value)
    for name in NAMES:
        monkeypatch.setattr(logging.getLogger(f"silotune.client.{name}"), "propagate", True)
    caplog.set_level(logging.DEBUG, "silotune")


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    """Four members: t = 3 of them must stay to the end, T = 1 may collude."""
    return Federation(tmp_path)


@pytest.fixture
def five(tmp_path: Path) -> Federation:
    """Five members: t = 4."""
    return Federation(tmp_path, federation_config(NAMES[:5]))


@pytest.fixture(params=["wire", "flower"])
def routed(tmp_path: Path, request: pytest.FixtureRequest) -> Federation:
    """Four members, reached by the wire form alone or through Flower's records and the ClientApp."""
    return Federation(tmp_path, through_flower=request.param == "flower")


def gives_nothing_more(federation: Federation, coordinator: Coordinator, name: str) -> None:
    """Whatever an honest coordinator could still say in this attempt, and whatever a dishonest one could make up."""
    plan = coordinator.plan.digest()
    consents = {n: bytes(64) for n in coordinator.plan.cohort}
    for request in (
        coordinator.list or KeyList(plan, {}),
        coordinator.boxes.get(name, Inbox(plan, {})),
        coordinator.named or Survivors(plan, coordinator.plan.cohort),
        Consents(plan, consents),
    ):
        assert federation.ask(name, request) == Refused(reasons.ATTEMPT_OVER, name)


Attack = tuple[Coordinator, str, Request]
"""An attempt under way, the member that is lied to, and the lie."""


# ---- an honest round -----------------------------------------------------------------------------------------------


def test_an_honest_round_gives_the_plain_sum_bit_for_bit(routed: Federation) -> None:
    coordinator = routed.coordinator()
    assert coordinator.sum().tobytes() == routed.total(coordinator.plan, ABCD).tobytes()
    assert routed.trained == dict.fromkeys(ABCD, 1)
    for name in ABCD:
        gives_nothing_more(routed, coordinator, name)


def test_a_round_after_it_is_another_sum_with_an_update_of_its_own(federation: Federation) -> None:
    federation.coordinator().sum()
    later = adapter_of(2)
    coordinator = federation.coordinator(federation.plan(2, ABC, later, round=2))
    assert coordinator.sum(later).tobytes() == federation.total(coordinator.plan, ABC).tobytes()
    assert federation.trained == {A: 2, B: 2, C: 2, D: 1}


# ---- plans ---------------------------------------------------------------------------------------------------------


def settings_changed(plan: Plan, **changes: Any) -> Plan:
    return replace(plan, settings=replace(plan.settings, **changes))


def quantise_changed(plan: Plan, **changes: Any) -> Plan:
    return fitting(settings_changed(plan, quantise=replace(plan.settings.quantise, **changes)))


def other_roster(federation: Federation, *extra: str) -> str:
    """The digest of a roster in which birch has another key, or which has more names."""
    keys = dict(federation.roster.keys)
    for name in extra or (B,):
        keys[name] = Identity.generate(name).public
    return Roster(keys).digest()


PLANS = [
    pytest.param(lambda f: replace(f.plan(), secure=None), reasons.SECURE_AGGREGATION_REQUIRED, id="in the clear"),
    pytest.param(
        lambda f: with_secure(f.plan(), roster=other_roster(f)), reasons.ROSTER_DIFFERS, id="a roster with another key"
    ),
    pytest.param(
        lambda f: with_secure(f.plan(), roster=other_roster(f, "mallory")),
        reasons.ROSTER_DIFFERS,
        id="a roster with one more",
    ),
    pytest.param(lambda f: f.plan(cohort=(B, C, D)), reasons.COHORT_UNKNOWN, id="a cohort without the member"),
    pytest.param(
        lambda f: f.plan(cohort=(A, B, C, "mallory")), reasons.COHORT_UNKNOWN, id="a cohort padded with a stranger"
    ),
    pytest.param(
        lambda f: f.plan(cohort=(A, "mallory", "oscar")), reasons.COHORT_UNKNOWN, id="a cohort of strangers but for it"
    ),
    pytest.param(lambda f: replace(f.plan(), cohort=(B, A, C, D)), reasons.COHORT_UNKNOWN, id="a cohort out of order"),
    pytest.param(lambda f: replace(f.plan(), cohort=(A, B)), reasons.COHORT_TOO_SMALL, id="a cohort of two"),
    pytest.param(lambda f: replace(f.plan(), cohort=(A,)), reasons.COHORT_TOO_SMALL, id="a cohort of one"),
    pytest.param(lambda f: with_terms(f.plan(), threshold=4), reasons.TERMS_DIFFER, id="a higher t"),
    pytest.param(lambda f: with_terms(f.plan(), smallest=4), reasons.TERMS_DIFFER, id="a higher smallest set"),
    pytest.param(
        lambda f: with_terms(f.plan(), colluders=2, threshold=4, smallest=4), reasons.TERMS_DIFFER, id="a higher T"
    ),
    pytest.param(lambda f: with_terms(f.plan(), members=5, threshold=4), reasons.TERMS_DIFFER, id="n above the roster"),
    pytest.param(lambda f: with_terms(f.plan(), members=3), reasons.TERMS_DIFFER, id="n below the cohort"),
    pytest.param(lambda f: settings_changed(f.plan(), method="ffa"), METHOD_UNKNOWN, id="another method"),
    pytest.param(lambda f: settings_changed(f.plan(), weight_unit=2), reasons.SETTINGS_DIFFER, id="weight unit"),
    pytest.param(lambda f: quantise_changed(f.plan(), clip=8.0), reasons.SETTINGS_DIFFER, id="clip"),
    pytest.param(lambda f: quantise_changed(f.plan(), bits=12), reasons.SETTINGS_DIFFER, id="bits"),
    pytest.param(lambda f: quantise_changed(f.plan(), weight_bits=4), reasons.SETTINGS_DIFFER, id="weight bits"),
    pytest.param(lambda f: fitting(f.plan(parameters=13)), reasons.VECTOR_DIFFERS, id="a shorter update"),
    pytest.param(lambda f: fitting(f.plan(parameters=15)), reasons.VECTOR_DIFFERS, id="a longer update"),
    pytest.param(
        lambda f: with_secure(f.plan(), length=f.plan().layout.length + 1), reasons.VECTOR_DIFFERS, id="length"
    ),
    pytest.param(lambda f: with_secure(f.plan(), ring_bits=27), reasons.VECTOR_DIFFERS, id="a smaller ring"),
    pytest.param(lambda f: with_secure(f.plan(), ring_bits=32), reasons.VECTOR_DIFFERS, id="a larger ring"),
]


def refuses_plan(
    federation: Federation, plan: Plan, reason: str, caplog: pytest.LogCaptureFixture, name: str = A
) -> None:
    """The plan is refused with that code before anything is trained or kept, and no attempt of it is under way."""
    trained, marks = federation.trained[name], federation.marks(name, plan.run)
    before = marks.read_bytes() if marks.exists() else None
    caplog.clear()
    assert federation.announce(name, plan) == Refused(reason, name)
    assert told(caplog.records, f"silotune.client.{name}", reason)
    assert federation.trained[name] == trained
    assert (marks.read_bytes() if marks.exists() else None) == before
    digest = plan.digest()
    for request in (KeyList(digest, {}), Inbox(digest, {}), Survivors(digest, plan.cohort), Consents(digest, {})):
        assert federation.ask(name, request) == Refused(reasons.ATTEMPT_UNKNOWN, name)


@pytest.mark.parametrize(("plan", "reason"), PLANS)
def test_a_plan_that_differs_from_what_was_agreed_is_refused_untrained(
    plan: Callable[[Federation], Plan], reason: str, routed: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    refuses_plan(routed, plan(routed), reason, caplog)
    assert isinstance(routed.announce(A, routed.plan()), Keys)  # and the honest one is still welcome


@pytest.mark.parametrize(
    ("terms", "least"),
    [({"threshold": 2}, 2), ({"colluders": 0}, 0), ({"smallest": 2}, 2), ({"members": 6}, 6)],
    ids=["t below what is safe", "nobody colludes", "a set of two", "n that t is too small for"],
)
def test_terms_that_hide_nobody_cannot_even_be_read(
    terms: dict[str, int], least: int, federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    """No object of ours can hold such terms, so the text of an honest message is changed on the way."""
    wire = to_wire(TrainRequest(federation.plan(), ADAPTER))
    fields = json.loads(wire.text)
    fields["plan"]["secure"]["terms"].update(terms)
    assert through_app(federation.seats[A], replace(wire, text=json.dumps(fields))) == Refused(MALFORMED)
    assert told(caplog.records, "silotune.client", MALFORMED)
    assert federation.trained[A] == 0


def through_app(institution: Institution, wire: Wire, kind: str = ROUND) -> Reply:
    """What an institution answers to a message in the form in which Flower brings it."""
    message = Message(to_records(wire), dst_node_id=77, message_type=kind, ttl=60.0)
    message.metadata.__dict__["_message_id"] = "message-1"
    context = Context(run_id=5, node_id=77, node_config={}, state=RecordDict(), run_config={})
    answer = build_client_app(lambda _: nullcontext(institution))(message, context)
    assert not answer.has_error()
    reply = from_wire(from_records(answer.content))
    assert isinstance(reply, Reply)
    return reply


def test_a_cohort_below_the_members_own_minimum_is_refused(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    federation.restart(A, replace(federation.policy, smallest=4))
    refuses_plan(federation, federation.plan(cohort=ABC, first=4), reasons.COHORT_TOO_SMALL, caplog)
    refuses_plan(federation, federation.plan(), reasons.TERMS_DIFFER, caplog)  # which would allow a sum of three
    assert isinstance(federation.announce(A, with_terms(federation.plan(), smallest=4)), Keys)


def test_a_cohort_below_the_plans_own_threshold_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    federation = Federation(tmp_path, federation_config(NAMES))
    refuses_plan(federation, replace(federation.plan(), cohort=ABCD), reasons.COHORT_TOO_SMALL, caplog)


def test_a_coordinator_that_tolerates_fewer_colluders_than_the_member_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    federation = Federation(tmp_path, federation_config(NAMES[:6], colluders=2, min_cohort=4))
    laxer = with_secure(federation.plan(), terms=Terms.of(6, 1, 4))
    refuses_plan(federation, fitting(laxer), reasons.TERMS_DIFFER, caplog)


def test_a_roster_in_which_the_members_own_key_differs_is_refused(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    """Even when member and coordinator hold the same roster: the member would be signing for somebody else's key."""
    changed = Roster({**federation.roster.keys, A: Identity.generate(A).public})
    federation.restart(A, replace(federation.policy, roster=changed))
    refuses_plan(federation, with_secure(federation.plan(), roster=changed.digest()), reasons.ROSTER_DIFFERS, caplog)


def test_a_member_that_is_on_no_roster_is_refused(federation: Federation, caplog: pytest.LogCaptureFixture) -> None:
    without = Roster({name: federation.roster.keys[name] for name in (B, C, D)})
    federation.restart(A, replace(federation.policy, roster=without))
    refuses_plan(federation, with_secure(federation.plan(), roster=without.digest()), reasons.ROSTER_DIFFERS, caplog)


def test_a_plan_whose_ring_cannot_hold_the_sum_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = replace(federation_config(), quantise=QuantiseConfig(bits=26, weight_bits=5))
    federation = Federation(tmp_path, config)
    honest = Federation(tmp_path).plan()
    plan = settings_changed(honest, quantise=config.quantise)
    for claimed in (31, 32, 33):
        said = with_secure(plan, roster=federation.roster.digest(), ring_bits=claimed)
        refuses_plan(federation, said, reasons.VECTOR_DIFFERS, caplog)


def test_settings_that_change_in_mid_run_are_refused(federation: Federation, caplog: pytest.LogCaptureFixture) -> None:
    federation.coordinator().sum()
    later = adapter_of(2)
    plan = federation.plan(2, adapter=later, round=2)
    hotter = settings_changed(plan, train=replace(plan.settings.train, learning_rate=1.0))
    for changed in (hotter, settings_changed(plan, seed=5), settings_changed(plan, weighting="uniform")):
        refuses_plan(federation, changed, reasons.SETTINGS_DIFFER, caplog)
    assert isinstance(federation.announce(A, plan, later), Keys)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_an_old_number_is_refused_whatever_the_plan_says(
    number: int, federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    federation.coordinator(federation.plan(3)).sum()
    refuses_plan(federation, federation.plan(number, adapter=adapter_of(2), round=2), reasons.ATTEMPT_OLD, caplog)


def test_the_same_plan_twice_is_refused_and_the_attempt_goes_on(federation: Federation) -> None:
    coordinator = federation.coordinator()
    key_list = coordinator.keys()
    assert federation.announce(A, coordinator.plan) == Refused(reasons.ATTEMPT_OLD, A)
    assert isinstance(federation.ask(A, key_list), Shares)
    assert federation.trained[A] == 1


def test_a_plan_that_is_refused_leaves_the_attempt_under_way_as_it_was(federation: Federation) -> None:
    coordinator = federation.coordinator()
    coordinator.shares()
    assert federation.announce(A, with_terms(federation.plan(2), threshold=4)) == Refused(reasons.TERMS_DIFFER, A)
    assert coordinator.sum().tobytes() == federation.total(coordinator.plan, ABCD).tobytes()


def test_a_new_attempt_ends_the_one_before_it(federation: Federation) -> None:
    first, second = federation.coordinator(), federation.coordinator(federation.plan(2))
    first.shares()
    second.keys()
    assert federation.ask(A, first.boxes[A]) == Refused(reasons.ATTEMPT_UNKNOWN, A)
    assert second.sum().tobytes() == federation.total(second.plan, ABCD).tobytes()


def test_two_plans_at_once_from_two_threads_are_one_attempt(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An institution trains one plan at a time anyway; the member does not rely on that."""
    meet_at_marks(monkeypatch)
    member, plan = federation.member(A), federation.plan()

    def begin() -> Keys | str:
        try:
            return member.begin(plan, PARAMETERS, lambda former: kept(former, lambda: federation.train(A, plan)))
        except Refusal as refusal:
            return refusal.reason

    answers = at_once(begin, begin)
    assert [answer for answer in answers if not isinstance(answer, Keys)] == [reasons.ATTEMPT_OLD]
    assert federation.trained[A] == 1


class Meeting:
    """Where two threads wait for each other if both come this far; a lock lets only one."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2)

    def wait(self) -> None:
        with suppress(threading.BrokenBarrierError):
            self._barrier.wait(timeout=0.2)


def meet_at_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets two threads that both have read the marks wait for each other before either writes them."""
    meeting, write = Meeting(), marks_module.write_json

    def slowly(file: Path, value: Any) -> None:
        meeting.wait()
        write(file, value)

    monkeypatch.setattr(marks_module, "write_json", slowly)


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """What each call returns, all begun at the same moment in threads of their own."""
    gate = threading.Barrier(len(calls))
    answers: list[Any] = [None] * len(calls)

    def run(index: int) -> None:
        gate.wait()
        answers[index] = calls[index]()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


# ---- keys ----------------------------------------------------------------------------------------------------------


def with_keys(key_list: KeyList, **keys: Keys) -> KeyList:
    return replace(key_list, keys={**key_list.keys, **keys})


def signed(federation: Federation, plan: Plan, name: str, keys: Keys, **changes: Any) -> Keys:
    """`keys`, changed, under the signature of the member `name`, who colludes."""
    unsigned = replace(keys, plan=plan.digest(), **changes)
    return replace(unsigned, signature=federation.identities[name].sign(plan.attempt.keys_statement(name, unsigned)))


def made_by(identity: Identity, federation: Federation, plan: Plan) -> Keys:
    """Keys that anybody with that identity can make for an attempt."""
    return Participant(plan.attempt, identity, federation.roster).keys()


def lied_about(change: Callable[[Federation, Plan, KeyList], KeyList]) -> Callable[[Federation], Attack]:
    """An attack with a list of keys that `change` makes of the honest one."""

    def attack(federation: Federation) -> Attack:
        coordinator = federation.coordinator()
        return coordinator, A, change(federation, coordinator.plan, coordinator.keys())

    return attack


def swapped_keys(federation: Federation, plan: Plan, key_list: KeyList) -> KeyList:
    return with_keys(key_list, **{B: key_list.keys[C], C: key_list.keys[B]})


def outsider(federation: Federation, plan: Plan, key_list: KeyList) -> KeyList:
    return with_keys(key_list, **{B: made_by(Identity.generate(B), federation, plan)})


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


def ends_the_attempt(federation: Federation, attack: Attack, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    coordinator, victim, lie = attack
    caplog.clear()
    assert federation.ask(victim, lie) == Refused(reason, victim)
    assert told(caplog.records, f"silotune.client.{victim}", reason)
    gives_nothing_more(federation, coordinator, victim)
    session = federation.member(victim)._session
    assert session is not None
    assert not any(session.participant._secrets.self_seed)  # wiped
    assert not session.participant._secrets.shares


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


# ---- shares --------------------------------------------------------------------------------------------------------


def with_sealed(box: Inbox, **sealed: Sealed) -> Inbox:
    return replace(box, sealed={**box.sealed, **sealed})


def delivered(victim: str, change: Callable[[Federation, Coordinator, Inbox], Inbox]) -> Callable[[Federation], Attack]:
    """An attack with an inbox that `change` makes of the victim's honest one."""

    def attack(federation: Federation) -> Attack:
        coordinator = federation.coordinator()
        return coordinator, victim, change(federation, coordinator, coordinator.shares()[victim])

    return attack


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


def sealed_pair(coordinator: Coordinator, sender: str, recipient: str, content: bytes) -> bytes:
    assert coordinator.list is not None
    attempt = coordinator.plan.attempt
    info = attempt.pair_info(key_list_digest(attempt, coordinator.list.keys), sender, recipient)
    return seal(content, coordinator.list.keys[recipient].mask_key, info)


def forged(signer: str) -> Callable[[Federation, Coordinator, Inbox], Inbox]:
    """A whole new ciphertext in birch's name, signed by an outsider, by dogwood, or with birch's old signature."""

    def change(federation: Federation, coordinator: Coordinator, box: Inbox) -> Inbox:
        shares = sealed_shares(coordinator, B, A, bytes(2 * shamir.SHARE_BYTES))
        if signer == "nobody":
            return with_sealed(box, **{B: replace(box.sealed[B], shares=shares)})
        identity = federation.identities[D] if signer == D else Identity.generate(B)
        return with_sealed(box, **{B: resealed(federation, coordinator, B, A, identity, shares=shares)})

    return change


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def by_member(
    sender: str, recipient: str, **content: Callable[[Coordinator, Sealed], bytes]
) -> Callable[[Federation, Coordinator, Inbox], Inbox]:
    """A colluding member signs what it should not have sealed."""

    def change(federation: Federation, coordinator: Coordinator, box: Inbox) -> Inbox:
        parts = {part: make(coordinator, box.sealed[sender]) for part, make in content.items()}
        return with_sealed(box, **{sender: resealed(federation, coordinator, sender, recipient, **parts)})

    return change


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


# ---- survivors -----------------------------------------------------------------------------------------------------


def survivors(*names: str) -> Callable[[Federation], Attack]:
    def attack(federation: Federation) -> Attack:
        coordinator = federation.coordinator()
        coordinator.masked()
        return coordinator, A, Survivors(coordinator.plan.digest(), names)

    return attack


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


def consented(federation: Federation, name: str, adapter: Adapter = ADAPTER) -> list[str] | None:
    """The set that a member's marks bind it to."""
    marks = json.loads(federation.marks(name).read_text())
    found: list[str] | None = marks["sums"][adapter.digest()]["survivors"]
    return found


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


# ---- unmasking -----------------------------------------------------------------------------------------------------


def consents(change: Callable[[Federation, Coordinator, Consents], Consents]) -> Callable[[Federation], Attack]:
    def attack(federation: Federation) -> Attack:
        coordinator = federation.coordinator()
        coordinator.masked(without=(D,))
        return coordinator, A, change(federation, coordinator, coordinator.consents())

    return attack


def by_an_outsider(federation: Federation, coordinator: Coordinator, honest: Consents) -> Consents:
    return with_signature(honest, B, Identity.generate(B).sign(statement(coordinator, ABC)))


def statement(coordinator: Coordinator, names: tuple[str, ...]) -> bytes:
    """What survivors sign."""
    assert coordinator.list is not None
    attempt = coordinator.plan.attempt
    return attempt.survivors_statement(key_list_digest(attempt, coordinator.list.keys), names)


def with_signature(consents: Consents, name: str, signature: bytes) -> Consents:
    return replace(consents, signatures={**consents.signatures, name: signature})


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


@dataclass
class Halves:
    """A member's two shares of every name, read from its memory while it holds them."""

    of_self_seed: dict[str, bytes]
    of_mask_seed: dict[str, bytes]

    @classmethod
    def of(cls, member: SecureMember) -> Halves:
        assert member._session is not None
        held = member._session.participant._secrets.shares
        size = shamir.SHARE_BYTES
        return cls({n: bytes(h[:size]) for n, h in held.items()}, {n: bytes(h[size:]) for n, h in held.items()})


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


def test_two_unmask_requests_at_once_reveal_once(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    coordinator = federation.coordinator()
    signatures = coordinator.consents()
    meeting, verifies = Meeting(), Roster.verifies

    def slowly(roster: Roster, name: str, signature: bytes, said: bytes) -> bool:
        meeting.wait()
        return verifies(roster, name, signature, said)

    monkeypatch.setattr(Roster, "verifies", slowly)
    answers = at_once(lambda: federation.ask(A, signatures), lambda: federation.ask(A, signatures))
    assert sum(isinstance(answer, Revealed) for answer in answers) == 1
    assert Refused(reasons.ATTEMPT_OVER, A) in answers


def test_two_survivor_sets_at_once_are_signed_once(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    coordinator = federation.coordinator()
    coordinator.masked()
    digest = coordinator.plan.digest()
    meet_at_marks(monkeypatch)
    answers = at_once(
        lambda: federation.ask(A, Survivors(digest, ABC)), lambda: federation.ask(A, Survivors(digest, ABCD))
    )
    assert sum(isinstance(answer, Consent) for answer in answers) == 1
    assert Refused(reasons.PHASE_WRONG, A) in answers
    gives_nothing_more(federation, coordinator, A)


@pytest.mark.parametrize("phase", ["keys", "shares", "masked", "consents"])
def test_a_message_out_of_turn_ends_the_attempt(
    phase: str, routed: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    """Each message that is not the next one: one that comes again, and those that come too early."""
    messages = {"keys": KeyList, "shares": Inbox, "masked": Survivors, "consents": Consents}
    for number, kind in enumerate(messages.values(), 1):
        coordinator = routed.coordinator(routed.plan(number))
        getattr(coordinator, phase)()
        due = list(messages)[list(messages).index(phase)]
        if kind is messages[due]:
            continue
        digest = coordinator.plan.digest()
        lie = {
            KeyList: coordinator.list,
            Inbox: coordinator.boxes.get(A, Inbox(digest, {})),
            Survivors: Survivors(digest, ABCD),
            Consents: Consents(digest, {}),
        }[kind]
        assert lie is not None
        ends_the_attempt(routed, (coordinator, A, lie), reasons.PHASE_WRONG, caplog)


# ---- repeats -------------------------------------------------------------------------------------------------------


def test_before_anybody_signed_a_repeat_may_have_fewer_members(federation: Federation) -> None:
    federation.coordinator().masked()
    repeat = federation.coordinator(federation.plan(2, ABC, first=4))
    assert repeat.sum().tobytes() == federation.total(repeat.plan, ABC).tobytes()


def test_a_repeat_goes_under_fresh_keys_and_masks(federation: Federation) -> None:
    first, second = federation.coordinator(), federation.coordinator(federation.plan(2))
    one = first.keys()
    first.masked()
    before = {name: reply.vector for name, reply in federation.sent if isinstance(reply, MaskedInput)}
    federation.sent.clear()
    two = second.keys()
    second.masked()
    after = {name: reply.vector for name, reply in federation.sent if isinstance(reply, MaskedInput)}
    for name in ABCD:
        parts = [{k.share_key, k.mask_key, k.commitment} for k in (one.keys[name], two.keys[name])]
        assert not parts[0] & parts[1]
        assert (before[name] != after[name]).mean() > 0.9


def test_a_repeat_asks_for_no_second_update_and_another_round_does(federation: Federation) -> None:
    for number in (1, 2, 3):
        federation.coordinator(federation.plan(number)).masked()
    assert federation.trained == dict.fromkeys(ABCD, 1)
    federation.coordinator(federation.plan(4, round=2)).keys()
    assert federation.trained == dict.fromkeys(ABCD, 2)
    federation.coordinator(federation.plan(5, adapter=adapter_of(2), round=2)).keys(adapter=adapter_of(2))
    assert federation.trained == dict.fromkeys(ABCD, 3)


def test_a_vector_of_one_run_is_not_sent_in_another(federation: Federation) -> None:
    federation.coordinator().masked()
    federation.coordinator(federation.plan(2, run="other-run")).keys()
    assert federation.trained == dict.fromkeys(ABCD, 2)


@pytest.mark.parametrize(
    ("repeat", "reason"),
    [
        pytest.param(lambda f: f.plan(2, ABC), reasons.TERMS_DIFFER, id="a lower n"),
        pytest.param(lambda f: f.plan(2, NAMES[:4], first=5), None, id="n kept"),
        pytest.param(lambda f: f.plan(2, NAMES[:4]), reasons.TERMS_DIFFER, id="a lower n and t"),
    ],
)
def test_a_repeat_keeps_n_and_t(
    repeat: Callable[[Federation], Plan], reason: str | None, five: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    five.coordinator().shares()
    if reason is None:
        assert isinstance(five.announce(A, repeat(five)), Keys)
    else:
        refuses_plan(five, repeat(five), reason, caplog)


def test_a_repeat_adds_no_members(five: Federation, caplog: pytest.LogCaptureFixture) -> None:
    five.coordinator(five.plan(1, ABCD, first=5)).masked()
    for cohort in (NAMES[:5], (A, B, C, NAMES[4])):
        refuses_plan(five, five.plan(2, cohort, first=5), reasons.COHORT_UNKNOWN, caplog)


def test_members_that_were_left_out_may_come_back_before_anybody_signed(five: Federation) -> None:
    five.coordinator().shares()
    five.coordinator(five.plan(2, ABCD, first=5)).shares()
    repeat = five.coordinator(five.plan(3))
    assert repeat.sum().tobytes() == five.total(repeat.plan, NAMES[:5]).tobytes()


def test_after_it_signed_a_member_repeats_with_exactly_that_set(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    """The attempt "failed", once more without dogwood: the difference of both sums would be dogwood's update."""
    federation.coordinator().consents()
    refuses_plan(federation, federation.plan(2, ABC, first=4), reasons.SURVIVORS_DIFFER, caplog)
    repeat = federation.coordinator(federation.plan(2))
    repeat.masked()
    lie = Survivors(repeat.plan.digest(), ABC)
    ends_the_attempt(federation, (repeat, A, lie), reasons.SURVIVORS_DIFFER, caplog)
    assert consented(federation, A) == list(ABCD)
    again = federation.coordinator(federation.plan(3))
    assert again.sum().tobytes() == federation.total(again.plan, ABCD).tobytes()
    assert federation.trained[A] == 1


def test_after_it_signed_a_smaller_set_a_member_repeats_with_no_larger_one(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    coordinator = federation.coordinator()
    coordinator.masked(without=(D,))
    coordinator.consents()
    refuses_plan(federation, federation.plan(2), reasons.SURVIVORS_DIFFER, caplog)
    refuses_plan(federation, federation.plan(2, (A, B, D), first=4), reasons.SURVIVORS_DIFFER, caplog)
    repeat = federation.coordinator(federation.plan(2, ABC, first=4))
    assert repeat.sum().tobytes() == federation.total(repeat.plan, ABC).tobytes()


def test_after_it_signed_another_round_over_the_same_adapter_is_bound_too(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    federation.coordinator().sum()
    refuses_plan(federation, federation.plan(2, ABC, first=4, round=2), reasons.SURVIVORS_DIFFER, caplog)


# ---- restarts, damage and full disks ------------------------------------------------------------------------------


def test_after_a_restart_the_old_attempt_is_unknown_and_its_number_is_spent(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    coordinator = federation.coordinator()
    boxes = coordinator.shares()
    federation.restart(A)
    for request in (boxes[A], coordinator.list, Survivors(coordinator.plan.digest(), ABCD)):
        assert request is not None
        assert federation.ask(A, request) == Refused(reasons.ATTEMPT_UNKNOWN, A)
    assert told(caplog.records, f"silotune.client.{A}", reasons.ATTEMPT_UNKNOWN)
    refuses_plan(federation, coordinator.plan, reasons.ATTEMPT_OLD, caplog)
    repeat = federation.coordinator(federation.plan(2))
    assert repeat.sum().tobytes() == federation.total(repeat.plan, ABCD).tobytes()
    assert federation.trained == {A: 2, B: 1, C: 1, D: 1}  # what it had computed went with the process


def test_after_a_restart_what_a_member_signed_still_binds_it(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    federation.coordinator().consents()
    federation.restart(A)
    refuses_plan(federation, federation.plan(2, ABC, first=4), reasons.SURVIVORS_DIFFER, caplog)
    changed = settings_changed(federation.plan(2), seed=5)
    refuses_plan(federation, changed, reasons.SETTINGS_DIFFER, caplog)
    repeat = federation.coordinator(federation.plan(2))
    repeat.masked()
    lie = Survivors(repeat.plan.digest(), ABC)
    ends_the_attempt(federation, (repeat, A, lie), reasons.SURVIVORS_DIFFER, caplog)


def test_a_mark_is_on_disk_before_the_signature_it_stands_for_exists(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int, Any]] = []
    sign = Identity.sign

    def looking(identity: Identity, said: bytes) -> bytes:
        marks = json.loads(federation.marks(identity.name).read_text())
        for purpose in ("keys", "survivors"):
            if b"s" + len(purpose).to_bytes(8, "big") + purpose.encode() in said:
                seen.append((purpose, marks["attempt"], marks["sums"][ADAPTER.digest()]["survivors"]))
        return sign(identity, said)

    monkeypatch.setattr(Identity, "sign", looking)
    federation.coordinator().sum()
    assert [found for found in seen if found[0] == "survivors"] == [("survivors", 1, list(ABCD))] * 4
    assert all(found[1] == 1 for found in seen)
    assert sum(found[0] == "keys" for found in seen) >= 4


DAMAGE = [
    pytest.param(lambda file: file.write_text(""), id="empty"),
    pytest.param(lambda file: file.write_bytes(file.read_bytes()[:-20]), id="cut short"),
    pytest.param(lambda file: file.write_bytes(b"\xff\xfe\x00"), id="not text"),
    pytest.param(lambda file: file.write_text("7"), id="a number"),
    pytest.param(lambda file: file.write_text("[]"), id="a list"),
    pytest.param(lambda file: file.write_text("{}"), id="an empty object"),
    pytest.param(lambda file: file.write_text('{"attempt": "1", "settings": "", "sums": {}}'), id="text for a number"),
    pytest.param(lambda file: file.write_text('{"attempt": NaN, "settings": "", "sums": {}}'), id="no number"),
    pytest.param(lambda file: file.write_text('{"attempt": 0, "settings": "", "sums": []}'), id="a list of sums"),
    pytest.param(lambda file: (file.unlink(), file.mkdir()), id="a directory"),
    pytest.param(lambda file: (file.unlink(), file.symlink_to(file)), id="a loop"),
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_member_with_damaged_marks_answers_no_plan(
    damage: Callable[[Path], Any], federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    federation.coordinator().sum()
    damage(federation.marks(A))
    trained = federation.trained[A]
    assert federation.announce(A, federation.plan(2, round=2)) == Refused(STORAGE_FAILED, A)
    assert federation.trained[A] == trained
    (line,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert line.name == f"silotune.client.{A}"
    assert line.exc_info is not None
    assert "marks.json cannot be read" in str(line.exc_info[1])
    assert "restore it, or start a new run" in str(line.exc_info[1])


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_member_whose_marks_are_damaged_in_mid_attempt_signs_nothing(
    damage: Callable[[Path], Any], federation: Federation
) -> None:
    coordinator = federation.coordinator()
    named = coordinator.masked()
    damage(federation.marks(A))
    assert federation.ask(A, named) == Refused(STORAGE_FAILED, A)
    gives_nothing_more(federation, coordinator, A)


def test_a_member_whose_marks_are_gone_in_mid_attempt_signs_nothing(federation: Federation) -> None:
    coordinator = federation.coordinator()
    named = coordinator.masked()
    federation.marks(A).unlink()
    assert federation.ask(A, named) == Refused(STORAGE_FAILED, A)
    gives_nothing_more(federation, coordinator, A)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Fills the disk from when it is called."""

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    return lambda: monkeypatch.setattr("os.fsync", full)


def test_on_a_full_disk_no_plan_is_answered(
    federation: Federation, full_disk: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    full_disk()
    assert federation.announce(A, federation.plan()) == Refused(STORAGE_FAILED, A)
    assert federation.trained[A] == 0
    assert list(federation.marks(A).parent.iterdir()) == []
    (line,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert line.name == f"silotune.client.{A}"
    assert "No space left on device" in str(line.exc_info and line.exc_info[1])


def test_on_a_full_disk_no_survivor_set_is_signed(
    federation: Federation, full_disk: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator = federation.coordinator()
    named = coordinator.masked()
    full_disk()
    assert federation.ask(A, named) == Refused(STORAGE_FAILED, A)
    gives_nothing_more(federation, coordinator, A)
    monkeypatch.undo()  # there is room again: a repeat may still be over any set
    assert consented(federation, A) is None
    assert isinstance(federation.announce(A, federation.plan(2, ABC, first=4)), Keys)


def test_an_update_that_fails_leaves_no_attempt_and_spends_the_number(federation: Federation) -> None:
    def fail(name: str, plan: Plan) -> Any:
        raise RuntimeError("the records of patient 4711")

    seat = federation.seats[A]
    federation.seats[A] = replace(seat, train=fail)
    assert federation.announce(A, federation.plan()) == Refused(INTERNAL_ERROR, A)
    assert federation.ask(A, KeyList(federation.plan().digest(), {})) == Refused(reasons.ATTEMPT_UNKNOWN, A)
    federation.seats[A] = seat
    assert federation.announce(A, federation.plan()) == Refused(reasons.ATTEMPT_OLD, A)
    assert isinstance(federation.announce(A, federation.plan(2)), Keys)


# ---- secrets -------------------------------------------------------------------------------------------------------


def forms(secret: bytes) -> list[bytes]:
    """A secret as it might stand somewhere: raw, in hex, in base64 at any place in a longer text, or as numbers."""
    found = [secret, secret.hex().encode(), secret.hex().upper().encode(), repr(secret)[2:-1].encode()]
    for offset in range(3):
        text = b64encode(bytes(offset) + secret)
        found.append(text[4 if offset else 0 : len(text) // 4 * 4 - 4])
    numbers = list(secret)
    return [*found, ", ".join(map(str, numbers)).encode(), str(int.from_bytes(secret, "big")).encode()]


def contains(text: bytes, secret: bytes) -> bool:
    return any(form in text for form in forms(secret))


@dataclass
class Known:
    """Everything of a member that must not be found anywhere."""

    seeds: list[bytes]
    shares: list[bytes]
    update: list[bytes]
    signing: bytes

    @classmethod
    def of(cls, federation: Federation, name: str) -> Known:
        member = federation.member(name)
        assert member._session is not None
        hidden = member._session.participant._secrets
        vector = member._session.vector
        size = shamir.SHARE_BYTES
        pieces = [vector[at : at + 4] for at in range(0, PARAMETERS - 3, 4)]
        return cls(
            seeds=[bytes(seed) for seed in (hidden.share_seed, hidden.mask_seed, hidden.self_seed)],
            shares=[bytes(part) for held in hidden.shares.values() for part in (held[:size], held[size:])],
            update=[piece.tobytes() for piece in pieces]
            + [text for piece in pieces for text in (", ".join(map(str, piece)).encode(), str(piece)[1:-1].encode())],
            signing=federation.identities[name]._key.private_bytes_raw(),
        )

    def everything(self) -> list[bytes]:
        return [*self.seeds, *self.shares, *self.update, self.signing]


def everything_written(federation: Federation, caplog: pytest.LogCaptureFixture) -> bytes:
    """All files below the members' homes, and all lines of all logs with their tracebacks."""
    formatter = logging.Formatter("%(name)s %(message)s")
    logged = "\n".join(formatter.format(record) for record in caplog.records)
    files = b"".join(f.name.encode() + f.read_bytes() for f in federation.root.rglob("*") if f.is_file())
    return files + logged.encode()


def test_no_log_no_file_no_text_form_and_no_exception_shows_a_secret(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    """Over attacks in every phase, a round with a dropout and a crash, with every log at its most talkative."""
    caplog.set_level(logging.DEBUG)
    known: set[bytes] = set()
    shown: list[str] = []

    def look(*names: str) -> None:
        for name in names:
            known.update(Known.of(federation, name).everything())
            member = federation.member(name)
            assert member._session is not None
            participant = member._session.participant
            held = (member, member._session, participant, participant._secrets, federation.identities[name])
            shown.extend([*map(repr, held), *map(str, held), repr(federation.seats[name])])

    unreadable = delivered(A, by_member(D, A, shares=lambda c, s: sealed_shares(c, D, A, bytes(131))))
    forgery = delivered(A, forged("outsider"))
    for attack in (lied_about(outsider), forgery, unreadable, survivors(A), consents(by_an_outsider)):
        federation.spent += 10
        _, victim, lie = attack(federation)
        look(*ABCD)
        assert isinstance(federation.ask(victim, lie), Refused)
    last = federation.coordinator(federation.plan(2, ABC, first=4))
    last.masked()
    look(*ABC)
    assert last.sum().tobytes() == federation.total(last.plan, ABC).tobytes()
    crash = federation.coordinator(federation.plan(3, ABC, first=4))
    named = crash.masked()
    look(*ABC)
    federation.marks(A).unlink()
    assert federation.ask(A, named) == Refused(STORAGE_FAILED, A)
    shown.extend(repr(reply) for _, reply in federation.sent)
    written = everything_written(federation, caplog) + "\n".join(shown).encode()
    assert b"Traceback" in written
    assert b"marks.json" in written
    assert len(known) > 200
    assert not [secret for secret in known if contains(written, secret)]


def test_the_search_for_secrets_would_find_one() -> None:
    secret = bytes(range(40, 72))
    encoded = b64encode(secret), b64encode(b"ab" + secret + b"c"), secret.hex().encode(), repr(secret).encode()
    for text in (secret, *encoded, str(list(secret)).encode()):
        assert contains(b"something " + text + b" more", secret)
    assert not contains(b64encode(bytes(100)), secret)


def test_of_all_that_leaves_a_member_only_one_half_of_its_shares_is_a_secret(federation: Federation) -> None:
    coordinator = federation.coordinator()
    coordinator.masked(without=(D,))
    known = {name: Known.of(federation, name) for name in ABC}
    halves = {name: Halves.of(federation.member(name)) for name in ABC}
    coordinator.sum()
    revealed = {name: reply for name, reply in federation.sent if isinstance(reply, Revealed)}
    wires = [to_wire(reply) for _, reply in federation.sent if not isinstance(reply, Revealed)]
    sent = b"".join(wire.text.encode() + b"".join(a.tobytes() for a in wire.arrays.values()) for wire in wires)
    for name in ABC:
        assert not [secret for secret in known[name].everything() if contains(sent, secret)]
        other = [halves[name].of_mask_seed[n] for n in ABC] + [halves[name].of_self_seed[D]]
        assert not [share for share in other if contains(to_wire(revealed[name]).text.encode(), share)]
        assert not [seed for seed in known[name].seeds if contains(to_wire(revealed[name]).text.encode(), seed)]


@pytest.mark.parametrize("end", ["sum", "refusal", "next attempt"])
def test_secrets_are_overwritten_when_the_attempt_ends(end: str, federation: Federation) -> None:
    coordinator = federation.coordinator()
    coordinator.masked()
    session = federation.member(A)._session
    assert session is not None
    hidden = session.participant._secrets
    buffers = [hidden.share_seed, hidden.mask_seed, hidden.self_seed, *hidden.shares.values()]
    assert all(any(buffer) for buffer in buffers)
    if end == "sum":
        coordinator.sum()
    elif end == "refusal":
        federation.ask(A, Survivors(coordinator.plan.digest(), (A,)))
    else:
        federation.announce(A, federation.plan(2))
    assert not any(any(buffer) for buffer in buffers)
    assert session.participant.phase is Phase.OVER


def test_in_deployment_no_attempt_can_be_taken_out_of_a_member_or_put_into_one(federation: Federation) -> None:
    federation.coordinator().shares()
    with pytest.raises(RuntimeError, match="only in a simulation"):
        federation.member(A).snapshot()
    with pytest.raises(RuntimeError, match="only in a simulation"):
        federation.member(A).restore(("", np.zeros(0, np.uint32), np.zeros(0, np.float32)))


# ---- noise in shares -----------------------------------------------------------------------------------------------


class Noisy:
    """What an institution computes where noise is in shares. trained, drawn: how often."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.update = np.linspace(-5, 5, PARAMETERS)
        self.trained = 0
        self.drawn: list[np.ndarray] = []

    def compute(self, former: Update | None) -> tuple[Update, np.ndarray]:
        if former is None:
            self.trained += 1
        else:
            assert np.array_equal(former, self.update)
        levels = self.update.astype(np.int64) + len(self.drawn) + 1
        self.drawn.append(fixed_point.encode_levels(levels, self.plan.layout))
        return self.update, self.drawn[-1]


def playing(federation: Federation) -> SecureMember:
    """The member A of a simulation."""
    return SecureMember(
        federation.identities[A], federation.policy, lambda run: federation.marks(A, run), simulated=True
    )


def test_a_repeat_draws_anew_over_the_same_update_and_another_round_trains(federation: Federation) -> None:
    member, noisy = federation.member(A), Noisy(federation.plan())
    for number in (1, 2, 3):
        member.begin(federation.plan(number), PARAMETERS, noisy.compute)
        assert (noisy.trained, len(noisy.drawn)) == (1, number)
    assert len({vector.tobytes() for vector in noisy.drawn}) == 3
    member.begin(federation.plan(4, round=2), PARAMETERS, noisy.compute)
    assert (noisy.trained, len(noisy.drawn)) == (2, 4)


def test_what_cannot_be_computed_leaves_no_attempt_under_way_and_nothing_for_a_repeat(federation: Federation) -> None:
    member, noisy = federation.member(A), Noisy(federation.plan())

    def fails(_: Update | None) -> tuple[Update, np.ndarray]:
        raise Refusal(BUDGET_EXHAUSTED, "nothing may be spent")

    member.begin(federation.plan(1), PARAMETERS, noisy.compute)
    with pytest.raises(Refusal, match="nothing may be spent"):
        member.begin(federation.plan(2), PARAMETERS, fails)
    assert member.run == ""
    member.begin(federation.plan(3), PARAMETERS, noisy.compute)
    assert noisy.trained == 2


def test_a_member_that_goes_on_in_another_process_draws_anew_over_its_own_update(federation: Federation) -> None:
    first, noisy = playing(federation), Noisy(federation.plan())
    first.begin(federation.plan(1), PARAMETERS, noisy.compute)
    text, vector, update = first.snapshot()
    assert vector.tobytes() == noisy.drawn[0].tobytes()
    assert np.array_equal(update, noisy.update)
    again = playing(federation)
    again.restore((text, vector, update))
    again.begin(federation.plan(2), PARAMETERS, noisy.compute)
    assert noisy.trained == 1
    assert again.snapshot()[1].tobytes() == noisy.drawn[1].tobytes() != vector.tobytes()


# ---- whole institutions --------------------------------------------------------------------------------------------

Make = Callable[..., Institution]


class RealFederation:
    """Three institutions with the small base model, reached through Flower's records and the ClientApp."""

    def __init__(self, institution: Make, base_model: str, start: Adapter, tmp_path: Path) -> None:
        self.config = make_config(base_model)
        self.start = start
        self.identities = {name: Identity.generate(name) for name in REAL_NAMES}
        self.roster = Roster.of(*self.identities.values())
        self.tmp_path = tmp_path
        self.institutions = {name: institution(name, secure=self.secure(name)) for name in REAL_NAMES}

    def secure(self, name: str) -> SecureMember:
        policy = Policy.of(self.config, self.roster)
        return SecureMember(self.identities[name], policy, lambda run: self.marks(name, run))

    def marks(self, name: str, run: str = "tiny-run") -> Path:
        return self.tmp_path / name / "home" / run / "marks.json"

    def plan(self, attempt: int = 1) -> Plan:
        secure = SecurePlan(attempt, self.roster.digest(), Terms.of(3, 1, 3), 0, 0)
        return fitting(make_plan(self.config, self.start, secure=secure))

    def ask(self, name: str, request: Request) -> Reply:
        return through_app(self.institutions[name], to_wire(request))


@pytest.fixture
def real(institution: Make, base_model: str, start: Adapter, tmp_path: Path) -> RealFederation:
    return RealFederation(institution, base_model, start, tmp_path)


def test_institutions_that_train_sum_to_what_they_would_send_in_the_clear(real: RealFederation) -> None:
    plan = real.plan()
    in_clear = {}
    for name, whole in real.institutions.items():
        alone = replace(whole, secure=None, home=real.tmp_path / "clear" / name)
        answer = alone.answer(TrainRequest(replace(plan, secure=None), real.start))
        assert isinstance(answer, Contribution)
        in_clear[name] = fixed_point.unpack(answer.vector, plan.layout.length, plan.layout.ring_bits)
    aggregator = Aggregator(plan.attempt, real.roster)

    def ask(requests: dict[str, Any], take: Callable[[str, Any], None]) -> None:
        for name, request in requests.items():
            take(name, real.ask(name, request))

    ask(dict.fromkeys(REAL_NAMES, TrainRequest(plan, real.start)), aggregator.on_keys)
    ask(dict.fromkeys(REAL_NAMES, aggregator.key_list()), aggregator.on_shares)
    ask(aggregator.inboxes(), aggregator.on_masked)
    ask(dict.fromkeys(REAL_NAMES, aggregator.survivors()), aggregator.on_consent)
    ask(dict.fromkeys(REAL_NAMES, aggregator.consents()), aggregator.on_revealed)
    expected = np.sum(list(in_clear.values()), axis=0, dtype=np.uint32) & np.uint32(plan.layout.ring_mask)
    assert aggregator.unmask().tobytes() == expected.tobytes()


def test_an_adapter_that_is_not_the_plans_is_refused_before_it_is_marked_or_trained(
    real: RealFederation, caplog: pytest.LogCaptureFixture
) -> None:
    other = Adapter({key: factor + np.float32(1e-6) for key, factor in real.start.factors.items()})
    assert real.ask(A, TrainRequest(real.plan(), other)) == Refused(ADAPTER_DIGEST_DIFFERS, A)
    assert told(caplog.records, f"silotune.client.{A}", ADAPTER_DIGEST_DIFFERS)
    assert not real.marks(A).exists()
    assert not (real.tmp_path / A / "home").exists()


def test_an_institution_with_an_identity_sends_no_update_in_the_clear(
    real: RealFederation, caplog: pytest.LogCaptureFixture
) -> None:
    reply = real.ask(A, TrainRequest(replace(real.plan(), secure=None), real.start))
    assert reply == Refused(reasons.SECURE_AGGREGATION_REQUIRED, A)
    assert told(caplog.records, f"silotune.client.{A}", reasons.SECURE_AGGREGATION_REQUIRED)
    assert not (real.tmp_path / A / "home").exists()


def test_an_institution_without_an_identity_takes_no_part_in_secure_aggregation(
    real: RealFederation, institution: Make
) -> None:
    real.institutions[A] = institution(A)
    assert real.ask(A, TrainRequest(real.plan(), real.start)) == Refused(reasons.ROSTER_DIFFERS, A)
    assert real.ask(A, KeyList(real.plan().digest(), {})) == Refused(reasons.ATTEMPT_UNKNOWN, A)
    assert not (real.tmp_path / A / "home").exists()


def test_a_plan_that_does_not_invite_an_institution_is_refused(real: RealFederation) -> None:
    plan = replace(real.plan(), cohort=(B, C))
    assert real.ask(A, TrainRequest(plan, real.start)) == Refused(NOT_INVITED, A)


def test_an_institution_trains_once_for_all_attempts_at_a_sum(real: RealFederation) -> None:
    for attempt in (1, 2):
        assert isinstance(real.ask(A, TrainRequest(real.plan(attempt), real.start)), Keys)
    lines = (real.tmp_path / A / "home" / "tiny-run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 1


def test_an_institution_with_damaged_marks_trains_nothing(
    real: RealFederation, caplog: pytest.LogCaptureFixture
) -> None:
    real.marks(A).parent.mkdir(parents=True)
    real.marks(A).write_text("{")
    assert real.ask(A, TrainRequest(real.plan(), real.start)) == Refused(STORAGE_FAILED, A)
    assert any("marks.json cannot be read" in str(record.exc_info) for record in caplog.records)
    assert not (real.marks(A).parent / "metrics.jsonl").exists()
