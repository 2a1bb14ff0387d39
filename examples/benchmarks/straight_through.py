"""Full-weight straight-through training, RoSTE's own: weights are rounded in every forward pass, and all are trained.

A baseline: codes change, so nothing of it is an adapter, and nothing merges. Gradients pass the rounding as if it
were not there. Scales of weights follow their groups' extremes, clipped by the share that was best at the start.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from peft_sgrq.rotation.quantize import quantizable_layers
from peft_sgrq.rotation.rounding import quantized_activation, rounded_weight, weight_scales
from peft_sgrq.rotation.scheme import parse_scheme


def through(x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """The rounded numbers, with the gradient of those before rounding."""
    return x + (rounded - x).detach()


def plain_scales(weight: torch.Tensor, args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points from the extremes of groups, without clipping; `[N, groups]`."""
    from compressed_tensors.quantization.utils import calculate_qparams

    values = weight.detach().unflatten(1, (-1, args.group_size or weight.shape[1]))  # (N, groups, size)
    low, high = values.amin(-1), values.amax(-1)
    scales, zeros = (part.reshape(low.shape) for part in calculate_qparams(low, high, args))
    return scales.to(weight.dtype), zeros


def straight_through(model: nn.Module, name: str, group_size: int) -> list[nn.Parameter]:
    """Has a dense model, rotated or not, compute as `quantize` would have it, and gradients pass.

    Returns:
        The weights to train.
    """
    scheme = parse_scheme(name, group_size)
    model.requires_grad_(False)
    weights = [_round_layer(layer, scheme) for layer in quantizable_layers(model).values()]
    _round_cache(model, scheme)
    return weights


def _round_layer(layer: Any, scheme: Any) -> nn.Parameter:
    args = scheme.weight_args(scheme.weights, scheme.by_row(layer.in_features))
    inputs = scheme.activation_args()
    shares = weight_scales(layer.weight.detach(), args)[0] / plain_scales(layer.weight, args)[0]

    def forward(x: torch.Tensor) -> torch.Tensor:
        scales, zeros = plain_scales(layer.weight, args)
        weight = through(layer.weight, rounded_weight(layer.weight, shares * scales, zeros, args))
        return F.linear(through(x, quantized_activation(x, inputs)), weight, layer.bias)

    layer.forward = forward
    return layer.weight.requires_grad_(True)


def _round_cache(model: Any, scheme: Any) -> None:
    """Rounds keys and values behind the rotations they may have."""
    from compressed_tensors.modeling import initialize_hooked_kv_cache, register_key_hook, register_value_hook
    from compressed_tensors.quantization.lifecycle.initialize import is_cached_attention_module

    for module in model.modules():
        if not is_cached_attention_module(module) or scheme.cache_args(module.head_dim) is None:
            continue
        args = scheme.cache_args(module.head_dim)

        def hook(_: nn.Module, x: torch.Tensor, args: Any = args) -> torch.Tensor:
            return through(x, quantized_activation(x, args))

        initialize_hooked_kv_cache(model, module)
        register_key_hook(module, hook)
        register_value_hook(module, hook)
