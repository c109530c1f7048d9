"""Seeds: the same everywhere, and different for different purposes."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.randomness import derive_seed, seeded

parts = st.lists(st.one_of(st.integers(), st.text("ab1 ", max_size=3)), max_size=4)


def test_seeds_are_the_same_on_every_machine() -> None:
    """SHA-256 of the typed parts, joined by the unit separator: what a run on record was made with must not change."""
    assert derive_seed(1, "rounding", "north", 7) == 0xFCD8D9CA3F98395C
    assert seeded(1, "cohort", 3).integers(0, 1000, 4).tolist() == [681, 462, 829, 922]


def test_seeds_do_not_depend_on_the_process() -> None:
    code = "from common.randomness import derive_seed; print(derive_seed('order', 3))"
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert {int(run) for run in runs} == {derive_seed("order", 3)}


@given(parts, parts)
def test_every_part_its_type_and_the_order_count(one: list[int | str], other: list[int | str]) -> None:
    typed = [[(type(part), part) for part in found] for found in (one, other)]
    assert (derive_seed(*one) == derive_seed(*other)) == (typed[0] == typed[1])
    assert 0 <= derive_seed(*one) < 2**64


@pytest.mark.parametrize("other", [("seed", 2), ("Seed", 1), (1, "seed"), ("seed", "1"), ("seed", 1, "")])
def test_generators_for_other_purposes_are_unrelated(other: tuple[str | int, ...]) -> None:
    draws = 4000
    here, there = seeded("seed", 1).normal(size=draws), seeded(*other).normal(size=draws)
    assert abs(np.corrcoef(here, there)[0, 1]) < 4.5 / np.sqrt(draws)  # 4.5 standard errors, and the seeds are fixed
