"""One step of DP-SGD, many times, beside a unit whose gradient the attacker knows: is the noise what is claimed?

The sharpest question that can be put to a step (Nasr et al. 2021, section 4; Nasr et al. 2023): the attacker knows all
other units, has chosen the canary, sees the noised sum and only has to say whether the canary is in it. Every unit is
in the lot, so that no sampling hides it. What comes out is then one of two Gaussians, a clip apart, and their distance
in standard deviations is all there is to know.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2

from client.private_training import NoisedStep, train_privately
from client.state import LocalState
from client.training import Assignment
from client.units import Unit
from common.adapter import Adapter, flatten
from common.config import TrainConfig
from common.errors import ConfigError
from common.models import LoraModel
from common.privacy.noise import NoiseSource, SeededNoise
from common.randomness import seeded
from common.text import Example
from simulations.attacks.bounds import Scores, rates
from simulations.attacks.probing import gradients, ordinary_tokens

Release = Callable[[bool, float, NoiseSource], NDArray[np.float64]]
"""The noised sum of clipped gradients [m], over the clip: with the canary or with nothing in its place, at a noise
multiplier, with noise from a source."""

SIGMA = 1.0
"""Noise multiplier of the steps. The code is the same for each; at this one, a few hundred steps tell much."""

CONFIDENCE = 0.99
"""Of each of the two facts that chance has a part in: how far steps are told apart, and their noise."""

ROUNDING = 1e-3
"""What a unit may reach beyond the clip, over it: float32 carries the sum."""

_OTHERS = 8
_SHORT = 4  # tokens of each of them
_LONG = 128  # of the canary, where the model has room
_BETA1 = 0.9  # of AdamW, whose first moment after one step is (1 - beta1) times the gradient that it met


@dataclass(frozen=True)
class Steps:
    """What many steps show.

    reach: how far the canary moves a sum without noise, over the clip; at most 1 where everything is clipped as it
    should be. mu: how many standard deviations it moves one with noise, at least, with `CONFIDENCE`; 1 / SIGMA at most.
    noise: standard deviation of the noise along the canary, over what is claimed, from both kinds of step. trials:
    steps of each kind.
    """

    reach: float
    mu: float
    noise: float
    trials: int

    @property
    def least_noise(self) -> float:
        """What `noise` that is as claimed stays above with `CONFIDENCE`: its square times its degrees of freedom is
        chi-square, and each kind of step gave one up for its mean.
        """
        freedom = 2 * (self.trials - 1)
        return math.sqrt(float(chi2.ppf(1 - CONFIDENCE, freedom)) / freedom)

    @property
    def holds(self) -> bool:
        """Whether nothing contradicts the claim: neither how far steps are told apart, nor the clip, nor the noise."""
        return self.mu <= 1 / SIGMA and self.reach <= 1 + ROUNDING and self.noise >= self.least_noise


def audit(release: Release, trials: int, seed: int) -> Steps:
    """Takes `trials` steps with the canary and as many without; the attacker looks along what the canary changes.

    Raises ConfigError for a canary that changes nothing, and for fewer than 8 trials.
    """
    if trials < 8:
        raise ConfigError(f"expected at least 8 trials of a single step, found {trials}")
    silent = SeededNoise(seed, "silent")
    before = release(False, 0.0, silent)
    direction = release(True, 0.0, silent) - before
    reach = float(np.linalg.norm(direction))
    if reach == 0:
        raise ConfigError("expected a canary that changes the sum, found one whose gradient is zero")
    direction /= reach

    def scores(inside: bool) -> Scores:
        sources = (SeededNoise(seed, "step", str(inside), trial) for trial in range(trials))
        return np.array([direction @ (release(inside, SIGMA, source) - before) for source in sources])

    inside, outside = scores(True), scores(False)
    spread = float(np.sqrt((inside.var(ddof=1) + outside.var(ddof=1)) / 2))
    return Steps(reach, rates(inside, outside, CONFIDENCE).mu, spread / SIGMA, trials)


@dataclass(frozen=True)
class Scene:
    """A lot in which each known mistake shows.

    Short units that all pull the same way, and a canary that is much longer; each gradient is far above `clip`, so that
    one which is not clipped stands out. Where a loss is divided by the tokens of the lot, the canary makes everybody
    else's part so small that clipping no longer evens it out.
    """

    others: tuple[Unit, ...]
    canary: Unit
    clip: float


def scene(model: LoraModel, start: Adapter, keys: Sequence[str], seed: int) -> Scene:
    """The lot of an audit, of tokens that are nobody's."""
    rng, ordinary = seeded(seed, "scene"), ordinary_tokens(model)
    room = getattr(model.peft.get_base_model().config, "max_position_embeddings", _LONG)

    def unit(length: int) -> Unit:
        return Unit((Example(tuple(int(token) for token in rng.choice(ordinary, length)), 1, "", None),))

    short, canary = unit(_SHORT), unit(min(_LONG, room))
    (gradient,) = gradients(model, start, keys, [short])
    return Scene((short,) * _OTHERS, canary, 0.9 * float(np.linalg.norm(gradient.astype(np.float64))) / _OTHERS)


def real_steps(model: LoraModel, start: Adapter, keys: Sequence[str], scene: Scene) -> Release:
    """The institutions' own private training of the factors `keys`; what it releases is read from AdamW's moment."""
    config = replace(TrainConfig(), passes_per_round=0.0)  # one step, whatever the sampling rate
    assignment = Assignment(1, 1, tuple(keys), 0, "audited")

    def release(inside: bool, sigma: float, noise: NoiseSource) -> NDArray[np.float64]:
        units = [*scene.others, scene.canary if inside else Unit(())]
        step = NoisedStep(noise_multiplier=sigma, clip=scene.clip, sampling_rate=1.0)
        found = train_privately(model, units, start, LocalState(), config, step, assignment, noise)
        moment = flatten(found.state.first, keys).astype(np.float64)
        return moment / (1 - _BETA1) * len(units) / scene.clip

    return release


def last_layer(start: Adapter) -> tuple[str, ...]:
    """The two factors of one linear layer: enough for a step, and quick to take."""
    return tuple(start.factors)[-2:]
