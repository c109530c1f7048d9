"""Opacus's optimizer with a bound that holds for every number a gradient can be, and noise of our own source."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed

from common.config import LEAST_CLIP
from common.errors import ConfigError
from common.privacy.noise import NoiseSource, normals

_ROOM = 1 - 2**-20
"""What is left below the bound, so that rounding to float32 carries nothing above it."""


def sums_of_clipped(gradients: Sequence[torch.Tensor], clip: float) -> list[torch.Tensor]:
    """The sum over units of gradients [units, *shape], each unit's scaled to at most `clip` in L2 over all tensors.

    A unit whose gradient is not finite, or so large that float32 cannot scale it to `clip`, contributes zeros: that too
    depends on the unit alone, and is within the bound.

    Raises ConfigError for a clip below LEAST_CLIP, where rounding carries above it what was scaled to it.
    """
    if not clip >= LEAST_CLIP:
        raise ConfigError(f"expected a clip of at least {LEAST_CLIP:g}, found {clip:g}")
    squares = [
        torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=torch.float64).square() for gradient in gradients
    ]
    norms = torch.stack(squares).sum(dim=0).sqrt()  # float64 [units]: the squares of float32 numbers all fit
    factors = (clip * _ROOM / norms).clamp(max=1.0)
    usable = factors >= torch.finfo(torch.float32).tiny  # below it numbers are coarse; false for what is no number
    if not bool(usable.all()):
        gradients, factors = [gradient[usable] for gradient in gradients], factors[usable]
    return [torch.tensordot(factors.to(gradient.dtype), gradient, dims=1) for gradient in gradients]


class NoisedOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus ships no types
    """Clips the gradients of units, adds them up, adds noise and steps; the denominator is fixed.

    Two parts of Opacus's own are replaced. Its noise is drawn by torch.normal, whose generator can be foretold from
    what it has drawn; here it comes from `noise`, and is added in float64 before the sum is rounded. Its clipping
    divides by a norm in float32, and lets one gradient that is not finite spoil the sum of all.

    expected_units: sampling rate x units, not rounded, whatever the lot has.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        noise_multiplier: float,
        clip: float,
        expected_units: float,
        noise: NoiseSource,
    ) -> None:
        super().__init__(
            optimizer, noise_multiplier=noise_multiplier, max_grad_norm=clip, expected_batch_size=expected_units
        )
        self._noise = noise

    def clip_and_accumulate(self) -> None:
        """Adds the clipped gradients of a piece of the lot to the sum."""
        for parameter in self.params:
            _check_processed_flag(parameter.grad_sample)
        for parameter, total in zip(self.params, sums_of_clipped(self.grad_samples, self.max_grad_norm), strict=True):
            parameter.summed_grad = total if parameter.summed_grad is None else parameter.summed_grad + total
            _mark_as_processed(parameter.grad_sample)

    def add_noise(self) -> None:
        """Gaussian noise of `noise_multiplier` x `max_grad_norm` on every element of the sum, an empty lot's too."""
        scale = self.noise_multiplier * self.max_grad_norm
        for parameter in self.params:
            _check_processed_flag(parameter.summed_grad)
            drawn = torch.from_numpy(normals(self._noise, parameter.numel())).view_as(parameter)
            noised = parameter.summed_grad.double() + scale * drawn.to(parameter.device)
            parameter.grad = noised.to(parameter.dtype)
            _mark_as_processed(parameter.summed_grad)
