"""What an attacker computes with a model in hand: losses under an adapter, and gradients of losses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from client.unit_gradients import UnitGradients
from client.units import Unit
from common.adapter import Adapter, Vector
from common.evaluation import ROW_TOKENS
from common.models import LoraModel
from common.text import packs

_AT_ONCE = 16  # units whose gradients are held together


def losses(model: LoraModel, adapter: Adapter, units: Sequence[Unit]) -> NDArray[np.float64]:
    """Mean nats of each unit's supervised tokens under `adapter` [units]. Raises ValueError for a unit without any."""
    counts = np.array([unit.supervised for unit in units])
    if not counts.all():
        raise ValueError("expected supervised tokens in every unit")
    model.write(adapter)
    model.peft.eval()
    found = []
    with torch.inference_mode():
        examples = [example for unit in units for example in unit.examples]
        for row in packs(examples, ROW_TOKENS, padded=not model.packed):
            nats = cross_entropy(model.logits(row).float(), row.targets.to(model.device), reduction="none")
            found.append(nats.double().cpu().numpy())
    owners = np.repeat(np.arange(len(units)), counts)
    sums = np.bincount(owners, weights=np.concatenate(found), minlength=len(units))
    return np.asarray(sums / counts, np.float64)


def gradients(model: LoraModel, adapter: Adapter, keys: Sequence[str], units: Sequence[Unit]) -> Iterator[Vector]:
    """The gradient of each unit's loss at `adapter`, one after the other [m], the factors in the order of `keys`."""
    wanted = {key: model.parameters[key] for key in keys}
    for key, parameter in model.parameters.items():
        parameter.requires_grad_(key in wanted)
    model.write(adapter)
    with UnitGradients(model, wanted, checkpointing=False) as held:
        for start in range(0, len(units), _AT_ONCE):
            held.compute(units[start : start + _AT_ONCE], ROW_TOKENS)
            parts = [p.grad_sample.flatten(1).cpu().numpy() for p in wanted.values()]  # type: ignore[attr-defined]
            yield from np.concatenate(parts, axis=1)


def ordinary_tokens(model: LoraModel) -> NDArray[np.int64]:
    """All tokens that stand for text."""
    special = set(model.tokenizer.all_special_ids)
    return np.array([token for token in range(len(model.tokenizer)) if token not in special])
