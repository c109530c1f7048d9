"""Local training whose result bounds what it tells of any one unit: DP-SGD (Abadi et al. 2016) on the LoRA factors.

A step takes every unit with the same probability, independently of all others (Poisson sampling), clips each unit's
gradient, adds Gaussian noise to the sum and divides by the expected number of units, which is public. Everything after
that, AdamW's moments included, is post-processing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from client.state import LocalState
from client.training import Assignment, Trained, _moments, _optimizer, _trainable, learning_rate
from client.units import PATIENT, RECORD, Unit
from common.adapter import Adapter
from common.config import PrivacyConfig, TrainConfig
from common.errors import ConfigError, DataError
from common.models import LoraModel
from common.privacy.mechanism import noise_multiplier, steps_per_round
from common.privacy.noise import NoiseSource, bernoulli

if TYPE_CHECKING:
    import torch

    from client.noised_optimizer import NoisedOptimizer

_PIECE_BYTES = 2**30  # of gradients, one a unit, that are held at a time


@dataclass(frozen=True)
class NoisedStep:
    """What each step does to the units; all of it public.

    noise_multiplier: standard deviation of the noise on a sum of clipped gradients, over `clip`. clip: largest L2 norm
    of a unit's gradient, over all trained factors together. sampling_rate: probability of each unit in each step.
    """

    noise_multiplier: float
    clip: float
    sampling_rate: float

    def __post_init__(self) -> None:
        """Raises ConfigError for what bounds nothing."""
        if not (0 < self.sampling_rate <= 1 and 0 < self.clip < math.inf and 0 <= self.noise_multiplier < math.inf):
            raise ConfigError(
                "expected a sampling rate above 0 and at most 1, a clip above 0 and a noise multiplier of at least 0,"
                f" found {self.sampling_rate:g}, {self.clip:g} and {self.noise_multiplier:g}"
            )


def noised_step(privacy: PrivacyConfig, passes: float, rounds: int) -> NoisedStep | None:
    """What each step bounds and adds in a run of so many rounds and passes a round; None in modes without.

    Raises ConfigError where no noise reaches `privacy.epsilon`.
    """
    if privacy.mode not in (RECORD, PATIENT):
        return None
    steps = steps_per_round(passes, privacy.sampling_rate)
    return NoisedStep(noise_multiplier(privacy, rounds, steps), privacy.clip, privacy.sampling_rate)


def train_privately(
    model: LoraModel,
    units: Sequence[Unit],
    start: Adapter,
    state: LocalState,
    config: TrainConfig,
    step: NoisedStep,
    assignment: Assignment,
    noise: NoiseSource,
) -> Trained:
    """Trains the adapter `start` for one round with DP-SGD and AdamW.

    Only the adapter may leave: it has been made from noised sums alone, given `start`, a state that this function
    returned (or none), and as many events of the ledger as `Trained.steps`. Loss and tokens are data of the lots.

    Of `config`, `batch_size` and `max_grad_norm` are of no account here: the sampling rate and the clip stand for them.
    Lots are never cut short: a large one goes through in pieces of about `row_tokens`, and an empty one takes its noise
    and is a step like any other. With `proximal`, the pull to `start` is added after the noise: it knows no records.

    Raises DataError without units, ConfigError for an adapter with dropout, and ModelError for a model in which units
    cannot be told apart.
    """
    import torch

    from client.noised_optimizer import NoisedOptimizer
    from client.unit_gradients import UnitGradients

    _require(model, units)
    parameters = _trainable(model, assignment.trained)
    adamw = _optimizer(parameters, state if config.optimizer_state == "keep" else LocalState(), config)
    steps = steps_per_round(config.passes_per_round, step.sampling_rate)
    nats, tokens = torch.zeros((), dtype=torch.float64, device=model.device), 0
    with UnitGradients(model, parameters, config.checkpointing) as gradients:
        model.write(start)
        expected = step.sampling_rate * len(units)
        optimizer = NoisedOptimizer(adamw, step.noise_multiplier, step.clip, expected, noise)
        if config.proximal:
            optimizer.attach_step_hook(_pull(parameters, config.proximal))
        most = _most(parameters)
        for number in range(steps):
            progress = (assignment.round - 1 + (number + 1) / steps) / assignment.rounds
            adamw.param_groups[0]["lr"] = learning_rate(config, progress)
            lot = list(compress(units, bernoulli(noise, step.sampling_rate, len(units))))
            tokens += sum(unit.supervised for unit in lot)
            waiting = list(pieces(lot, config.row_tokens, most))
            for place, piece in enumerate(waiting, 1):
                nats += gradients.compute(piece, config.row_tokens)
                optimizer.signal_skip_step(place < len(waiting))
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        adapter = model.read()
    moments = _moments(adamw, parameters) if config.optimizer_state == "keep" else ({}, {})
    return Trained(
        adapter=adapter,
        state=LocalState(state.rounds + 1, state.position, state.steps + steps, *moments),
        loss=float(nats),
        tokens=tokens,
        steps=steps,
    )


def clipped_sum(
    model: LoraModel,
    units: Sequence[Unit],
    start: Adapter,
    keys: Sequence[str],
    config: TrainConfig,
    clip: float,
    sampling_rate: float,
    noise: NoiseSource,
) -> NDArray[np.float64]:
    """The sum over one lot of the units' gradients at `start`, each clipped [parameters of `keys`, in that order].

    It has no noise, and must not leave as it is: a unit that is there or not moves it by at most `clip` in L2.

    Raises what `train_privately` raises.
    """
    import torch

    from client.noised_optimizer import sums_of_clipped
    from client.unit_gradients import UnitGradients

    _require(model, units)
    parameters = _trainable(model, keys)
    ordered = [parameters[key] for key in keys]
    total = torch.zeros(sum(parameter.numel() for parameter in ordered), dtype=torch.float64)
    with UnitGradients(model, parameters, config.checkpointing) as gradients:
        model.write(start)
        lot = list(compress(units, bernoulli(noise, sampling_rate, len(units))))
        for piece in pieces(lot, config.row_tokens, _most(parameters)):
            gradients.compute(piece, config.row_tokens)
            sums = sums_of_clipped([parameter.grad_sample for parameter in ordered], clip)  # type: ignore[attr-defined]
            total += torch.cat([part.flatten() for part in sums]).double().cpu()
    return total.numpy()


def _require(model: LoraModel, units: Sequence[Unit]) -> None:
    if not units:
        raise DataError("expected at least one unit to train on, found none")
    if model.lora.dropout:
        raise ConfigError(f"lora.dropout: expected 0 under differential privacy, found {model.lora.dropout:g}")


def _most(parameters: Mapping[str, torch.nn.Parameter]) -> int:
    """How many units' gradients are held at a time."""
    return max(1, _PIECE_BYTES // (4 * sum(parameter.numel() for parameter in parameters.values())))


def pieces(lot: Sequence[Unit], row_tokens: int, most: int) -> Iterator[list[Unit]]:
    """All units of a lot, in order, in pieces of at most `row_tokens` tokens and `most` units; a unit is never cut.

    A unit with more tokens is a piece of its own, and an empty lot is one empty piece.
    """
    piece: list[Unit] = []
    tokens = 0
    for unit in lot:
        if piece and (tokens + unit.tokens > row_tokens or len(piece) == most):
            yield piece
            piece, tokens = [], 0
        piece.append(unit)
        tokens += unit.tokens
    yield piece


def _pull(parameters: dict[str, torch.nn.Parameter], strength: float) -> Callable[[NoisedOptimizer], None]:
    """A hook that adds `strength` times the distance from here to the noised gradient."""
    anchors = [parameter.detach().clone() for parameter in parameters.values()]

    def add(_: NoisedOptimizer) -> None:
        for parameter, anchor in zip(parameters.values(), anchors, strict=True):
            assert parameter.grad is not None
            parameter.grad += strength * (parameter.detach() - anchor)

    return add
