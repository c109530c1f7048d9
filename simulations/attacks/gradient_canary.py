"""One step of DP-SGD, many times, with one unit whose gradient the attacker knows: is the noise what is claimed?

The sharpest test that a single step can be given (Nasr et al. 2021, section 4; Nasr et al. 2023): the attacker knows
all other units, chooses the canary, sees the noised sum and only has to tell whether the canary is in it. Every unit is
in the lot, so that sampling hides nothing. The claim is taken at a large delta, where the accountant's figure is tight and
a few hundred trials are enough to break it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.private_training import NoisedStep, train_privately
from client.state import LocalState
from client.training import Assignment
from client.units import Unit
from common.adapter import Adapter
from common.config import TrainConfig
from common.errors import ConfigError
from common.models import LoraModel
from common.privacy.accounting import Event, epsilon
from common.privacy.noise import NoiseSource, SeededNoise
from common.randomness import seeded
from common.text import Example
from simulations.attacks.figures import Threshold, threshold_bound
from simulations.attacks.probing import gradients

Release = Callable[[bool, float, NoiseSource], NDArray[np.float64]]
"""The noised sum of clipped gradients, over the clip: with the canary or with nothing in its place, at a noise
multiplier, with noise from a source."""

SIGMA = 0.6
"""Noise multiplier of the test: the code is the same for every one, and at this one few trials tell much."""

DELTA = 0.4
"""Where the claim is taken; a run's own delta is smaller, and there a hundred trials would show nothing."""

_OTHERS = 8
_SHORT = 4  # tokens of each of them
_BETA1 = 0.9  # of AdamW, whose first moment after one step is (1 - beta1) times the gradient that it met


@dataclass(frozen=True)
class Audit:
    """What many steps prove. claimed: epsilon at `found.delta` of one step, as the accountant has it.

    length: of the canary's part in the sum without noise, over the clip; 1 for a canary that is clipped as it should.
    """

    claimed: float
    found: Threshold
    length: float

    @property
    def holds(self) -> bool:
        """Whether nothing contradicts the claim."""
        return self.found.bound <= self.claimed

    def as_dict(self) -> dict[str, Any]:
        return {
            "claimed": round(self.claimed, 3),
            **self.found.as_dict(),
            "length": round(self.length, 4),
            "holds": self.holds,
        }


def audit(release: Release, trials: int, seed: int, sigma: float = SIGMA, delta: float = DELTA) -> Audit:
    """Takes `trials` steps with the canary and as many without, and bounds epsilon from below.

    The score of a step is how far its sum lies in the direction in which the canary moves a sum without noise, which
    the attacker can compute. A release that keeps its claim is found to break it in at most 5 of 100 audits; one with
    half of the noise is missed in about 2 of 100 with 200 trials.

    Raises ConfigError for a canary that moves nothing.
    """
    silent = SeededNoise(seed, "no noise")
    direction = release(True, 0.0, silent) - release(False, 0.0, silent)
    length = float(np.linalg.norm(direction))
    if length == 0:
        raise ConfigError("expected a canary that changes the sum, found one whose gradient is zero")
    direction /= length

    def score(inside: bool, trial: int) -> float:
        return float(direction @ release(inside, sigma, SeededNoise(seed, "trial", str(inside), trial)))

    inside, outside = (np.array([score(side, trial) for trial in range(trials)]) for side in (True, False))
    return Audit(epsilon([Event("gaussian", sigma, 1.0, 1)], delta).bound, threshold_bound(inside, outside, delta), length)


@dataclass(frozen=True)
class Scene:
    """A lot in which every known mistake shows.

    Many short units that all pull the same way, and a canary that is much longer. Each gradient is far longer than
    `clip`, so that one which is not clipped stands out; and where a loss is divided by the tokens of the lot, the canary
    makes everybody else's part so small that clipping no longer evens it out.
    """

    others: tuple[Unit, ...]
    canary: Unit
    clip: float


def scene(model: LoraModel, start: Adapter, trained: Sequence[str], seed: int, longest: int) -> Scene:
    """The lot of an audit, of tokens that are nobody's. longest: tokens that a document may have."""
    rng = seeded(seed, "scene")
    special = set(model.tokenizer.all_special_ids)
    ordinary = [token for token in range(len(model.tokenizer)) if token not in special]

    def unit(length: int) -> Unit:
        return Unit((Example(tuple(int(token) for token in rng.choice(ordinary, length)), 1, "", None),))

    short, canary = unit(_SHORT), unit(min(longest, 4 * _OTHERS * _SHORT))
    (gradient,) = gradients(model, start, trained, [short])
    clip = 0.9 * float(np.linalg.norm(gradient.astype(np.float64))) / _OTHERS
    return Scene((short,) * _OTHERS, canary, clip)


def real_release(
    model: LoraModel, start: Adapter, trained: Sequence[str], scene: Scene
) -> Release:
    """The private training of institutions, for one step; the sum is read from AdamW's first moment."""
    config = replace(TrainConfig(), passes_per_round=0.0)  # one step, whatever the sampling rate
    assignment = Assignment(1, 1, tuple(trained), 0, "audited")

    def release(inside: bool, sigma: float, noise: NoiseSource) -> NDArray[np.float64]:
        units = [*scene.others, scene.canary if inside else Unit(())]
        step = NoisedStep(noise_multiplier=sigma, clip=scene.clip, sampling_rate=1.0)
        found = train_privately(model, units, start, LocalState(), config, step, assignment, noise)
        moment = np.concatenate([found.state.first[key].ravel() for key in trained]).astype(np.float64)
        return moment / (1 - _BETA1) * len(units) / scene.clip

    return release
