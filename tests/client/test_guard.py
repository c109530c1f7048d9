"""The policy at work in an institution as its daemon has it: what is refused before a record or a model is touched."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client import guard as guard_module
from client import institution as institution_module
from client.adapters import verified
from client.data_sets import RecordSet, RecordSource
from client.guard import digest, terms
from client.institution import Institution
from client.policy_file import METRICS, Budget, SecureTerms
from common import fixed_point
from common import policy_reasons as reasons
from common.adapter import Adapter
from common.base_model import Fingerprint
from common.config import LoraConfig, PrivacyConfig, QuantiseConfig
from common.errors import Refusal
from common.messages import (
    ADAPTER_DIGEST_DIFFERS,
    ADAPTER_DOES_NOT_FIT,
    BASE_MODEL_DIFFERS,
    INTERNAL_ERROR,
    MALFORMED,
    METHOD_UNKNOWN,
    SIGNATURE_DIFFERS,
    STORAGE_FAILED,
    Contribution,
    Hello,
    Introduction,
    Plan,
    Published,
    Received,
    Refused,
    Reply,
    TrainRequest,
)
from common.secagg.identity import Identity
from common.secagg.messages import Consent, Keys, MaskedInput, Revealed, Shares, Survivors
from common.secagg.reasons import (
    ATTEMPT_OLD,
    ATTEMPT_UNKNOWN,
    ROSTER_DIFFERS,
    SECURE_AGGREGATION_REQUIRED,
    SETTINGS_DIFFER,
)
from tests.client.guarded import DATA_SET, ME, OTHERS, RUN, Attempt, Guarded, Untouchable
from tests.client.test_institution import files_below

NOBODY = "0" * 64
OTHER_BASE = Fingerprint("1" * 64, "2" * 64, "3" * 64)

Make = Callable[..., Guarded]
Said = Hello | Plan


@pytest.fixture
def place(tmp_path: Path, base_model: str) -> Make:
    """Makes an institution's home below the test's own directory."""
    return lambda **policy: Guarded(tmp_path / "alder", base_model, **policy)


def settings_of(message: Any, **changes: Any) -> Any:
    return replace(message, settings=replace(message.settings, **changes))


def lora_of(message: Any, **changes: Any) -> Any:
    return settings_of(message, lora=replace(message.settings.lora, **changes))


def train_of(message: Any, **changes: Any) -> Any:
    return settings_of(message, train=replace(message.settings.train, **changes))


def in_the_clear(message: Said) -> Said:
    return replace(message, roster="") if isinstance(message, Hello) else replace(message, secure=None)


def asked(guarded: Guarded, member: Institution, message: Said, start: Adapter) -> Reply:
    return member.answer(message if isinstance(message, Hello) else TrainRequest(message, start))


def forbid_models(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Makes whoever loads or fingerprints a base model fail, and tells who did."""
    touched: list[Any] = []

    def never(*found: Any, **more: Any) -> Any:
        touched.append(found)
        raise AssertionError("the base model was touched")

    institution_module._shared_model.cache_clear()
    monkeypatch.setattr(institution_module, "load", never)
    monkeypatch.setattr(institution_module, "fingerprint", never)
    return touched


# --- What a run or a round may ask for


# What the policy says; what the coordinator asks; the reason.
REFUSED: list[Any] = [
    pytest.param({}, in_the_clear, SECURE_AGGREGATION_REQUIRED, id="in the clear"),
    pytest.param({"base_models": ()}, None, reasons.BASE_MODEL_NOT_ALLOWED, id="no base model allowed"),
    pytest.param(
        {"base_models": (OTHER_BASE.digest(),)}, None, reasons.BASE_MODEL_NOT_ALLOWED, id="another base model allowed"
    ),
    pytest.param(
        {}, lambda m: replace(m, fingerprint=OTHER_BASE), reasons.BASE_MODEL_NOT_ALLOWED, id="another base model asked"
    ),
    pytest.param({"methods": ("ffa",)}, None, reasons.METHOD_NOT_ALLOWED, id="method"),
    pytest.param({"largest_rank": 3}, None, reasons.RANK_TOO_LARGE, id="rank above the policy's"),
    pytest.param({}, lambda m: lora_of(m, rank=65), reasons.RANK_TOO_LARGE, id="rank above the default"),
    pytest.param({}, lambda m: lora_of(m, rank=10**6), reasons.RANK_TOO_LARGE, id="a rank that fits no memory"),
    pytest.param({"largest_passes": 0.5}, None, reasons.PASSES_TOO_MANY, id="passes"),
    pytest.param({}, lambda m: train_of(m, passes_per_round=1e9), reasons.PASSES_TOO_MANY, id="a billion passes"),
    pytest.param({"weight_unit": 2}, None, SETTINGS_DIFFER, id="weight unit"),
    pytest.param({"quantise": QuantiseConfig(clip=2.0)}, None, SETTINGS_DIFFER, id="clip"),
    pytest.param({}, lambda m: settings_of(m, quantise=QuantiseConfig(bits=17)), SETTINGS_DIFFER, id="bits"),
    pytest.param({"data_sets": ()}, None, reasons.DATA_SET_NOT_ALLOWED, id="no data set allowed"),
    pytest.param({}, lambda m: settings_of(m, data_set="letters"), reasons.DATA_SET_NOT_ALLOWED, id="data set"),
    pytest.param(
        {"data_sets": (DATA_SET, "letters")},
        lambda m: settings_of(m, data_set="letters"),
        reasons.DATA_SET_UNKNOWN,
        id="a data set without a file",
    ),
    pytest.param(
        {"populations": {"people": Budget((DATA_SET,), ("patient",), 1.0, 1e-5)}},
        None,
        reasons.PRIVACY_REQUIRED,
        id="without differential privacy on records that need it",
    ),
    pytest.param({"approval": "manual"}, None, reasons.NOT_APPROVED, id="nobody approved it"),
]


@pytest.mark.parametrize("kind", [Hello, Plan])
@pytest.mark.parametrize(("policy", "change", "reason"), REFUSED)
def test_what_the_policy_does_not_allow_is_refused_before_records_or_model_are_touched(
    policy: dict[str, Any],
    change: Callable[[Any], Any] | None,
    reason: str,
    kind: type[Said],
    place: Make,
    start: Adapter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    guarded = place(**policy)
    records = Untouchable()
    member = guarded.institution(data=records)
    message: Any = guarded.hello() if kind is Hello else guarded.plan(start)
    before = files_below(guarded.home.root)
    touched = forbid_models(monkeypatch)
    answer = asked(guarded, member, change(message) if change else message, start)
    assert answer == Refused(reason, ME)
    assert records.opened == []
    assert touched == []
    written = {name for name, data in files_below(guarded.home.root).items() if before.get(name) != data}
    expected = {"control/.lock", "control/waiting.json"} if reason == reasons.NOT_APPROVED else set()
    assert written == expected


@pytest.mark.parametrize("kind", [Hello, Plan])
@pytest.mark.parametrize("approval", ["automatic", "manual"])
def test_patients_are_not_protected_by_records_of_which_nobody_knows_whose_they_are(
    approval: str, kind: type[Said], place: Make, start: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    guarded = place(approval=approval)
    guarded.forget_persons()
    records = Untouchable()
    member = guarded.institution(data=records)
    touched = forbid_models(monkeypatch)
    message: Any = guarded.hello() if kind is Hello else guarded.plan(start)
    message = settings_of(message, privacy=PrivacyConfig("patient", noise_multiplier=1.0))
    assert asked(guarded, member, message, start) == Refused(reasons.PERSONS_UNKNOWN, ME)
    assert (records.opened, touched, guarded.control.waiting()) == ([], [], {})


def test_every_reason_of_a_policy_is_tried_here() -> None:
    elsewhere = {reasons.PAUSED, reasons.LEFT, reasons.ROUNDS_PER_DAY_EXCEEDED, reasons.BUDGET_EXHAUSTED}
    elsewhere.add(reasons.PERSONS_UNKNOWN)
    assert {case.values[2] for case in REFUSED} | elsewhere >= reasons.REASONS


def test_what_the_policy_allows_is_answered(place: Make, start: Adapter) -> None:
    guarded = place()
    member = guarded.institution()
    assert isinstance(member.answer(guarded.hello()), Introduction)
    assert isinstance(member.answer(guarded.request(start)), Keys)


def test_a_plan_is_held_to_the_policy_whatever_hello_said(place: Make, start: Adapter) -> None:
    guarded = place()
    records = Untouchable()
    member = guarded.institution(data=records)
    assert isinstance(member.answer(guarded.hello()), Introduction)
    plan = train_of(guarded.plan(start), passes_per_round=11.0)
    assert member.answer(TrainRequest(plan, start)) == Refused(reasons.PASSES_TOO_MANY, ME)
    assert records.opened == []


def test_a_method_that_nobody_knows_is_told_as_such(place: Make, start: Adapter) -> None:
    guarded = place()
    member = guarded.institution(data=Untouchable())
    assert member.answer(settings_of(guarded.hello(), method="flora")) == Refused(reasons.METHOD_NOT_ALLOWED, ME)
    plan = settings_of(guarded.plan(start), method="flora")
    assert member.answer(TrainRequest(plan, start)) == Refused(METHOD_UNKNOWN, ME)


def test_a_base_model_that_is_allowed_and_is_not_here_is_told_by_its_parts(place: Make, start: Adapter) -> None:
    guarded = place()
    guarded.policy = replace(guarded.policy, base_models=(*guarded.policy.base_models, OTHER_BASE.digest()))
    records = Untouchable()
    member = guarded.institution(data=records)
    expected = Refused(BASE_MODEL_DIFFERS, ME, Fingerprint.PARTS)
    assert member.answer(guarded.hello(fingerprint=OTHER_BASE)) == expected
    assert member.answer(guarded.request(start, fingerprint=OTHER_BASE)) == expected
    assert records.opened == []


@pytest.mark.parametrize("what", ["hello", "plan", "published"])
def test_a_rank_of_a_million_allocates_nothing(
    what: str, place: Make, start: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of that rank would take 100 gigabytes before anybody saw that it is too large."""
    guarded = place()
    member = guarded.institution(data=Untouchable())
    lora = replace(guarded.config.lora, rank=10**6)
    message: Any = {
        "hello": lora_of(guarded.hello(), rank=10**6),
        "plan": TrainRequest(lora_of(guarded.plan(start), rank=10**6), start),
        "published": guarded.published(start, lora=lora),
    }[what]
    touched = forbid_models(monkeypatch)
    tracemalloc.start()
    try:
        assert member.answer(message) == Refused(reasons.RANK_TOO_LARGE, ME)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert touched == []


# --- In the clear


def test_in_the_clear_where_the_policy_lets_it(place: Make, start: Adapter) -> None:
    guarded = place(secure_aggregation=SecureTerms(required=False))
    member = guarded.institution()
    assert isinstance(member.answer(guarded.hello(secure=False)), Introduction)
    plan = guarded.plan(start, secure=False)
    answer = member.answer(TrainRequest(plan, start))
    assert isinstance(answer, Contribution)
    assert fixed_point.decode(vector_of(answer, plan), plan.layout, members=1).update.any()
    assert isinstance(member.answer(guarded.hello()), Introduction)  # masks are as welcome
    assert isinstance(member.answer(guarded.request(start)), Keys)


SHARES = ("institution", "distributed")
"""Modes whose noise is in the sum only."""


@pytest.mark.parametrize("kind", [Hello, Plan])
@pytest.mark.parametrize("approval", ["automatic", "manual"])
@pytest.mark.parametrize("mode", SHARES)
def test_noise_in_shares_is_refused_in_the_clear_whatever_the_policy_lets(
    mode: str, approval: str, kind: type[Said], place: Make, start: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    guarded = place(approval=approval, secure_aggregation=SecureTerms(required=False))
    records = Untouchable()
    member = guarded.institution(data=records)
    before = files_below(guarded.home.root)
    touched = forbid_models(monkeypatch)
    message: Any = guarded.hello() if kind is Hello else guarded.plan(start)
    message = settings_of(in_the_clear(message), privacy=PrivacyConfig(mode, noise_multiplier=1.0))
    assert asked(guarded, member, message, start) == Refused(SECURE_AGGREGATION_REQUIRED, ME)
    assert (records.opened, touched) == ([], [])
    assert files_below(guarded.home.root) == before  # nobody is asked, no round of the day, nothing in the ledger


@pytest.mark.parametrize("mode", ["record", "patient"])
def test_noise_from_training_needs_no_masks_where_the_policy_lets_it(mode: str, place: Make, start: Adapter) -> None:
    guarded = place(secure_aggregation=SecureTerms(required=False))
    member = guarded.institution()
    noised = PrivacyConfig(mode, noise_multiplier=1.0)
    assert isinstance(member.answer(settings_of(guarded.hello(secure=False), privacy=noised)), Introduction)
    plan = settings_of(guarded.plan(start, secure=False), privacy=noised)
    assert isinstance(member.answer(TrainRequest(plan, start)), Contribution)


@pytest.mark.parametrize("mode", SHARES)
def test_where_only_the_plan_shows_that_noise_in_shares_would_go_in_the_clear_it_is_refused(
    mode: str, place: Make, start: Adapter
) -> None:
    guarded = place(secure_aggregation=SecureTerms(required=False))
    records = Untouchable()
    member = guarded.institution(data=records)
    noised = PrivacyConfig(mode, noise_multiplier=1.0)
    assert isinstance(member.answer(settings_of(guarded.hello(), privacy=noised)), Introduction)
    before = files_below(guarded.home.root)
    plan = settings_of(guarded.plan(start, secure=False), privacy=noised)
    assert member.answer(TrainRequest(plan, start)) == Refused(SECURE_AGGREGATION_REQUIRED, ME)
    assert (records.opened, files_below(guarded.home.root)) == ([], before)


def vector_of(answer: Reply, plan: Plan) -> fixed_point.Ring:
    assert isinstance(answer, Contribution)
    return fixed_point.unpack(answer.vector, plan.layout.length, plan.layout.ring_bits)


@pytest.mark.parametrize("required", [True, False])
def test_a_member_lets_an_update_go_in_the_clear_only_where_its_own_terms_say_so(
    required: bool, place: Make, start: Adapter
) -> None:
    """Also without a guard, which would have refused before."""
    guarded = place(secure_aggregation=SecureTerms(required=required))
    records = Untouchable()
    member = guarded.institution(guard=None, data=records)
    assert member.secure is not None
    assert member.secure.policy.required == required
    answer = member.answer(guarded.request(start, secure=False))
    assert answer == Refused(SECURE_AGGREGATION_REQUIRED if required else INTERNAL_ERROR, ME)
    assert bool(records.opened) != required


# --- Approval


Changed = Callable[[Any], Any]
OTHER_TERMS: dict[str, Changed] = {
    "seed": lambda m: settings_of(m, seed=99),
    "rounds": lambda m: settings_of(m, rounds=m.settings.rounds + 1),
    "method": lambda m: settings_of(m, method="ffa"),
    "weighting": lambda m: settings_of(m, weighting="uniform"),
    "evaluation": lambda m: settings_of(m, evaluate=not m.settings.evaluate),
    "data set": lambda m: settings_of(m, data_set="letters"),
    "rank": lambda m: lora_of(m, rank=5),
    "alpha": lambda m: lora_of(m, alpha=9.0),
    "modules": lambda m: lora_of(m, target_modules=["q_proj"]),
    "learning rate": lambda m: train_of(m, learning_rate=1.0),
    "passes": lambda m: train_of(m, passes_per_round=2.0),
    "base model": lambda m: replace(m, fingerprint=OTHER_BASE),
    "without masks": in_the_clear,
}


@pytest.fixture
def manual(place: Make, tmp_path: Path) -> Guarded:
    """Approves by hand, and allows what the terms above ask for."""
    guarded = place(
        approval="manual",
        data_sets=(DATA_SET, "letters"),
        files=("letters",),
        secure_aggregation=SecureTerms(required=False),
    )
    guarded.policy = replace(guarded.policy, base_models=(*guarded.policy.base_models, OTHER_BASE.digest()))
    return guarded


def test_a_run_waits_until_a_person_approves_it(manual: Guarded, start: Adapter) -> None:
    records = Untouchable()
    waiting = manual.institution(data=records)
    hello = manual.hello()
    for _ in range(3):
        assert waiting.answer(hello) == Refused(reasons.NOT_APPROVED, ME)
    assert waiting.answer(manual.request(start)) == Refused(reasons.NOT_APPROVED, ME)
    assert records.opened == []
    (found,) = manual.control.waiting().values()
    assert (found.digest, dict(found.terms)) == (digest(hello), terms(hello))
    manual.control.approve(RUN, found.digest)
    member = manual.institution()
    assert isinstance(member.answer(hello), Introduction)
    assert isinstance(member.answer(manual.request(start)), Keys)
    assert manual.control.waiting() == {}


def test_a_person_is_shown_what_the_run_asks_for(manual: Guarded) -> None:
    assert terms(manual.hello()) == {
        "data_set": DATA_SET,
        "base_model": manual.policy.base_models[0],
        "method": "fedavg",
        "rank": 4,
        "rounds": 3,
        "passes_per_round": manual.config.train.passes_per_round,
        "evaluates_here": True,
        "privacy": "none",
        "secure_aggregation": True,
    }
    assert terms(manual.hello(secure=False))["secure_aggregation"] is False


@pytest.mark.parametrize("attempt", [1, 7])
@pytest.mark.parametrize("number", [1, 3])
def test_all_rounds_and_attempts_of_a_run_are_approved_with_it(
    number: int, attempt: int, manual: Guarded, start: Adapter
) -> None:
    assert digest(manual.plan(start, number, attempt)) == digest(manual.hello())
    assert digest(manual.plan(start, number, secure=False)) == digest(manual.hello(secure=False))


@pytest.mark.parametrize("kind", [Hello, Plan])
@pytest.mark.parametrize("change", OTHER_TERMS.values(), ids=list(OTHER_TERMS))
def test_other_terms_under_the_name_of_an_approved_run_wait_anew(
    change: Changed, kind: type[Said], manual: Guarded, start: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    manual.control.approve(RUN, digest(manual.hello()))
    records = Untouchable()
    member = manual.institution(data=records)
    message = change(manual.hello() if kind is Hello else manual.plan(start))
    assert digest(message) != digest(manual.hello())
    touched = forbid_models(monkeypatch)
    assert asked(manual, member, message, start) == Refused(reasons.NOT_APPROVED, ME)
    assert (records.opened, touched) == ([], [])
    assert manual.control.waiting()[RUN].digest == digest(message)
    assert manual.control.approved(RUN, digest(manual.hello()))  # what was approved stays so


def under_roster(message: Any, named: str) -> Any:
    if isinstance(message, Hello):
        return replace(message, roster=named)
    return replace(message, secure=replace(message.secure, roster=named))


@pytest.mark.parametrize("kind", [Hello, Plan])
@pytest.mark.parametrize("approved", [False, True])
def test_a_run_under_another_roster_is_refused_before_anybody_is_asked_to_approve_it(
    approved: bool, kind: type[Said], manual: Guarded, start: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = under_roster(manual.hello() if kind is Hello else manual.plan(start), NOBODY)
    if approved:
        manual.control.approve(RUN, digest(message))
    records = Untouchable()
    member = manual.institution(data=records)
    touched = forbid_models(monkeypatch)
    assert asked(manual, member, message, start) == Refused(ROSTER_DIFFERS, ME)
    assert (records.opened, touched) == ([], [])
    assert manual.control.waiting() == {}


@pytest.mark.parametrize("kind", [Hello, Plan])
def test_a_roster_that_was_trusted_anew_needs_another_approval(
    kind: type[Said], manual: Guarded, start: Adapter
) -> None:
    manual.control.approve(RUN, digest(manual.hello()))
    before = manual.roster
    manual.trusted = manual.without(OTHERS[-1])
    assert manual.roster.digest() != before.digest()
    message = under_roster(manual.hello() if kind is Hello else manual.plan(start), manual.roster.digest())
    member = manual.institution(data=Untouchable())
    assert asked(manual, member, message, start) == Refused(reasons.NOT_APPROVED, ME)
    assert manual.control.waiting()[RUN].digest == digest(message)
    former = under_roster(message, before.digest())
    assert asked(manual, member, former, start) == Refused(ROSTER_DIFFERS, ME)


def test_another_run_with_the_same_terms_waits_too(manual: Guarded) -> None:
    manual.control.approve(RUN, digest(manual.hello()))
    assert digest(replace(manual.hello(), run="other")) != digest(manual.hello())
    member = manual.institution(data=Untouchable())
    assert member.answer(replace(manual.hello(), run="other")) == Refused(reasons.NOT_APPROVED, ME)
    assert set(manual.control.waiting()) == {"other"}


def test_only_what_the_policy_allows_is_shown_to_a_person(manual: Guarded) -> None:
    member = manual.institution(data=Untouchable())
    assert member.answer(lora_of(manual.hello(), rank=65)) == Refused(reasons.RANK_TOO_LARGE, ME)
    assert manual.control.waiting() == {}


def test_an_approval_lasts_over_restarts(manual: Guarded) -> None:
    manual.control.approve(RUN, digest(manual.hello()))
    for _ in range(2):
        assert isinstance(manual.institution().answer(manual.hello()), Introduction)


# --- Pausing and leaving


@pytest.mark.parametrize("kind", [Hello, Plan])
def test_a_pause_lets_nothing_begin_and_ends(kind: type[Said], place: Make, start: Adapter) -> None:
    guarded = place()
    records = Untouchable()
    paused = guarded.institution(data=records)
    message: Said = guarded.hello() if kind is Hello else guarded.plan(start)
    guarded.control.pause()
    assert asked(guarded, paused, message, start) == Refused(reasons.PAUSED, ME)
    assert records.opened == []
    guarded.control.unpause()
    assert isinstance(asked(guarded, guarded.institution(), message, start), Introduction | Keys)


def test_a_pause_lets_the_attempt_under_way_end(place: Make, start: Adapter) -> None:
    guarded = place()
    member = guarded.institution()
    attempt = Attempt(guarded, start, member.answer)
    listed = attempt.key_list()
    guarded.control.pause()
    assert isinstance(member.answer(listed), Shares)
    assert member.answer(guarded.request(start, attempt=2)) == Refused(reasons.PAUSED, ME)


@pytest.mark.parametrize("phase", ["key_list", "inbox", "survivors", "consents"])
def test_a_run_that_is_left_gets_nothing_more_from_the_next_message_on(phase: str, place: Make, start: Adapter) -> None:
    guarded = place()
    replies: list[Reply] = []
    member = guarded.institution()

    def ask(request: Any) -> Reply:
        replies.append(member.answer(request))
        return replies[-1]

    due = getattr(Attempt(guarded, start, ask), phase)()
    honest = [Keys, Shares, MaskedInput, Consent]
    assert [type(reply) for reply in replies] == honest[: len(replies)]
    guarded.control.leave(RUN)
    assert member.answer(due) == Refused(reasons.LEFT, ME)
    assert member.answer(due) == Refused(reasons.LEFT, ME)
    assert member.answer(guarded.hello()) == Refused(reasons.LEFT, ME)
    assert member.answer(guarded.request(start, attempt=2)) == Refused(reasons.LEFT, ME)
    assert member.answer(guarded.published(start)) == Refused(reasons.LEFT, ME)
    restarted = guarded.institution(data=Untouchable())
    assert restarted.answer(guarded.request(start, attempt=2)) == Refused(reasons.LEFT, ME)


@dataclass
class Meanwhile:
    """Records that are read while somebody decides something."""

    source: RecordSource
    decide: Callable[[], None]

    def find(self, data_set: str, part: str) -> RecordSet:
        self.decide()
        return self.source.find(data_set, part)


@pytest.mark.parametrize("secure", [True, False])
def test_a_run_that_is_left_while_it_trains_gets_neither_keys_nor_update(
    secure: bool, place: Make, start: Adapter
) -> None:
    guarded = place(secure_aggregation=SecureTerms(required=False))
    member = guarded.institution()
    member = replace(member, data=Meanwhile(member.data, lambda: guarded.control.leave(RUN)))
    assert member.answer(guarded.request(start, secure=secure)) == Refused(reasons.LEFT, ME)


def test_a_pause_while_it_trains_lets_the_attempt_go_on(place: Make, start: Adapter) -> None:
    guarded = place()
    member = guarded.institution()
    member = replace(member, data=Meanwhile(member.data, lambda: guarded.control.pause()))
    assert isinstance(member.answer(guarded.request(start)), Keys)


def test_another_run_goes_on_when_one_is_left(place: Make, start: Adapter) -> None:
    guarded = place()
    member = guarded.institution()
    attempt = Attempt(guarded, start, member.answer)
    listed = attempt.key_list()
    guarded.control.leave("other")
    assert isinstance(member.answer(listed), Shares)
    assert member.answer(replace(guarded.hello(), run="other")) == Refused(reasons.LEFT, ME)
    assert isinstance(member.answer(replace(guarded.hello(), run="third")), Introduction)


def test_without_an_attempt_messages_of_one_are_unknown(place: Make) -> None:
    guarded = place()
    assert guarded.institution().answer(Survivors(NOBODY, (ME, *OTHERS))) == Refused(ATTEMPT_UNKNOWN, ME)


@pytest.mark.parametrize("file", ["paused.json", "left.json", "approved.json", "waiting.json"])
def test_where_it_cannot_be_known_what_people_said_nothing_begins(file: str, manual: Guarded, start: Adapter) -> None:
    manual.control.approve(RUN, digest(manual.hello()))
    manual.control.pause()
    manual.control.unpause()
    (manual.home.control / file).unlink(missing_ok=True)
    (manual.home.control / file).write_text("{half")
    (manual.home.control / file).chmod(0o600)
    records = Untouchable()
    member = manual.institution(data=records)
    other = settings_of(manual.hello(), seed=99)  # which would have to wait
    assert member.answer(other) == Refused(STORAGE_FAILED, ME)
    assert records.opened == []


# --- Rounds of a day


def test_rounds_of_a_day_are_counted_over_restarts_before_records_are_read(place: Make, start: Adapter) -> None:
    guarded = place(rounds_per_day=2)
    guarded.keep_the_day()
    assert isinstance(guarded.institution().answer(guarded.request(start, 1, 1)), Keys)
    assert isinstance(guarded.institution().answer(guarded.request(start, 2, 2)), Keys)
    records = Untouchable()
    late = guarded.institution(data=records)
    refused = Refused(reasons.ROUNDS_PER_DAY_EXCEEDED, ME)
    assert late.answer(guarded.request(start, 3, 3)) == refused
    assert guarded.institution(data=records).answer(guarded.request(start, 3, 4)) == refused
    other = replace(guarded.plan(start, 1, 1), run="other")
    assert late.answer(TrainRequest(other, start)) == refused  # the day is everybody's
    assert records.opened == []
    assert not (guarded.home.runs / "other" / "settings.json").exists()
    repeat = guarded.institution().answer(guarded.request(start, 2, 5))
    assert isinstance(repeat, Keys)  # trained again after the restart, and no round more


def test_a_round_that_is_not_counted_is_not_trained_in_the_clear_either(place: Make, start: Adapter) -> None:
    guarded = place(rounds_per_day=1, secure_aggregation=SecureTerms(required=False))
    guarded.keep_the_day()
    assert isinstance(guarded.institution().answer(guarded.request(start, 1, secure=False)), Contribution)
    records = Untouchable()
    late = guarded.institution(data=records)
    assert late.answer(guarded.request(start, 2, secure=False)) == Refused(reasons.ROUNDS_PER_DAY_EXCEEDED, ME)
    assert records.opened == []


def test_with_no_rounds_a_day_nothing_is_trained(place: Make, start: Adapter) -> None:
    guarded = place(rounds_per_day=0)
    records = Untouchable()
    answer = guarded.institution(data=records).answer(guarded.request(start))
    assert answer == Refused(reasons.ROUNDS_PER_DAY_EXCEEDED, ME)
    assert records.opened == []


def test_a_round_that_is_refused_for_another_reason_is_not_counted(place: Make, start: Adapter) -> None:
    guarded = place(rounds_per_day=1)
    guarded.keep_the_day()
    member = guarded.institution()
    assert isinstance(member.answer(guarded.request(start, 1, 1)), Keys)
    assert member.answer(guarded.request(start, 2, 1)) == Refused(ATTEMPT_OLD, ME)
    assert len(json.loads(guarded.book.read_text())["rounds"]) == 1


def test_the_day_is_that_of_the_clock(place: Make, start: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        now_ = datetime(2030, 1, 31, 23, 59, tzinfo=UTC)

        @classmethod
        def now(cls, zone: Any) -> datetime:
            assert zone is UTC
            return cls.now_

    monkeypatch.setattr(guard_module, "datetime", Clock)
    guarded = place(rounds_per_day=1)
    member = guarded.institution()
    assert isinstance(member.answer(guarded.request(start, 1, 1)), Keys)
    assert member.answer(guarded.request(start, 2, 2)) == Refused(reasons.ROUNDS_PER_DAY_EXCEEDED, ME)
    Clock.now_ = datetime(2030, 2, 1, 0, 0, tzinfo=UTC)
    assert isinstance(member.answer(guarded.request(start, 2, 3)), Keys)


# --- What leaves besides the update


@pytest.mark.parametrize("secure", [True, False])
@pytest.mark.parametrize("metrics", [(), ("train_loss",), ("validation_loss",), ("train_loss", "validation_loss")])
def test_metrics_that_may_not_leave_are_zero_in_the_vector(
    metrics: tuple[str, ...], secure: bool, place: Make, start: Adapter
) -> None:
    guarded = place(metrics=metrics, secure_aggregation=SecureTerms(required=False))
    member = guarded.institution()
    if secure:
        attempt = Attempt(guarded, start, member.answer)
        plan, vector = attempt.plan, attempt.sum()
    else:
        plan = guarded.plan(start, secure=False)
        vector = vector_of(member.answer(TrainRequest(plan, start)), plan)
    found = fixed_point.decode(vector, plan.layout, members=1)
    for metric, counters in METRICS.items():
        assert [bool(found.counters[name]) for name in counters] == [metric in metrics] * len(counters)
    assert found.update.any()
    assert found.weight > 0


# --- Published adapters


def other_adapter(start: Adapter) -> Adapter:
    return Adapter({key: factor + np.float32(0.25) for key, factor in start.factors.items()})


def kept(guarded: Guarded) -> dict[str, bytes]:
    return files_below(guarded.home.adapters) if guarded.home.adapters.exists() else {}


def test_an_adapter_that_the_coordinator_signed_is_kept_once(place: Make, start: Adapter) -> None:
    guarded = place()
    member = guarded.institution(data=Untouchable())
    for _ in range(2):
        assert member.answer(guarded.published(start)) == Received(RUN)
    found = verified(guarded.home, RUN, guarded.coordinator.public)
    assert found.adapter.digest() == start.digest()
    before = kept(guarded)
    other = guarded.published(other_adapter(start))
    assert member.answer(other) == Refused(ADAPTER_DIGEST_DIFFERS, ME)  # signed all the same
    assert member.answer(guarded.published(start, round=2)) == Refused(ADAPTER_DIGEST_DIFFERS, ME)
    assert kept(guarded) == before
    assert member.answer(guarded.published(other_adapter(start), run="other")) == Received("other")


def unsigned(published: Published) -> Published:
    return replace(published, publication=replace(published.publication, signature=b""))


def relabelled(published: Published) -> Published:
    return replace(published, publication=replace(published.publication, run="other"))


HOSTILE: list[Any] = [
    pytest.param(lambda g, s: unsigned(g.published(s)), SIGNATURE_DIFFERS, id="unsigned"),
    pytest.param(
        lambda g, s: g.published(s, Identity.generate("coordinator")), SIGNATURE_DIFFERS, id="signed by a stranger"
    ),
    pytest.param(lambda g, s: g.published(s, g.identities[OTHERS[0]]), SIGNATURE_DIFFERS, id="signed by a member"),
    pytest.param(lambda g, s: g.published(s, g.keys.identity), SIGNATURE_DIFFERS, id="signed by the institution"),
    pytest.param(lambda g, s: relabelled(g.published(s)), SIGNATURE_DIFFERS, id="signed for another run"),
    pytest.param(
        lambda g, s: replace(g.published(s), adapter=other_adapter(s)),
        ADAPTER_DIGEST_DIFFERS,
        id="another adapter than was signed",
    ),
    pytest.param(
        lambda g, s: g.published(s, fingerprint=OTHER_BASE), reasons.BASE_MODEL_NOT_ALLOWED, id="of another base model"
    ),
    pytest.param(
        lambda g, s: g.published(s, lora=LoraConfig(rank=65)), reasons.RANK_TOO_LARGE, id="of too large a rank"
    ),
    pytest.param(
        lambda g, s: g.published(s, lora=LoraConfig(rank=10**6)), reasons.RANK_TOO_LARGE, id="of an absurd rank"
    ),
    pytest.param(lambda g, s: g.published(s, lora=LoraConfig(rank=8)), ADAPTER_DOES_NOT_FIT, id="of another rank"),
    pytest.param(
        lambda g, s: g.published(Adapter({f"x.{key}": factor for key, factor in s.factors.items()})),
        ADAPTER_DOES_NOT_FIT,
        id="other tensors",
    ),
    pytest.param(lambda g, s: g.published(Adapter({})), ADAPTER_DOES_NOT_FIT, id="no tensors"),
    pytest.param(
        lambda g, s: g.published(s, lora=replace(g.config.lora, target_modules=["no_such_layer"])),
        None,
        id="of layers that the model has not",
    ),
    *[
        pytest.param(lambda g, s, run=run: g.published(s, run=run), MALFORMED, id=f"run {run!r:.20}")
        for run in ("..", "../../x", "/etc", "", ".ssh", "a/b", "a\n", "a\0", "-rf", "run+1", "x" * 201)
    ],
]


@pytest.mark.parametrize(("hostile", "reason"), HOSTILE)
def test_any_other_adapter_is_refused_and_not_kept(
    hostile: Callable[[Guarded, Adapter], Published],
    reason: str | None,
    place: Make,
    start: Adapter,
    tmp_path: Path,
) -> None:
    guarded = place()
    records = Untouchable()
    member = guarded.institution(data=records)
    before = files_below(tmp_path)
    answer = member.answer(hostile(guarded, start))
    if reason is None:
        assert isinstance(answer, Refused)
    else:
        assert answer == Refused(reason, ME)
    assert files_below(tmp_path) == before
    assert records.opened == []
    assert member.answer(guarded.published(start)) == Received(RUN)


def test_a_shelf_is_given_nothing_but_what_was_signed(place: Make, start: Adapter) -> None:
    """Whatever it checks itself."""
    guarded = place()
    given: list[Adapter] = []
    member = guarded.institution(shelf=lambda publication, adapter: given.append(adapter))
    signed = guarded.published(start)
    for hostile in (replace(signed, adapter=other_adapter(start)), unsigned(signed), relabelled(signed)):
        assert isinstance(member.answer(hostile), Refused)
    assert given == []
    assert member.answer(signed) == Received(RUN)
    assert [adapter.digest() for adapter in given] == [start.digest()]


def test_the_signature_is_looked_at_before_anything_else_of_an_adapter(
    place: Make, start: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a stranger sends costs neither a model nor a word on what is allowed here."""
    guarded = place()
    touched = forbid_models(monkeypatch)
    stranger = Identity.generate("coordinator")
    for changes in ({"fingerprint": OTHER_BASE}, {"lora": LoraConfig(rank=10**6)}, {"round": 2}):
        message = guarded.published(start, stranger, **changes)
        assert guarded.institution().answer(message) == Refused(SIGNATURE_DIFFERS, ME)
    assert touched == []


@pytest.mark.parametrize("said", ["paused", "not approved"])
def test_an_adapter_is_taken_in_a_pause_and_of_a_run_that_waits(said: str, manual: Guarded, start: Adapter) -> None:
    if said == "paused":
        manual.control.pause()
    member = manual.institution(data=Untouchable())
    assert member.answer(manual.published(start)) == Received(RUN)


def test_nothing_is_kept_where_there_is_no_shelf_or_no_guard(place: Make, start: Adapter) -> None:
    guarded = place()
    for missing in ({"shelf": None}, {"guard": None}):
        assert guarded.institution(**missing).answer(guarded.published(start)) == Refused(MALFORMED, ME)
    assert kept(guarded) == {}


def test_an_adapter_that_cannot_be_kept_is_not_said_to_be(place: Make, start: Adapter) -> None:
    guarded = place()
    guarded.home.adapters.write_text("a file in the way")
    assert isinstance(guarded.institution().answer(guarded.published(start)), Refused)


# --- The guard alone


def test_a_guard_that_refuses_says_why_in_its_own_log_only(
    place: Make, start: Adapter, caplog: pytest.LogCaptureFixture
) -> None:
    guarded = place(files=("psychiatry",))
    member = guarded.institution(data=Untouchable())
    answer = member.answer(settings_of(guarded.hello(), data_set="psychiatry"))
    assert answer == Refused(reasons.DATA_SET_NOT_ALLOWED, ME)
    assert "data set 'psychiatry' is not in data_sets" in caplog.text


def test_admitting_changes_nothing(place: Make, start: Adapter) -> None:
    guarded = place()
    member = guarded.institution()
    before = files_below(guarded.home.root)
    assert member.guard is not None
    for message in (guarded.hello(), guarded.plan(start)):
        member.guard.admit(message)
    with pytest.raises(Refusal):
        member.guard.admit(guarded.hello(secure=False))
    assert files_below(guarded.home.root) == before


def test_an_attempt_that_is_guarded_ends_in_the_sum(place: Make, start: Adapter) -> None:
    guarded = place()
    replies: list[Reply] = []
    member = guarded.institution()

    def ask(request: Any) -> Reply:
        replies.append(member.answer(request))
        return replies[-1]

    attempt = Attempt(guarded, start, ask)
    found = fixed_point.decode(attempt.sum(), attempt.plan.layout, members=1)  # everybody else's is zero
    assert found.update.any()
    assert [type(reply) for reply in replies] == [Keys, Shares, MaskedInput, Consent, Revealed]
