"""Any federation, any dropouts, any vectors: it is the exact sum of those who are left, or none."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from common import fixed_point
from common.errors import RunStopped
from common.fixed_point import Layout, Ring
from common.randomness import seeded
from common.secagg.terms import Terms
from tests.federations import NAMES, PARAMETERS, Federation, WiredMembers, federation_config
from tests.server.secure.conftest import (
    PHASES,
    both,
    collect,
    is_the_plain_sum,
    nothing_is_known,
    sets_named,
    who_falls,
)

falls = st.tuples(st.sampled_from(PHASES), st.sampled_from(["refused", "silent", "lost"]), st.integers(1, 3))
updates = arrays.arrays(np.float32, PARAMETERS, elements=st.floats(-3, 3, width=32) | st.just(float("nan")))


@st.composite
def federations(draw: st.DrawFn) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """How many; who falls where, how, and in how many attempts; and everybody's update with its weight."""
    count = draw(st.integers(3, 7))
    who = draw(st.lists(st.sampled_from(NAMES[:count]), max_size=4, unique=True))
    return (
        count,
        {name: draw(falls) for name in who},
        {name: (draw(updates), draw(st.integers(1, 63))) for name in NAMES[:count]},
    )


@given(federations())
@settings(deadline=None, derandomize=True, max_examples=30)
def test_whoever_falls_whenever_it_is_the_exact_sum_or_none(
    drawn: tuple[int, dict[str, Any], dict[str, Any]],
) -> None:
    count, falling, contents = drawn
    names = NAMES[:count]

    def vector(name: str, digest: str, layout: Layout) -> Ring:
        update, weight = contents[name]
        counters = {"train_loss": 1000, "train_tokens": len(name)}
        return fixed_point.encode(update, weight, counters, layout, seeded("rounding", name))

    with tempfile.TemporaryDirectory() as root:
        federation = Federation(Path(root), federation_config(names))
        federation.vector = vector
        answers = [who_falls(how, kind, name, attempts=n) for name, (kind, how, n) in falling.items()]
        members = WiredMembers(federation, both(*answers))
        terms = Terms.of(count, 1, 3)
        try:
            collected = collect(federation, members)
        except RunStopped:
            assert len(falling) > terms.dropouts
            nothing_is_known(members, federation)
            return
        assert len(collected.contributors) >= terms.survivors
        assert is_the_plain_sum(federation, collected, collected.contributors, members=count)
        assert set(sets_named(members)) == {collected.contributors}
        assert set(collected.contributors) | set(collected.refused) == set(names)
        assert set(collected.refused) <= set(falling)
        if len(falling) <= terms.dropouts:
            assert collected.attempts == 1
