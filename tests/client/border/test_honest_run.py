"""What leaves when nothing fails: its form and size are the same whatever the data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from client.policy_file import SecureTerms
from common import fixed_point
from common.adapter import Adapter
from common.messages import Hello
from common.secagg.messages import Survivors
from tests.client.border.changes import little, private
from tests.client.border.conftest import IN_FORM, NOBODY, Border, Departed, Make, lengths
from tests.client.conftest import NAMES
from tests.client.guarded import Attempt


def shape(departed: Departed) -> tuple[Any, ...]:
    arrays = {name: (array.dtype.str, array.shape) for name, array in departed.wire.arrays.items()}
    return departed.wire.kind, lengths(json.loads(departed.wire.text)), arrays, len(departed.data)


def played(made: Border) -> tuple[list[tuple[Any, ...]], np.ndarray]:
    """A whole run: the shape of all that left, and the sum, which is this member's own vector."""
    made.ask(made.honest(Hello))
    total = made.attempt.sum()
    made.ask(made.place.published(made.start))
    return [shape(departed) for departed in made.left], total


def test_of_an_honest_run_nothing_leaves_whose_form_depends_on_data(border: Make, tmp_path: Path) -> None:
    """Two institutions, one with many times the records of the other: all that leaves has the same form and size."""
    small = border(root=tmp_path / "one", records=30)
    large = border(root=tmp_path / "two", records=240)
    one, one_sum = played(small)
    other, other_sum = played(large)
    assert [found[0] for found in one] == [
        "Introduction",
        "Keys",
        "Shares",
        "MaskedInput",
        "Consent",
        "Revealed",
        "Received",
    ]
    assert one == other
    counters = [
        fixed_point.decode(total, made.attempt.plan.layout, members=1).counters
        for made, total in ((small, one_sum), (large, other_sum))
    ]
    assert counters[0] != counters[1]  # inside the sum the two differ


def test_under_differential_privacy_nothing_leaves_whose_form_depends_on_data(border: Make, tmp_path: Path) -> None:
    shapes = []
    for records in (30, 240):
        made = border(root=tmp_path / str(records), records=records, policy=little(1000.0))
        plan = private(made.place.request(made.start)).plan
        made.attempt = Attempt(made.place, made.start, made.ask, plan)
        made.attempt.sum()
        shapes.append([shape(departed) for departed in made.left])
    assert [found[0] for found in shapes[0]] == ["Keys", "Shares", "MaskedInput", "Consent", "Revealed"]
    assert shapes[0] == shapes[1]


def test_an_update_that_is_not_finite_leaves_in_the_same_form(border: Make, tmp_path: Path) -> None:
    broken_start = Adapter({key: np.full_like(f, np.nan) for key, f in border().start.factors.items()})
    well, broken = border(root=tmp_path / "well"), border(root=tmp_path / "broken", start=broken_start)
    one, _ = played(well)
    other, total = played(broken)
    assert one == other
    found = fixed_point.decode(total, broken.attempt.plan.layout, members=1)
    assert (found.counters["void"], found.weight) == (1, 0)
    assert not found.update.any()


def test_in_the_clear_the_vector_leaves_and_nothing_beside_it(border: Make, tmp_path: Path) -> None:
    policy = {"secure_aggregation": SecureTerms(required=False)}
    shapes = []
    for records in (30, 240):
        made = border(root=tmp_path / str(records), records=records, policy=policy)
        made.ask(made.place.request(made.start, secure=False))
        shapes.append(shape(made.left[-1]))
    assert shapes[0][0] == "Contribution"
    assert shapes[0] == shapes[1]


def test_every_kind_of_reply_was_looked_through_when_nothing_fails(border: Make, tmp_path: Path) -> None:
    made = border(policy={"secure_aggregation": SecureTerms(required=False)})
    played(made)
    made.ask(made.place.request(made.start, 2, secure=False))
    made.ask(Survivors(NOBODY, NAMES))
    assert {departed.wire.kind for departed in made.left} == set(IN_FORM)
