"""Whole institutions that train, behind the ClientApp: the sum of a round, and what they refuse untrained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.institution import Institution
from client.policy import Policy
from client.secure import SecureMember
from common import fixed_point
from common.adapter import Adapter
from common.messages import (
    ADAPTER_DIGEST_DIFFERS,
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
from common.secagg import reasons
from common.secagg.aggregator import Aggregator
from common.secagg.identity import Identity, Roster
from common.secagg.messages import KeyList, Keys
from common.secagg.terms import Terms
from common.wire import to_wire
from tests.client.conftest import NAMES as REAL_NAMES
from tests.client.conftest import make_config, make_plan
from tests.client.secure.conftest import A, B, C
from tests.federations import fitting, through_app, told

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
