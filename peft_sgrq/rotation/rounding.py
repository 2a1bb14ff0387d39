"""Rounding to nearest by compressed-tensors' own functions, with each scale clipped where the squared error is least.

One formula for all that is rounded here: weights that are stored, weights and activations whose errors are measured.
"""

from __future__ import annotations

from typing import Any

import torch

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)  # shares of the largest magnitude


@torch.no_grad()
def weight_scales(weight: torch.Tensor, args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales and zero points of a weight, of all clips those with the least squared error, group by group.

    Args:
        weight (`torch.Tensor`): `[N, K]`.
        args (`QuantizationArgs`): Of the strategy "group" or "channel".

    Returns:
        Scales in the dtype of the weight and zero points in that of the format, each `[N, groups]`.
    """
    from compressed_tensors.quantization.utils import calculate_qparams

    size = args.group_size or weight.shape[1]
    values = weight.unflatten(1, (-1, size))  # (N, groups, size)
    low, high = values.amin(-1), values.amax(-1)
    best: torch.Tensor | None = None
    for clip in CLIPS:
        scale, zero = (part.reshape(low.shape) for part in calculate_qparams(clip * low, clip * high, args))
        scale = scale.to(weight.dtype)
        rounded = rounded_weight(weight, scale, zero, args)
        error = (rounded.float() - weight.float()).square().unflatten(1, (-1, size)).sum(-1)
        if best is None:
            best, scales, zeros = error, scale, zero
            continue
        better = error < best
        best = torch.where(better, error, best)
        scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
    return scales, zeros


@torch.no_grad()
def rounded_weight(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, args: Any) -> torch.Tensor:
    """What a weight `[N, K]` is with these scales and zero points, in its dtype."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    return fake_quantize(weight, scales, zeros, args).to(weight.dtype)


def quantized_weight(weight: torch.Tensor, args: Any) -> torch.Tensor:
    """What a weight `[N, K]` is when it is rounded to nearest, in its dtype."""
    return rounded_weight(weight, *weight_scales(weight, args), args)


@torch.no_grad()
def quantized_activation(x: torch.Tensor, args: Any) -> torch.Tensor:
    """What activations `[B, T, D]` are when they are rounded by their own scales; as they are without `args`."""
    if args is None:
        return x
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    scales, zeros = compute_dynamic_scales_and_zp(x, args, None)
    return fake_quantize(x, scales, zeros, args).to(x.dtype)
