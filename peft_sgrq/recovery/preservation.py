"""What holds salient weights where they were before quantization.

With `W` the weight before quantization, `W_q` the quantized one and `F >= 0` how much each weight matters, the term is

    R(delta) = sum_ij F_ij (W_q,ij (1 + delta) - W_ij)^2 = sum_s (A_s delta_s^2 + 2 B_s delta_s) + const
    A_s = sum F W_q^2,    B_s = sum F W_q (W_q - W)        over the weights that scale s multiplies,

so that two numbers for each scale are all that is kept of `F`, whatever its size. This is the saliency-aware
preservation of Cao and Aref 2025 (arXiv 2504.13932), there for low-rank updates, with squared gradients as `F`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_sgrq.formats.own_forward import forward_replaced
from peft_sgrq.formats.scaled_weight import ScaledWeight
from peft_sgrq.passes.data import Batch
from peft_sgrq.passes.gradients import observe_gradients
from peft_sgrq.passes.statistics import InputStatistics
from peft_sgrq.recovery.reference import Reference

FROM_INPUTS: dict[str, Callable[[InputStatistics], torch.Tensor]] = {
    "diag": lambda inputs: inputs.diagonal,  # (K,)
    "obs": lambda inputs: 1 / inputs.inverse_diagonal,
    "billm": lambda inputs: 1 / inputs.inverse_diagonal.square(),
}
IMPORTANCES = ("fisher", *FROM_INPUTS, "magnitude")


@dataclass
class Pull:
    """The preservation term of one layer, as the quadratic function of its deltas that it is.

    Attributes:
        curvature (`torch.Tensor`): `A`, float32 `[rows, groups]`.
        slope (`torch.Tensor`): `B`, float32 `[rows, groups]`.
        constant (`torch.Tensor`): The term at zero deltas, float32 scalar.
    """

    curvature: torch.Tensor
    slope: torch.Tensor
    constant: torch.Tensor

    @classmethod
    def of(cls, scaled_weight: ScaledWeight, original: torch.Tensor, importance: torch.Tensor) -> Pull:
        """The term of a layer.

        Args:
            scaled_weight (`ScaledWeight`): The quantized layer.
            original (`torch.Tensor`): `W`, float32 `[N, K]`.
            importance (`torch.Tensor`): `F`, float32 `[N, K]`, or `[K]` for all rows.
        """
        weight = scaled_weight.dequantize(scaled_weight.scales(), torch.float32)  # (N, K)
        error = weight - original
        weighted = importance * weight
        return cls(
            scaled_weight.sum_by_scale(weighted * weight),
            scaled_weight.sum_by_scale(weighted * error),
            (importance * error.square()).sum(),
        )

    def to(self, device: torch.device) -> Pull:
        """The same on a device."""
        return Pull(self.curvature.to(device), self.slope.to(device), self.constant.to(device))

    def add(self, other: Pull) -> None:
        """Adds the term for a further part of the importance."""
        self.curvature += other.curvature
        self.slope += other.slope
        self.constant += other.constant

    def at(self, delta: torch.Tensor, groups: torch.Tensor | None, dim: int) -> torch.Tensor:
        """The term at deltas of the selected groups, differentiable; float32 scalar."""
        curvature, slope = self.curvature, self.slope
        if groups is not None:
            curvature, slope = curvature.index_select(dim, groups), slope.index_select(dim, groups)
        return (curvature * delta.square() + 2 * slope * delta).sum() + self.constant


def magnitude_pulls(reference: Reference, scaled_weights: Mapping[str, ScaledWeight]) -> dict[str, Pull]:
    """The terms of layers with every weight equally important."""
    return {
        name: Pull.of(
            scaled_weight,
            reference.weight(name, scaled_weight),
            torch.ones(scaled_weight.in_features, device=scaled_weight.device),
        )
        for name, scaled_weight in scaled_weights.items()
    }


def input_pulls(
    reference: Reference,
    scaled_weights: Mapping[str, ScaledWeight],
    inputs: Mapping[str, InputStatistics],
    importance: str,
) -> dict[str, Pull]:
    """The terms of layers with an importance that second moments of the reference's inputs give."""
    return {
        name: Pull.of(
            scaled_weight,
            reference.weight(name, scaled_weight),
            FROM_INPUTS[importance](inputs[name]).to(scaled_weight.device, torch.float32),
        )
        for name, scaled_weight in scaled_weights.items()
    }


def gradient_pulls(
    reference: Reference,
    blocks: Sequence[nn.Module],
    scaled_weights: Mapping[str, ScaledWeight],
    batches: Sequence[Batch],
    advance: Callable[[], Any],
) -> dict[str, Pull]:
    """The terms of layers with squared gradients of the reference's loss: the diagonal of its Fisher information.

    One backward pass of each batch through the reference. Its blocks are run again in it, so that of a streamed
    reference one block is in memory at a time.

    Args:
        reference (`Reference`): The model before quantization.
        blocks (`Sequence[nn.Module]`): Its blocks.
        scaled_weights (`dict[str, ScaledWeight]`): The quantized layers.
        batches (`Sequence[Batch]`): The data.
        advance (`Callable`): Called after each batch.
    """
    pulls: dict[str, Pull] = {}

    def take(name: str, gradients: Iterator[torch.Tensor]) -> None:
        squares = sum(gradient.square() for gradient in gradients)  # (N, K)
        scaled_weight = scaled_weights[name]
        pull = Pull.of(scaled_weight, reference.weight(name, scaled_weight), squares.to(scaled_weight.device))  # type: ignore[union-attr]
        if name in pulls:
            pulls[name].add(pull)
        else:
            pulls[name] = pull

    layers = {name: (reference.layers[name], reference.layers[name].forward) for name in scaled_weights}
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(forward_replaced(block, _run_again(block.forward)))
        for batch in batches:
            observe_gradients(reference.model, layers, batch, reference.run_with_labels, take)
            advance()
    for name, scaled_weight in scaled_weights.items():
        if name not in pulls:  # a layer no token has come to, an expert say
            nothing = torch.zeros(scaled_weight.in_features, device=scaled_weight.device)
            pulls[name] = Pull.of(scaled_weight, reference.weight(name, scaled_weight), nothing)
    return pulls


def _run_again(forward: Any) -> Any:
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)
