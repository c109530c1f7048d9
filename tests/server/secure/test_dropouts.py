"""Members that fall silent: n - t may, at any phase; with one more there is no sum, and repeats have an end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import RunStopped
from common.messages import INTERNAL_ERROR, TIMED_OUT, Request
from common.secagg.messages import Consents, Inbox, KeyList, Survivors
from tests.federations import NAMES, Federation, WiredMembers, federation_config, told
from tests.server.secure.conftest import (
    FIVE,
    LOG,
    PHASES,
    A,
    B,
    C,
    D,
    E,
    attempts_of,
    both,
    collect,
    is_the_plain_sum,
    nothing_is_known,
    who_falls,
)


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


def test_members_train_once_for_all_attempts(five: Federation) -> None:
    collect(five, who_falls("lost", Inbox, A, B, attempts=2))
    assert five.trained == dict.fromkeys(FIVE, 1)
