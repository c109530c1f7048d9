"""The audit of single steps passes the real code, and catches each mistake that it is there for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from client import noised_optimizer
from client.unit_gradients import UnitGradients
from client.units import Unit
from common.adapter import Adapter
from common.errors import ConfigError
from common.models import LoraModel
from common.privacy.noise import NoiseSource, normals
from common.text import packs
from simulations.attacks.single_step import Release, Steps, audit, last_layer, real_steps, scene


@pytest.fixture
def release(model: LoraModel, start: Adapter) -> Release:
    keys = last_layer(start)
    return real_steps(model, start, keys, scene(model, start, keys, seed=1))


def test_the_real_code_has_its_noise_and_its_clip(release: Release) -> None:
    found = audit(release, trials=250, seed=1)
    assert found.holds
    assert 0.3 < found.mu <= 1  # near enough to the claim to have something to say
    assert found.reach == pytest.approx(1, abs=1e-4)  # the canary is long, so it is clipped, and nobody else moves
    assert found.noise == pytest.approx(1, abs=0.1)  # three standard errors of 500 draws


def test_halved_noise_is_caught(release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    def halved(source: NoiseSource, count: int) -> NDArray[np.float64]:
        return normals(source, count) / 2

    monkeypatch.setattr(noised_optimizer, "normals", halved)
    found = audit(release, trials=250, seed=1)
    assert not found.holds
    assert found.noise == pytest.approx(0.5, abs=0.05)


def test_a_skipped_clip_is_caught(release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    def unclipped(gradients: Sequence[torch.Tensor], clip: float) -> list[torch.Tensor]:
        return [gradient.sum(dim=0) for gradient in gradients]

    monkeypatch.setattr(noised_optimizer, "sums_of_clipped", unclipped)
    found = audit(release, trials=40, seed=1)
    assert not found.holds
    assert found.reach > 2


def test_a_loss_normalised_by_the_lot_is_caught(release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the canary's tokens make everybody else's gradient smaller, and the sum moves by more than a clip."""

    def by_the_lot(self: UnitGradients, units: Sequence[tuple[int, Unit]], row_tokens: int) -> torch.Tensor:
        documents = [(example, number) for number, unit in units for example in unit.examples]
        everything = sum(unit.supervised for _, unit in units)
        (row,) = packs([example for example, _ in documents], row_tokens)
        self._documents = (list(row.lengths), [number for _, number in documents])
        nats = cross_entropy(self.model.logits(row).float(), row.targets, reduction="sum")
        (nats / everything).backward()
        return nats.detach().double()

    monkeypatch.setattr(UnitGradients, "_backward", by_the_lot)
    found = audit(release, trials=40, seed=1)
    assert not found.holds
    assert found.reach > 2


def gaussian(reach: float, sigma: float = 1.0) -> Release:
    """A step of 20 parameters whose canary moves it by so much, with noise of another size than is claimed."""

    def release(inside: bool, claimed: float, noise: NoiseSource) -> NDArray[np.float64]:
        return np.eye(20)[3] * reach * inside + claimed * sigma * normals(noise, 20)

    return release


@pytest.mark.parametrize(
    ("reach", "sigma", "holds"),
    [
        (1.0, 1.0, True),
        (0.5, 1.0, True),
        (1.0, 1.3, True),
        (2.5, 1.0, False),
        (1.0, 0.4, False),
        (1.2, 1.0, False),
        (1.0, 0.85, False),
    ],
)
def test_what_is_told_apart_too_well_does_not_hold(reach: float, sigma: float, holds: bool) -> None:
    found = audit(gaussian(reach, sigma), trials=300, seed=3)
    assert found.holds is holds
    assert found.reach == pytest.approx(reach)
    assert found.noise == pytest.approx(sigma, rel=0.1)


RIGHT = Steps(reach=1.0, mu=0.7, noise=1.0, trials=16)


@pytest.mark.parametrize(
    ("steps", "holds"),
    [
        (RIGHT, True),
        (replace(RIGHT, mu=1.01), False),
        (replace(RIGHT, reach=1.0009), True),
        (replace(RIGHT, reach=1.0011), False),
        # 14.953 is the hundredth part's end of chi-square with 30 degrees of freedom, in every table.
        (replace(RIGHT, noise=math.sqrt(14.96 / 30)), True),
        (replace(RIGHT, noise=math.sqrt(14.94 / 30)), False),
        (replace(RIGHT, noise=5.0), True),
    ],
)
def test_each_fact_that_contradicts_the_claim_is_enough(steps: Steps, holds: bool) -> None:
    assert steps.holds is holds


def test_the_right_noise_is_blamed_rarely() -> None:
    """Bounds that hold with 99 %: of the distance, whose rates would both have to be off, and of the noise."""
    blamed = sum(not audit(gaussian(1.0), trials=100, seed=seed).holds for seed in range(60))
    assert blamed <= 2


@pytest.mark.parametrize(("made", "words"), [(gaussian(0.0), "changes the sum"), (gaussian(1.0), "at least 8 trials")])
def test_an_audit_without_anything_to_see_is_refused(made: Callable[..., NDArray[np.float64]], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        audit(made, trials=4 if "trials" in words else 8, seed=1)
