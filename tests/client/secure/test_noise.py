"""Noise in shares: every attempt draws anew over one and the same update."""

from __future__ import annotations

import numpy as np
import pytest

from client.secure import SecureMember, Update
from common import fixed_point
from common.errors import Refusal
from common.messages import Plan
from common.policy_reasons import BUDGET_EXHAUSTED
from tests.client.secure.conftest import A
from tests.federations import PARAMETERS, Federation


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
