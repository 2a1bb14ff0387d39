"""What holds salient weights where they were before quantization.

With `W` the weight before quantization, `W_q` the quantized one and `F >= 0` how much each weight matters, the term is

    R(delta) = sum_ij F_ij (W_q,ij (1 + delta) - W_ij)^2 = sum_s (A_s delta_s^2 + 2 B_s delta_s) + const
    A_s = sum F W_q^2,    B_s = sum F W_q (W_q - W)        over the weights that scale s multiplies,

so that two numbers for each scale are all that is kept of `F`, whatever its size. This is the saliency-aware
preservation of Cao and Aref 2025 (arXiv 2504.13932), there for low-rank updates, with squared gradients as `F`
("fisher") or without (all alike, "magnitude").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_sgrq.formats.own_forward import forward_replaced
from peft_sgrq.formats.scaled_weight import ScaledWeight
from peft_sgrq.passes.data import Batch
from peft_sgrq.passes.gradients import observe_gradients
from peft_sgrq.passes.processes import sum_over_processes, together
from peft_sgrq.passes.reference import Reference

IMPORTANCES = ("fisher", "magnitude")


class Pull(NamedTuple):
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
        """The term of a quantized layer, from `W`, float32 `[N, K]`, and `F`, `[N, K]`, or `[K]` for all rows."""
        weight = scaled_weight.dequantize(scaled_weight.scales(), torch.float32)  # (N, K)
        error = weight - original
        weighted = importance * weight
        return cls(
            scaled_weight.sum_by_scale(weighted * weight),
            scaled_weight.sum_by_scale(weighted * error),
            (importance * error.square()).sum(),
        )

    def at(self, delta: torch.Tensor, groups: torch.Tensor | None, dim: int) -> torch.Tensor:
        """The term at deltas of the selected groups, differentiable; float32 scalar."""
        curvature, slope = self.curvature, self.slope
        if groups is not None:
            curvature, slope = curvature.index_select(dim, groups), slope.index_select(dim, groups)
        return (curvature * delta.square() + 2 * slope * delta).sum() + self.constant


def preservation_terms(
    importance: str,
    reference: Reference,
    blocks: Sequence[nn.Module],
    scaled_weights: Mapping[str, ScaledWeight],
    batches: Sequence[Batch],
    advance: Callable[[], Any],
) -> dict[str, Pull]:
    """The terms of layers, by name.

    Squared gradients of the reference's loss, the diagonal of its Fisher information, need one backward pass of each
    batch through the reference. Its blocks are run again in it, so that one block of a streamed reference is in memory
    at a time. They are summed over all processes.

    Args:
        importance (`"fisher"` or `"magnitude"`): Which weights matter: by squared gradients, or all alike.
        reference (`Reference`): The model before quantization.
        blocks (`Sequence[nn.Module]`): Its blocks.
        scaled_weights (`dict[str, ScaledWeight]`): The quantized layers.
        batches (`Sequence[Batch]`): The data.
        advance (`Callable`): Called after each batch.
    """
    pulls: dict[str, Pull] = {}

    def add(name: str, matters: torch.Tensor) -> None:
        weight = scaled_weights[name]
        pull = Pull.of(weight, reference.weight(name, weight), matters.to(weight.device))
        pulls[name] = Pull(*map(torch.add, pulls[name], pull)) if name in pulls else pull

    if importance == "fisher":
        layers = {name: (reference.layers[name], reference.layers[name].forward) for name in scaled_weights}
        with together(), ExitStack() as stack:
            for block in blocks:
                stack.enter_context(forward_replaced(block, _run_again(block.forward)))
            for batch in batches:
                observe_gradients(
                    reference.model,
                    layers,
                    batch,
                    reference.run_with_labels,
                    lambda name, gradients: add(name, sum(gradient.square() for gradient in gradients)),  # type: ignore[arg-type]
                )
                advance()
    for name, weight in scaled_weights.items():
        if name not in pulls:  # for "fisher" a layer that no token has come to, such as an expert
            add(name, torch.full((weight.in_features,), float(importance == "magnitude")))
    if importance == "fisher":
        sum_over_processes(tensor for name in scaled_weights for tensor in pulls[name])
    return pulls


def _run_again(forward: Any) -> Any:
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)
