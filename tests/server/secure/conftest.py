"""A coordinator whose members are real ones with marks on disk, some of which fall silent when a test says so.

Each message goes through its wire form. `collect` is the coordinator under test: its process has just begun, or gone on
after a kill.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common import fixed_point
from common.adapter import Adapter
from common.fixed_point import Decoded
from common.messages import INTERNAL_ERROR, TIMED_OUT, Plan, Refused, Reply, Request, TrainRequest
from common.secagg.messages import Consents, Inbox, KeyList, Revealed, Survivors
from common.secagg.terms import Terms
from server.attempts import Attempts
from server.collect import Clock, Collected, OnHeard
from server.secure import collect_securely
from tests.federations import ADAPTER, NAMES, Answer, Federation, WiredMembers, federation_config, honestly

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


def nothing_is_known(members: WiredMembers, federation: Federation) -> None:
    """In no attempt did t members reveal their shares, and no two sets were named."""
    revealed = [
        sum(isinstance(reply, Revealed) for _, reply in replies)
        for replies, (_, kind) in zip(members.replies, members.asked, strict=True)
        if kind is Consents
    ]
    assert all(count < Terms.of(len(federation.names), 1, 3).threshold for count in revealed)
    assert len(set(sets_named(members))) <= 1
