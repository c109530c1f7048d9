"""Local training: one plain loop over packed batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from client.state import LocalState
from common.adapter import Adapter
from common.config import TrainConfig
from common.errors import DataError
from common.models import LoraModel
from common.randomness import derive_seed, seeded
from common.text import Example, packs

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Assignment:
    """One round of local training.

    round, rounds: place in the learning-rate schedule, counted from 1. trained: keys of the factors to train.
    seed, name: together they seed the order of records and dropout, so that no two institutions share them.
    """

    round: int
    rounds: int
    trained: tuple[str, ...]
    seed: int
    name: str


@dataclass(frozen=True)
class Trained:
    """The outcome of local training; private to the institution.

    loss: summed nats over the `tokens` supervised tokens seen in the round, as the model stood at each step.
    """

    adapter: Adapter
    state: LocalState
    loss: float
    tokens: int
    steps: int


def learning_rate(train: TrainConfig, progress: float) -> float:
    """The rate at `progress` in [0, 1] of the whole run: linear warm-up, then cosine to `final_rate` of the peak."""
    if progress < train.warmup:
        return train.learning_rate * progress / train.warmup
    through = (progress - train.warmup) / max(1.0 - train.warmup, 1e-12)
    share = train.final_rate + (1.0 - train.final_rate) * 0.5 * (1.0 + math.cos(math.pi * min(through, 1.0)))
    return train.learning_rate * share


def order(records: int, start: int, stop: int, seed: int, name: str) -> list[int]:
    """Indices of the records at places start to stop of an endless stream of shuffled passes over all records."""
    indices: list[int] = []
    for pass_number in range(start // records, math.ceil(stop / records)):
        shuffled = seeded(seed, "order", name, pass_number).permutation(records)
        begin = max(start - pass_number * records, 0)
        indices.extend(int(i) for i in shuffled[begin : min(stop - pass_number * records, records)])
    return indices


def train(
    model: LoraModel,
    examples: Sequence[Example],
    start: Adapter,
    state: LocalState,
    config: TrainConfig,
    assignment: Assignment,
) -> Trained:
    """Trains the adapter `start` on one round's share of the records with AdamW.

    The loss of a step is the mean over the supervised tokens of its batch, however many rows the batch takes. With
    `proximal` mu > 0, mu times the distance to `start` is added to the gradient (FedProx, Li et al. 2020).
    Deterministic on CPU for a given number of threads. A diverged loss is returned as it is (not finite); the caller
    decides what an unusable update means.

    Raises DataError without records.
    """
    import torch
    from torch.nn.functional import cross_entropy

    if not examples:
        raise DataError("expected at least one training record, found none")
    model.write(start)
    parameters = _trainable(model, assignment.trained)
    optimizer = _optimizer(parameters, state if config.optimizer_state == "keep" else LocalState(), config)
    anchors = {key: parameter.detach().clone() for key, parameter in parameters.items()} if config.proximal else {}
    # Counted from the run's beginning, so that fractions of a record never add up; a round has at least one record.
    target = max(round(len(examples) * config.passes_per_round * (state.rounds + 1)), state.position + 1)
    stream = order(len(examples), state.position, target, assignment.seed, assignment.name)
    batches = [stream[i : i + config.batch_size] for i in range(0, len(stream), config.batch_size)]
    loss_sum, tokens = torch.zeros((), dtype=torch.float64, device=model.device), 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(assignment.seed, "dropout", assignment.name, assignment.round) >> 1)
        model.checkpoint_activations(config.checkpointing)
        model.peft.train()
        for step, batch in enumerate(batches):
            progress = (assignment.round - 1 + (step + 1) / len(batches)) / assignment.rounds
            optimizer.param_groups[0]["lr"] = learning_rate(config, progress)
            rows = list(packs([examples[i] for i in batch], config.row_tokens, padded=not model.packed))
            supervised = sum(len(row.targets) for row in rows)
            for row in rows:
                losses = cross_entropy(model.logits(row).float(), row.targets.to(model.device), reduction="none")  # [t]
                (losses.sum() / supervised).backward()
                loss_sum += losses.detach().double().sum()
            tokens += supervised
            for key, anchor in anchors.items():
                _add_to_gradient(parameters[key], config.proximal * (parameters[key].detach() - anchor))
            torch.nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        model.peft.eval()
    moments = _moments(optimizer, parameters) if config.optimizer_state == "keep" else ({}, {})
    return Trained(
        adapter=model.read(),
        state=LocalState(state.rounds + 1, target, state.steps + len(batches), *moments),
        loss=float(loss_sum),
        tokens=tokens,
        steps=len(batches),
    )


def _trainable(model: LoraModel, keys: Sequence[str]) -> dict[str, torch.nn.Parameter]:
    """The named parameters, which alone are then trained."""
    wanted = set(keys)
    for key, parameter in model.parameters.items():
        parameter.requires_grad_(key in wanted)
        parameter.grad = None
    return {key: parameter for key, parameter in model.parameters.items() if key in wanted}


def _add_to_gradient(parameter: torch.nn.Parameter, addition: torch.Tensor) -> None:
    parameter.grad = addition if parameter.grad is None else parameter.grad + addition


def _optimizer(parameters: dict[str, torch.nn.Parameter], state: LocalState, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW that goes on from the moments in `state`, where there are any."""
    import torch

    optimizer = torch.optim.AdamW(
        parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay, foreach=True
    )
    for key, parameter in parameters.items():
        if key in state.first:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(state.steps)),
                "exp_avg": torch.from_numpy(state.first[key].copy()).to(parameter.device),
                "exp_avg_sq": torch.from_numpy(state.second[key].copy()).to(parameter.device),
            }
    return optimizer


def _moments(
    optimizer: torch.optim.AdamW, parameters: dict[str, torch.nn.Parameter]
) -> tuple[dict[str, NDArray[np.float32]], dict[str, NDArray[np.float32]]]:
    """First and second moment estimates by adapter key."""
    moments = [
        {key: optimizer.state[parameter][name].cpu().numpy().copy() for key, parameter in parameters.items()}
        for name in ("exp_avg", "exp_avg_sq")
    ]
    return moments[0], moments[1]
