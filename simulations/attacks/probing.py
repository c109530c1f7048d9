"""What an attacker computes with a model that it holds: losses of units under an adapter, and their gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from client.units import Unit
from common.adapter import Adapter, Vector
from common.models import LoraModel
from common.text import packs

ROW_TOKENS = 2048
_AT_ONCE = 32  # units whose gradients are held together


def losses(model: LoraModel, adapter: Adapter, units: Sequence[Unit]) -> NDArray[np.float64]:
    """Mean nats of each unit's own supervised tokens under `adapter` [units]; of a unit without any, not a number."""
    import torch
    from torch.nn.functional import cross_entropy

    examples = [example for unit in units for example in unit.examples]
    owners = [number for number, unit in enumerate(units) for _ in range(unit.supervised)]
    model.write(adapter)
    model.peft.eval()
    found: list[NDArray[np.float64]] = [np.zeros(0)]
    with torch.inference_mode():
        for row in packs(examples, ROW_TOKENS, padded=not model.packed):
            logits = model.logits(row).float()
            found.append(cross_entropy(logits, row.targets.to(logits.device), reduction="none").double().cpu().numpy())
    sums = np.bincount(owners, weights=np.concatenate(found), minlength=len(units))
    with np.errstate(invalid="ignore"):
        means: NDArray[np.float64] = sums / np.array([unit.supervised for unit in units])
    return means


def gradients(model: LoraModel, adapter: Adapter, keys: Sequence[str], units: Sequence[Unit]) -> Iterator[Vector]:
    """The gradient of each unit's loss in the factors `keys`, one after the other in their order [m], at `adapter`."""
    from client.unit_gradients import UnitGradients

    wanted = {key: model.parameters[key] for key in keys}
    for key, parameter in model.parameters.items():
        parameter.requires_grad_(key in wanted)
    for start in range(0, len(units), _AT_ONCE):
        model.write(adapter)
        piece = units[start : start + _AT_ONCE]
        with UnitGradients(model, wanted, checkpointing=False) as held:
            held.compute(piece, ROW_TOKENS)
            parts = [p.grad_sample.flatten(1).cpu().numpy() for p in wanted.values()]  # type: ignore[attr-defined]
        yield from np.concatenate(parts, axis=1)
