"""Members that a malicious coordinator lies to, and what holds after every lie, whatever it was.

Each attack goes through the real messages to a real member with its marks on disk. It ends in a reason code, a line in
the member's own log, and nothing more from that member in that attempt.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from flwr.supercore.task_identity import TaskIdentity

from client.secure import SecureMember
from common.adapter import Adapter
from common.messages import Plan, Refused, Request
from common.secagg import reasons, shamir
from common.secagg.messages import Consents, Inbox, KeyList, Survivors
from tests.federations import ADAPTER, NAMES, Coordinator, Federation, federation_config, told

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


Attack = tuple[Coordinator, str, Request]
"""An attempt under way, the member that is lied to, and the lie."""


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


def consented(federation: Federation, name: str, adapter: Adapter = ADAPTER) -> list[str] | None:
    """The set that a member's marks bind it to."""
    marks = json.loads(federation.marks(name).read_text())
    found: list[str] | None = marks["sums"][adapter.digest()]["survivors"]
    return found


def settings_changed(plan: Plan, **changes: Any) -> Plan:
    return replace(plan, settings=replace(plan.settings, **changes))


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
