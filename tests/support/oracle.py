"""What an adapted layer must compute, in plain float64 torch: the one reference for the layers of all formats."""

from __future__ import annotations

from typing import NamedTuple

import torch
from peft import PeftModel
from support.single_layers import the_layer


class Expected(NamedTuple):
    """An output and its gradients, float64.

    Attributes:
        y (`torch.Tensor`): `x W'^T + b`, `[..., N]`.
        dx (`torch.Tensor`): `dy W'`, `[..., K]`.
        changes (`torch.Tensor`): The gradient in a relative change of each scale, the rounding of scales
            straight-through: `sum_{o in r, c in k} W[o, c] (dy^T x)[o, c]`, `[rows, groups]` of the scales.
    """

    y: torch.Tensor
    dx: torch.Tensor
    changes: torch.Tensor


def expected(
    x: torch.Tensor,
    dy: torch.Tensor,
    weight: torch.Tensor,
    changed: torch.Tensor,
    rows: torch.Tensor,
    groups: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> Expected:
    """What a layer computes whose weight was `W` and is `W'` by changes of its scales.

    Args:
        x (`torch.Tensor`): Its input, `[..., K]`, as it computes with it (rounded, if it rounds activations).
        dy (`torch.Tensor`): The gradient of its output, `[..., N]`.
        weight (`torch.Tensor`): `W`, `[N, K]`.
        changed (`torch.Tensor`): `W'`, `[N, K]`.
        rows (`torch.Tensor`): The row of the scale matrix that each row of the weight belongs to, int64 `[N]`.
        groups (`torch.Tensor`): The column of the scale matrix that each column belongs to, int64 `[K]`.
        bias (`torch.Tensor` or `None`): `b`, `[N]`.
    """
    x, dy, weight, changed = (tensor.detach().double() for tensor in (x, dy, weight, changed))
    y = x @ changed.T
    if bias is not None:
        y = y + bias.detach().double()
    terms = weight * (dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1]))  # (N, K)
    sums = terms.new_zeros(int(rows.max()) + 1, terms.shape[1]).index_add(0, rows, terms)
    changes = sums.new_zeros(len(sums), int(groups.max()) + 1).index_add(1, groups, sums)
    return Expected(y, dy @ changed, changes)


def expected_of(
    model: PeftModel, x: torch.Tensor, dy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """`y`, `dx` and the gradients of the deltas by adapter, of a model of one layer with all its active adapters.

    The weight is the layer's own codes times its own scales; that these are right, other tests show.
    """
    layer = the_layer(model)
    scaled_weight = layer.scaled_weight
    rows = torch.arange(scaled_weight.out_features) // scaled_weight.rows_per_scale
    groups = torch.arange(scaled_weight.in_features) // scaled_weight.group_size
    codes = scaled_weight.codes(None, torch.float32).double()[:, : scaled_weight.in_features]  # (N, K)
    scales = scaled_weight.scales().double()  # (R, G)
    deltas = {name: layer.sgrq_delta[name] for name in layer.active_adapters}
    factors = torch.ones_like(scales)
    for delta in deltas.values():
        factors = factors.index_add(scaled_weight.unit.dim, delta.units, delta.weight.detach().double())
    weight, changed = (codes * values[rows][:, groups] for values in (scales, scales * factors))
    y, dx, changes = expected(x, dy, weight, changed, rows, groups, scaled_weight.bias)
    return y, dx, {name: changes.index_select(scaled_weight.unit.dim, delta.units) for name, delta in deltas.items()}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest expected value."""
    return float((found.double() - expected).abs().max() / expected.abs().max())
