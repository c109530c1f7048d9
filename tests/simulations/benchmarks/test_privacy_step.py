"""The benchmark of a private step: arms that do the same, and ratios that mean what they say."""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
import pytest

from common.models import load_adapter
from simulations.benchmarks.arms import SHAPES, Factors, examples, write_model
from simulations.benchmarks.privacy_step import ARMS, arms, step_costs

TINY = SHAPES["tiny"]


def moved(after: Factors, before: Factors) -> np.ndarray:
    return np.concatenate([(after[key] - before[key]).ravel() for key in sorted(before)])


def test_every_arm_takes_the_same_step_where_nothing_is_noised(tmp_path: Path) -> None:
    write_model(TINY, tmp_path / "model")
    before = dict(load_adapter(tmp_path / "model" / "start").factors)
    steps = arms(TINY, tmp_path / "model", noise_multiplier=0.0)
    lot = examples(TINY, 8)
    found = {arm: moved(steps[arm](lot), before) for arm in ARMS}
    again = {arm: moved(steps[arm](lot), before) for arm in ARMS}  # each begins anew
    size = np.linalg.norm(found["private"])
    assert size > 0
    # AdamW's first step has the gradient's sign: only where that is rounding do sums in another order differ.
    assert np.linalg.norm(found["private"] - found["opacus_padded"]) < 0.02 * size
    # Without privacy the mean is over tokens and not over units: about the same direction.
    cosine = found["private"] @ found["nonprivate"] / size / np.linalg.norm(found["nonprivate"])
    assert 0.5 < cosine < 0.999
    for arm in ARMS:
        np.testing.assert_allclose(again[arm], found[arm], rtol=0, atol=1e-3 * float(size))


def test_ratios_are_medians_over_the_same_lots(tmp_path: Path) -> None:
    ticks = iter(range(1_000_000))
    result = step_costs(TINY, tmp_path / "model", lot=8, repeats=3, clock=lambda: next(ticks) ** 1.5)
    taken = result["seconds"]
    assert set(taken) == set(ARMS)
    assert all(len(seconds) == 3 for seconds in taken.values())
    pairs = zip(taken["private"], taken["nonprivate"], taken["opacus_padded"], strict=True)
    ratios = [(private / plain, opacus / private) for private, plain, opacus in pairs]
    assert result["step_vs_nonprivate"] == pytest.approx(statistics.median(a for a, _ in ratios), rel=1e-3)
    assert result["speedup_vs_opacus_padded"] == pytest.approx(statistics.median(b for _, b in ratios), rel=1e-3)
    assert result["tokens"] == sum(len(example.ids) for example in examples(TINY, 32)[8:])
