"""Training the zero points of HQQ beside its scales, to see what the scales alone leave on the table.

`W = (q - z) S` with float zero points, so that `W' = (q - z - e) S'` stores as before. With `x_k` the sum of a group's
inputs the output changes by `-sum_k x_k e[o, k] S'[o, k]`, for which codes are not needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peft_sgrq import SGRQLinear
from peft_sgrq.backends.hqq import HQQBackend
from peft_sgrq.functional import effective_scales, round_straight_through

PARAMETER = "zero_point_change"


def train_zero_points(layers: list[SGRQLinear]) -> None:
    """Adds to each layer a trained change of its zero points, in units of a code, and what it does to the output.

    Raises:
        ValueError: If a layer is not one of HQQ with groups along rows.
    """
    for layer in layers:
        backend = layer.backend
        if not isinstance(backend, HQQBackend) or backend.scales_shape[0] != backend.out_features:
            raise ValueError(
                f"Zero points of {backend.name} cannot be trained here, expected HQQ with axis=1; leave out `zeros`."
            )
        change = nn.Parameter(torch.zeros(backend.scales_shape, device=backend.device))
        layer.sgrq_delta["default"].register_parameter(PARAMETER, change)
        layer.register_forward_hook(_shift)


def _zero_points(backend: Any) -> torch.Tensor:
    return backend.module.meta["zero"]


def _changed(layer: SGRQLinear) -> torch.Tensor:
    """The zero points in effect, as stored, float32 `[R, G]`, straight-through."""
    zero = _zero_points(layer.backend)
    change = getattr(layer.sgrq_delta["default"], PARAMETER)
    return round_straight_through(zero.float().view(layer.backend.scales_shape) + change, zero.dtype)


def _shift(layer: SGRQLinear, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    backend = layer.backend
    if layer.merged:
        return output
    x = inputs[0]
    sums = x.unflatten(-1, (backend.scales_shape[1], -1)).float().sum(-1)  # (..., G)
    scales = effective_scales(backend, *layer.combined_delta(("default",)))  # (R, G)
    change = _changed(layer) - _zero_points(backend).float().view(backend.scales_shape)
    return output - (sums @ (change * scales).t()).to(output.dtype)


@torch.no_grad()
def merge_zero_points(model: nn.Module) -> None:
    """Writes the zero points in effect into the base; to be followed by the merge of the scales."""
    for layer in model.modules():
        if isinstance(layer, SGRQLinear):
            zero = _zero_points(layer.backend)
            layer.backend.module.meta["zero"] = _changed(layer).to(zero.dtype).view(zero.shape)
            getattr(layer.sgrq_delta["default"], PARAMETER).zero_()
