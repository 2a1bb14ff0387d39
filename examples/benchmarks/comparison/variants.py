"""Other numbers to train than relative changes of scales: tied ones, logarithms, absolute changes."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

from peft_sgrq import SGRQLinear

FORMS = ("relative", "exp", "absolute")


def tie_rows(layers: list[SGRQLinear]) -> None:
    """Gives all changes of a row the same gradient, so that they, which start at zero, stay the same.

    That trains one number a row. The gradient of the tied number is the sum `s` over its `n` changes; each is given
    `s / sqrt(n)`, so that the norm which clipping looks at is that of the tied number. Adam does not see factors.
    """

    def share(gradient: torch.Tensor) -> torch.Tensor:  # (R, n)
        return (gradient.sum(1, keepdim=True) / gradient.shape[1] ** 0.5).expand_as(gradient).contiguous()

    for layer in layers:
        layer.sgrq_delta["default"].weight.register_hook(share)


def reparametrize(layers: list[SGRQLinear], form: str) -> None:
    """Trains `theta` instead of `delta`: `S' = S exp(theta)`, or `S' = S + m theta` with a layer's mean scale `m`.

    Args:
        layers (`list[SGRQLinear]`): Layers with an untrained adapter.
        form (`str`): "exp" or "absolute".
    """
    for layer in layers:
        delta = layer.sgrq_delta["default"]
        if form == "exp":
            parametrize.register_parametrization(delta, "weight", _Exponential())
            continue
        scales = layer.scaled_weight.scales().index_select(layer.scaled_weight.unit.dim, delta.units)
        factor = scales.abs().mean() / scales.abs().clamp(min=1e-8)  # (R, n)
        parametrize.register_parametrization(delta, "weight", _Absolute(factor * scales.sign()))


class _Exponential(nn.Module):
    def forward(self, theta: torch.Tensor) -> torch.Tensor:
        return torch.expm1(theta)

    def right_inverse(self, delta: torch.Tensor) -> torch.Tensor:
        return torch.log1p(delta)


class _Absolute(nn.Module):
    def __init__(self, factor: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("factor", factor, persistent=False)

    def forward(self, theta: torch.Tensor) -> torch.Tensor:
        return theta * self.factor

    def right_inverse(self, delta: torch.Tensor) -> torch.Tensor:
        return delta / self.factor
