"""Training the zero points of HQQ beside its scales, to see what the scales alone leave on the table.

`W = (q - z) S` with float zero points, so that `W' = (q - z - e) S'` stores as before. With `x_k` the sum of a group's
inputs the output changes by `-sum_k x_k e[o, k] S'[o, k]`, for which codes are not needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peft_sgrq import SGRQLinear
from peft_sgrq.formats.hqq.weight import HQQWeight
from peft_sgrq.layer.functional import effective_scales, round_straight_through

PARAMETER = "zero_point_change"


def train_zero_points(layers: list[SGRQLinear]) -> None:
    """Adds to each layer a trained change of its zero points, in units of a code, and what it does to the output.

    Raises:
        ValueError: If a layer is not one of HQQ with groups along rows.
    """
    for layer in layers:
        scaled_weight = layer.scaled_weight
        if not isinstance(scaled_weight, HQQWeight) or scaled_weight.scales_shape[0] != scaled_weight.out_features:
            raise ValueError(
                f"Zero points of {scaled_weight.name} cannot be trained here, expected HQQ with axis=1; leave out "
                "`zeros`."
            )
        change = nn.Parameter(torch.zeros(scaled_weight.scales_shape, device=scaled_weight.device))
        layer.sgrq_delta["default"].register_parameter(PARAMETER, change)
        layer.register_forward_hook(_shift)


def _zero_points(scaled_weight: Any) -> torch.Tensor:
    return scaled_weight.module.meta["zero"]


def _changed(layer: SGRQLinear) -> torch.Tensor:
    """The zero points in effect, as stored, float32 `[R, G]`, straight-through."""
    zero = _zero_points(layer.scaled_weight)
    change = getattr(layer.sgrq_delta["default"], PARAMETER)
    return round_straight_through(zero.float().view(layer.scaled_weight.scales_shape) + change, zero.dtype)


def _shift(layer: SGRQLinear, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    scaled_weight = layer.scaled_weight
    if layer.merged:
        return output
    x = inputs[0]
    sums = x.unflatten(-1, (scaled_weight.scales_shape[1], -1)).float().sum(-1)  # (..., G)
    scales = effective_scales(scaled_weight, *layer.combined_delta(("default",)))  # (R, G)
    change = _changed(layer) - _zero_points(scaled_weight).float().view(scaled_weight.scales_shape)
    return output - (sums @ (change * scales).t()).to(output.dtype)


@torch.no_grad()
def merge_zero_points(model: nn.Module) -> None:
    """Writes the zero points in effect into the base; to be followed by the merge of the scales."""
    for layer in model.modules():
        if isinstance(layer, SGRQLinear):
            zero = _zero_points(layer.scaled_weight)
            layer.scaled_weight.module.meta["zero"] = _changed(layer).to(zero.dtype).view(zero.shape)
            getattr(layer.sgrq_delta["default"], PARAMETER).zero_()
