"""What an institution accepts of a plan, against terms of its own. Attacks by message are in tests/client/secure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.policy import Policy
from common.config import QuantiseConfig
from common.errors import ConfigError, Refusal
from common.messages import METHOD_UNKNOWN, Plan
from common.secagg import reasons
from common.secagg.attempt import Attempt
from common.secagg.identity import Identity
from common.secagg.terms import Terms
from tests.federations import NAMES, PARAMETERS, Federation, federation_config, fitting, with_secure, with_terms

FOUR = NAMES[:4]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """Seven names on the roster; for its plans and its policy."""
    return Federation(tmp_path_factory.mktemp("plans"), federation_config(NAMES))


def accepted(federation: Federation, plan: Plan, policy: Policy | None = None, name: str = NAMES[0]) -> Attempt:
    policy = policy or federation.policy
    return policy.accept(plan, name, federation.identities[name].public, PARAMETERS)


def refusal(federation: Federation, plan: Plan, policy: Policy | None = None) -> str:
    with pytest.raises(Refusal) as raised:
        accepted(federation, plan, policy)
    return raised.value.reason


def test_a_policy_says_what_its_configuration_says(tmp_path: Path) -> None:
    config = federation_config(NAMES, colluders=2, min_cohort=5, method="ffa", weight_unit=8)
    roster = Federation(tmp_path).roster
    found = Policy.of(replace(config, quantise=QuantiseConfig(clip=0.5)), roster)
    assert found == Policy(roster, 2, 5, ("ffa",), 8, QuantiseConfig(clip=0.5), required=True)


@pytest.mark.parametrize("cohort", [NAMES, NAMES[:5], NAMES[:3], (NAMES[0], *NAMES[4:])])
def test_an_honest_plan_becomes_the_attempt_that_everything_is_bound_to(
    cohort: tuple[str, ...], federation: Federation
) -> None:
    plan = federation.plan(3, cohort)
    attempt = accepted(federation, plan)
    assert attempt == plan.attempt
    assert (attempt.run, attempt.round, attempt.attempt, attempt.plan) == (plan.run, 1, 3, plan.digest())
    assert (attempt.cohort, attempt.terms) == (cohort, Terms.of(len(cohort), 1, 3))


def test_a_smaller_cohort_of_a_repeat_keeps_a_larger_n(federation: Federation) -> None:
    assert accepted(federation, federation.plan(2, NAMES[:5], first=7)).terms == Terms.of(7, 1, 3)
    assert refusal(federation, replace(federation.plan(2), cohort=FOUR)) == reasons.COHORT_TOO_SMALL  # t = 5


@given(st.integers(3, 12), st.integers(1, 6), st.integers(1, 12), st.integers(1, 10))
@settings(deadline=None, derandomize=True, max_examples=200)
def test_no_terms_but_those_of_the_own_colluders_and_smallest_set_are_accepted(
    federation: Federation, members: int, colluders: int, threshold: int, smallest: int
) -> None:
    try:
        terms = Terms(members, colluders, threshold, smallest)
    except ConfigError:
        return  # nobody can even say it
    plan = fitting(with_secure(federation.plan(), terms=terms))
    if members == 7 and terms == Terms.of(7, 1, 3):
        assert accepted(federation, plan).terms == terms
    else:
        assert refusal(federation, plan) in (reasons.TERMS_DIFFER, reasons.COHORT_TOO_SMALL)


@given(st.lists(st.sampled_from([*NAMES, "mallory", "oscar"]), max_size=9))
@settings(deadline=None, derandomize=True, max_examples=200)
def test_a_cohort_is_names_of_the_roster_in_order_the_member_among_them(
    federation: Federation, cohort: list[str]
) -> None:
    plan = replace(federation.plan(first=7), cohort=tuple(cohort))
    known = set(cohort) <= set(NAMES) and cohort == sorted(set(cohort)) and NAMES[0] in cohort
    if known and len(cohort) >= 5:
        assert accepted(federation, plan).cohort == tuple(cohort)
    else:
        assert refusal(federation, plan) == (reasons.COHORT_TOO_SMALL if known else reasons.COHORT_UNKNOWN)


@pytest.mark.parametrize("smallest", [3, 4, 5])
def test_the_own_smallest_set_holds_whatever_the_plan_says(smallest: int, federation: Federation) -> None:
    policy = replace(federation.policy, smallest=smallest)
    for size in range(3, 8):
        plan = federation.plan(cohort=NAMES[:size])
        if smallest == 3:
            accepted(federation, plan, policy)
        else:
            expected = reasons.COHORT_TOO_SMALL if size < smallest else reasons.TERMS_DIFFER
            assert refusal(federation, plan, policy) == expected


def test_more_colluders_than_agreed_need_a_larger_threshold(federation: Federation) -> None:
    policy = replace(federation.policy, colluders=2, smallest=4)
    assert refusal(federation, with_terms(federation.plan(), smallest=4), policy) == reasons.TERMS_DIFFER
    assert accepted(federation, fitting(with_secure(federation.plan(), terms=Terms.of(7, 2, 4))), policy)


def test_terms_of_its_own_that_cannot_be_met_are_refused_and_no_crash(federation: Federation) -> None:
    policy = replace(federation.policy, colluders=6, smallest=3)  # T + 2 > smallest
    assert refusal(federation, federation.plan(), policy) == reasons.TERMS_DIFFER


def test_an_own_key_that_is_not_the_rosters_is_refused(federation: Federation) -> None:
    other = Identity.generate(NAMES[0]).public
    with pytest.raises(Refusal, match=reasons.ROSTER_DIFFERS):
        federation.policy.accept(federation.plan(), NAMES[0], other, PARAMETERS)
    with pytest.raises(Refusal, match=reasons.ROSTER_DIFFERS):
        federation.policy.accept(federation.plan(), "mallory", other, PARAMETERS)
    with pytest.raises(Refusal, match=reasons.ROSTER_DIFFERS):  # another's name with its own key
        federation.policy.accept(federation.plan(), NAMES[1], federation.identities[NAMES[0]].public, PARAMETERS)


SETTINGS: list[tuple[Callable[[Plan], Plan], str]] = [
    (lambda p: replace(p, settings=replace(p.settings, method="ffa")), METHOD_UNKNOWN),
    (lambda p: replace(p, settings=replace(p.settings, method="flora")), METHOD_UNKNOWN),
    (lambda p: replace(p, settings=replace(p.settings, weight_unit=2)), reasons.SETTINGS_DIFFER),
    *[
        (
            lambda p, changes=changes: fitting(  # type: ignore[misc]
                replace(p, settings=replace(p.settings, quantise=replace(p.settings.quantise, **changes)))
            ),
            reasons.SETTINGS_DIFFER,
        )
        for changes in ({"clip": 1.0000001}, {"bits": 19}, {"bits": 21}, {"weight_bits": 5}, {"weight_bits": 7})
    ],
    (lambda p: fitting(replace(p, parameters=PARAMETERS + 1)), reasons.VECTOR_DIFFERS),
    (lambda p: with_secure(p, length=p.layout.length - 1), reasons.VECTOR_DIFFERS),
    (lambda p: with_secure(p, ring_bits=p.layout.ring_bits - 1), reasons.VECTOR_DIFFERS),
    (lambda p: replace(p, secure=None), reasons.SECURE_AGGREGATION_REQUIRED),
    (lambda p: with_secure(p, roster="0" * 64), reasons.ROSTER_DIFFERS),
    (lambda p: with_secure(p, roster=""), reasons.ROSTER_DIFFERS),
]


@pytest.mark.parametrize(("change", "reason"), SETTINGS)
def test_what_was_agreed_is_not_for_the_plan_to_change(
    change: Callable[[Plan], Plan], reason: str, federation: Federation
) -> None:
    assert refusal(federation, change(federation.plan())) == reason


@pytest.mark.parametrize("quantise", [QuantiseConfig(bits=27, weight_bits=4), QuantiseConfig(bits=24, weight_bits=8)])
def test_a_ring_that_cannot_hold_the_sum_is_refused_even_when_it_was_agreed(
    quantise: QuantiseConfig, federation: Federation
) -> None:
    plan = federation.plan()
    plan = replace(plan, settings=replace(plan.settings, quantise=quantise))
    assert refusal(federation, plan, replace(federation.policy, quantise=quantise)) == reasons.VECTOR_DIFFERS
