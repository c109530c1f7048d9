"""The exact sampler against the probabilities it is defined by."""

from __future__ import annotations

import ast
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from common.errors import ConfigError
from common.privacy import discrete_gaussian as module
from common.privacy.discrete_gaussian import discrete_gaussian
from common.privacy.noise import SeededNoise, SystemNoise

UNLIKELY = 1e-6
SCALES = [Fraction(1, 3), Fraction(1, 2), Fraction(1), Fraction(7, 5), Fraction(3), Fraction(123, 16), Fraction(50)]


def probabilities(scale: Fraction, edge: int) -> np.ndarray:
    """Of -edge to edge, the tails beyond left out."""
    weights = np.exp(-(np.arange(-edge, edge + 1) ** 2) / (2 * float(scale) ** 2))
    return weights / weights.sum()


@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_every_number_has_its_probability(scale: Fraction) -> None:
    # Below 1 most proposals are rejected.
    count, edge = 300_000 if scale >= 1 else 30_000, 9 * max(1, round(scale))
    found = discrete_gaussian(scale, count, SeededNoise("pmf", str(scale)))
    assert found.dtype == np.int64
    assert np.abs(found).max() <= edge
    expected = count * probabilities(scale, edge)
    counts = np.bincount(found + edge, minlength=2 * edge + 1)
    # Cells of fewer than ten expected draws are one cell: the tails.
    common = expected >= 10
    observed = [*counts[common], counts[~common].sum()]
    assert stats.chisquare(observed, [*expected[common], expected[~common].sum()]).pvalue > UNLIKELY


@pytest.mark.parametrize("scale", [Fraction(50), Fraction(2000), Fraction(32001, 16), Fraction(1 << 20)], ids=str)
def test_a_large_scale_has_the_moments_and_the_shape_of_a_normal(scale: Fraction) -> None:
    found = discrete_gaussian(scale, 200_000, SeededNoise("moments", str(scale)))
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        powers = (found / float(scale)) ** power
        assert abs(np.mean(powers) - moment) < 6 * np.std(powers) / np.sqrt(len(found))
    # Edges between whole numbers, where the sums of both distributions meet to the square of 1 / scale.
    edges = np.round(np.arange(-5, 5.1, 0.25) * float(scale)) + 0.5
    expected = np.diff(stats.norm.cdf(edges / float(scale)))
    counts, _ = np.histogram(found, edges)
    assert stats.chisquare(counts, expected / expected.sum() * counts.sum()).pvalue > UNLIKELY


def test_the_variance_of_a_small_scale_is_below_its_square() -> None:
    scale, values = Fraction(1, 2), np.arange(-9, 10)
    exact = float((probabilities(scale, 9) * values**2).sum())
    assert exact < 0.24
    found = discrete_gaussian(scale, 100_000, SeededNoise("small"))
    assert np.mean(found**2) == pytest.approx(exact, abs=6 * np.std(found**2) / np.sqrt(len(found)))


def test_draws_are_independent_and_their_order_tells_nothing() -> None:
    found = discrete_gaussian(Fraction(11, 2), 200_000, SeededNoise("order"))
    for shift in (1, 2, 1 << 12):
        for f in (np.asarray, np.abs):
            assert abs(np.corrcoef(f(found[:-shift]), f(found[shift:]))[0, 1]) < 6 / np.sqrt(len(found))
    parts = found.astype(float).reshape(10, -1)
    assert stats.f_oneway(*parts).pvalue > UNLIKELY
    assert stats.bartlett(*parts).pvalue > UNLIKELY


def test_the_system_gives_the_same_distribution() -> None:
    seeded = discrete_gaussian(Fraction(20), 100_000, SeededNoise(1))
    assert stats.ks_2samp(seeded, discrete_gaussian(Fraction(20), 100_000, SystemNoise())).pvalue > UNLIKELY


def test_a_seed_repeats_and_any_number_can_be_drawn() -> None:
    for count in (0, 1, 2, 17, 40_000):
        first = discrete_gaussian(Fraction(5, 2), count, SeededNoise(1))
        assert first.shape == (count,)
        assert np.array_equal(first, discrete_gaussian(Fraction(5, 2), count, SeededNoise(1)))


@pytest.mark.parametrize("scale", [Fraction(0), Fraction(-1), Fraction((1 << 20) + 1), Fraction(1, (1 << 20) + 1)])
def test_a_scale_that_cannot_be_drawn_is_refused(scale: Fraction) -> None:
    with pytest.raises(ConfigError, match="quotient"):
        discrete_gaussian(scale, 1, SeededNoise(1))


def test_no_decision_is_taken_in_floating_point() -> None:
    tree = ast.parse(Path(module.__file__).read_text())
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Div)
        assert not (isinstance(node, ast.Constant) and isinstance(node.value, float))
        assert not (isinstance(node, ast.Attribute | ast.Name) and "float" in ast.unparse(node))
