"""Gradients of LoRA factors, one for each unit of privacy, from rows in which the documents of many units stand.

While it is entered, `UnitGradients` gives the small linear layers that hold the factors another backward pass: instead
of one product over all tokens it takes one batched product over chunks of tokens, each of one unit, and adds the
chunks of a unit up. All the rest of the model, forwards and backwards, is as in training without privacy.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch.nn.functional import cross_entropy, linear

from client.units import Unit, require_units_apart
from common.adapter import Adapter
from common.errors import ConfigError, ModelError
from common.models import LoraModel
from common.randomness import seeded
from common.text import Example, packs

_CHUNK = 64
"""Tokens of one product; smaller ones leave more to add up, larger ones fill more of the last chunk with zeros."""

_TRIED: WeakKeyDictionary[LoraModel, dict[tuple[bool, tuple[str, ...]], bool]] = WeakKeyDictionary()
"""What the trial of a model has shown, by whether it checkpoints and the names of the factors."""

_LOG = logging.getLogger("silotune.client")

_TRIAL = tuple(
    Unit(tuple(Example(ids, 1, "", "") for ids in documents))
    for documents in (((0, 1, 2, 3, 1, 0), (2, 1, 0, 3)), ((1, 3, 2, 2, 0),), ((3, 0, 1, 2, 2, 1, 3), (0, 2)))
)


@dataclass(frozen=True)
class Layout:
    """Where the tokens of each unit stand in what goes through a layer, and in the chunks of the batched product.

    source: int64 [t], places of real tokens, in order of units; None where all tokens stand so already.
    target: int64 [t], their places in the chunks. owner: int64 [c], which unit each chunk is of.
    shape: rows and tokens a row of what goes through the layer.
    scratch: chunks as they were last filled, for a layer of the same width: what is to be zero in them is so already.
    """

    source: torch.Tensor | None
    target: torch.Tensor
    owner: torch.Tensor
    shape: tuple[int, int]
    scratch: dict[tuple[str, int, torch.dtype], torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, lengths: Sequence[int], owners: Sequence[int], packed: bool, device: torch.device) -> Layout:
        """The layout of documents that belong to `owners`, ascending: in one row, or each in a padded row of its own.

        Ascending, for then the tokens of a unit stand together and few chunks are filled up.
        """
        sizes, most = np.asarray(lengths), max(lengths)
        tokens = int(sizes.sum())
        unit = np.repeat(np.asarray(owners), sizes)  # [t]
        of_unit = np.bincount(unit)
        chunks = -(-of_unit // _CHUNK)
        within = np.arange(tokens) - (np.cumsum(of_unit) - of_unit)[unit]
        target = (np.cumsum(chunks) - chunks)[unit] * _CHUNK + within
        source = None
        if not packed:
            first = np.repeat(np.arange(len(sizes)) * most - (np.cumsum(sizes) - sizes), sizes)
            source = torch.from_numpy(first + np.arange(tokens)).to(device)
        return cls(
            source=source,
            target=torch.from_numpy(target).to(device),
            owner=torch.from_numpy(np.repeat(np.arange(len(of_unit)), chunks)).to(device),
            shape=(1, tokens) if packed else (len(sizes), most),
        )

    def chunks(self, side: str, tokens: torch.Tensor) -> torch.Tensor:
        """What goes through a layer, [rows x tokens, d], as chunks [c, _CHUNK, d] filled up with zeros.

        They hold until the next call with the same `side`, of the two sides of a product.
        """
        found = tokens if self.source is None else tokens[self.source]
        place = (side, found.shape[1], found.dtype)
        if place not in self.scratch:
            self.scratch[place] = found.new_zeros(len(self.owner) * _CHUNK, found.shape[1])
        return self.scratch[place].index_copy_(0, self.target, found).view(len(self.owner), _CHUNK, found.shape[1])


class _UnitLinear(torch.autograd.Function):
    """A linear layer whose backward pass leaves one gradient a unit in `parameter.grad_sample`, and none in `grad`."""

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, parameter: torch.nn.Parameter, gradients: torch.Tensor, layout: Layout
    ) -> torch.Tensor:
        weight = parameter.to(inputs.dtype)
        ctx.save_for_backward(inputs, weight)
        ctx.gradients, ctx.layout = gradients, layout
        return linear(inputs, weight)

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (output,) = outputs
        inputs, weight = ctx.saved_tensors
        layout: Layout = ctx.layout
        left = layout.chunks("left", output.flatten(0, -2))  # [c, _CHUNK, d_out]
        right = layout.chunks("right", inputs.flatten(0, -2))  # [c, _CHUNK, d_in]
        products = torch.bmm(left.transpose(1, 2), right)  # [c, d_out, d_in]
        ctx.gradients.index_add_(0, layout.owner, products.to(ctx.gradients.dtype))
        return (output @ weight if ctx.needs_input_grad[0] else None), None, None, None


class UnitGradients:
    """Computes the gradients of trained LoRA factors for each unit; holds the model's layers while it is entered.

    What a layer learns of a unit goes into `grad_sample` of its parameter, float32 [units, *shape], which is where
    Opacus looks for it. The model is in evaluation mode all the while, so that no dropout is drawn anywhere; with
    `checkpointing`, only the layers that forget activations know of training.

    together: whether units share rows. Where a trial shows that the gradients of units cannot be told apart then
    (factors on experts, 8-bit products), each unit goes through the model by itself, with the same result and more
    work.
    """

    def __init__(self, model: LoraModel, parameters: Mapping[str, torch.nn.Parameter], checkpointing: bool) -> None:
        self.model = model
        self.parameters = parameters
        self.checkpointing = checkpointing
        self.together = True
        self._layout: Layout | None = None
        self._documents: tuple[list[int], list[int]] = ([], [])  # lengths and owners of a row
        self._entered = ExitStack()

    def __enter__(self) -> UnitGradients:
        """Raises ConfigError when the architecture cannot checkpoint, and what `require_units_apart` raises."""
        require_units_apart(self.model)
        tried, this = _TRIED.setdefault(self.model, {}), (self.checkpointing, tuple(self.parameters))
        if this not in tried:
            tried[this] = _can_share_rows(self)
            if not tried[this]:
                _LOG.warning(
                    "%s with these lora.target_modules takes one unit of privacy at a time: same result, more work",
                    type(self.model.peft.get_base_model()).__name__,
                )
        self.hold(tried[this])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered.close()

    def hold(self, together: bool) -> None:
        """Takes hold of the model's layers until `__exit__`; for gradients of units that share rows, or do not."""
        self.together = together
        self.model.checkpoint_activations(self.checkpointing)
        self.model.peft.eval()
        for module in self.model.peft.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = True  # of the layer alone: what stands in it, dropout too, stays in evaluation
        self._entered.callback(self.model.peft.eval)
        self._entered.callback(self._forget)
        if together:
            handle = self.model.peft.register_forward_pre_hook(self._arrange, with_kwargs=True)
            self._entered.callback(handle.remove)
            for module, parameter in _linear_layers(self.model, self.parameters):
                module.forward = partial(self._linear, parameter)  # type: ignore[method-assign]
                self._entered.callback(delattr, module, "forward")

    def _forget(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None
            for name in ("grad_sample", "summed_grad"):
                if hasattr(parameter, name):
                    delattr(parameter, name)

    def compute(self, units: Sequence[Unit], row_tokens: int) -> torch.Tensor:
        """Leaves the gradient of each unit's loss in `grad_sample`; returns the summed nats of all their tokens.

        The loss of a unit is the mean over its own supervised tokens, in however many rows they stand: it depends on
        the unit alone, as a bound on the unit's influence requires, and its gradient has the same scale for short
        units and long ones, so that one bound suits all.
        """
        for parameter in self.parameters.values():
            parameter.grad_sample = torch.zeros(  # type: ignore[attr-defined]
                len(units), *parameter.shape, dtype=parameter.dtype, device=parameter.device
            )
        nats = torch.zeros((), dtype=torch.float64, device=self.model.device)
        if self.together:
            return nats + self._backward(list(enumerate(units)), row_tokens)
        for number, unit in enumerate(units):
            nats += self._backward([(number, unit)], row_tokens)
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    parameter.grad_sample[number] = parameter.grad  # type: ignore[attr-defined]
                    parameter.grad = None
        return nats

    def _backward(self, units: Sequence[tuple[int, Unit]], row_tokens: int) -> torch.Tensor:
        """One pass of the numbered units through the model, forwards and backwards; returns their summed nats."""
        documents = [(example, number, unit.supervised) for number, unit in units for example in unit.examples]
        nats = torch.zeros((), dtype=torch.float64, device=self.model.device)
        for row in packs([example for example, *_ in documents], row_tokens, padded=not self.model.packed):
            mine, documents = documents[: len(row.lengths)], documents[len(row.lengths) :]
            self._documents = (list(row.lengths), [number for _, number, _ in mine])
            shares = [1 / supervised for example, _, supervised in mine for _ in range(example.supervised)]
            losses = cross_entropy(self.model.logits(row).float(), row.targets.to(self.model.device), reduction="none")
            (losses * torch.tensor(shares, device=losses.device)).sum().backward()
            nats += losses.detach().double().sum()
        return nats

    def _arrange(self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before each forward pass: which documents of the row it is about, in order, and how they stand in it."""
        packed = kwargs.get("document_lengths") is not None
        count = len(self._documents[0]) if packed else kwargs["input_ids"].shape[0]
        lengths, owners = (values[:count] for values in self._documents)
        self._documents = (self._documents[0][count:], self._documents[1][count:])
        self._layout = Layout.of(lengths, owners, packed, self.model.device)

    def _linear(self, parameter: torch.nn.Parameter, inputs: torch.Tensor) -> torch.Tensor:
        layout = self._layout
        if layout is None or inputs.shape[:-1].numel() != layout.shape[0] * layout.shape[1]:
            # Else the trial has missed a layer to which some tokens only go.
            raise ConfigError(
                "expected every trained layer to see each token, so that it is known whose it is, found one of"
                f" {type(self.model.peft.get_base_model()).__name__} that sees others; name other layers in"
                " lora.target_modules"
            )
        device = inputs.device.type
        if torch.is_autocast_enabled(device):
            inputs = inputs.to(torch.get_autocast_dtype(device))
        found: torch.Tensor = _UnitLinear.apply(inputs, parameter, parameter.grad_sample, layout)  # type: ignore[no-untyped-call, attr-defined]
        return found


def _linear_layers(
    model: LoraModel, parameters: Mapping[str, torch.nn.Parameter]
) -> list[tuple[torch.nn.Linear, torch.nn.Parameter]]:
    """The plain linear layers whose weights are trained, and those."""
    trained = {id(parameter): parameter for parameter in parameters.values()}
    return [
        (module, trained[id(module.weight)])
        for module in model.peft.modules()
        if type(module) is torch.nn.Linear and set(dict(module.named_parameters())) == {"weight"}
        if id(module.weight) in trained
    ]


def _can_share_rows(gradients: UnitGradients) -> bool:
    """Whether units in common rows get the gradients that each gets by itself, tried on tokens that are nobody's."""
    model, parameters = gradients.model, gradients.parameters
    if getattr(model.peft.get_base_model(), "is_loaded_in_8bit", False):
        return False  # outliers are chosen by all that stands in a row (Dettmers et al. 2022, section 3.2)
    if len(_linear_layers(model, parameters)) != len(parameters):
        return False
    before = model.read()
    # Random factors: with B zero, as it is at first, the gradient of A is zero, whatever its layer makes of it.
    rng = seeded("unit gradients")
    model.write(
        Adapter({key: rng.normal(0, 0.05, factor.shape).astype(np.float32) for key, factor in before.factors.items()})
    )
    try:
        found = [_tried(gradients, together) for together in (True, False)]
    except (ConfigError, ModelError):
        return False
    finally:
        model.write(before)
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.2
    return all(
        bool(((shared - alone).norm(dim=1) <= tolerance * (alone.norm(dim=1) + 1e-2 * alone.norm())).all())
        for shared, alone in zip(*found, strict=True)
    )


def _tried(gradients: UnitGradients, together: bool) -> list[torch.Tensor]:
    """The gradients of the trial's units, [units, m], by factor."""
    gradients.hold(together)
    try:
        gradients.compute(_TRIAL, row_tokens=100)
        return [parameter.grad_sample.flatten(1) for parameter in gradients.parameters.values()]  # type: ignore[attr-defined]
    finally:
        gradients.__exit__(None, None, None)
