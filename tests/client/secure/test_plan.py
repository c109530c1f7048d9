"""Plans that differ from what was agreed, hide nobody or are old: refused before anything is trained or kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.config import QuantiseConfig
from common.messages import MALFORMED, METHOD_UNKNOWN, Plan, Refused, TrainRequest
from common.secagg import reasons
from common.secagg.identity import Identity, Roster
from common.secagg.messages import Keys, Shares
from common.secagg.terms import Terms
from common.wire import to_wire
from tests.client.secure.conftest import ABC, ABCD, A, B, C, D, refuses_plan, settings_changed
from tests.federations import (
    ADAPTER,
    NAMES,
    Federation,
    adapter_of,
    federation_config,
    fitting,
    through_app,
    told,
    with_secure,
    with_terms,
)


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
