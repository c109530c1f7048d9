"""Honest rounds: the plain sum bit for bit, one round after another, and the bytes that it took."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.secagg.messages import Inbox
from common.wire import size, to_wire
from tests.federations import NAMES, Federation, WiredMembers, adapter_of, federation_config
from tests.server.secure.conftest import ABCD, FIVE, PHASES, E, collect, is_the_plain_sum, who_falls, written


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
