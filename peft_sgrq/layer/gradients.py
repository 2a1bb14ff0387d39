"""The two products of a layer's backward pass: the gradient of its input, and that of its scales."""

from __future__ import annotations

import torch

from peft_sgrq.formats.kernels import group_reduce
from peft_sgrq.formats.scale_arithmetic import gather_groups
from peft_sgrq.formats.scale_matrix import split_zero_points
from peft_sgrq.formats.scaled_weight import ScaledWeight

# On CPUs the backward pass makes its large temporaries, the dequantized weight and the product `dy^T x`, a part of
# this size at a time. Fresh memory costs page faults, which take as long as dequantizing does; small memory is reused.
_TEMPORARY_BYTES = 16 << 20


def select(values: torch.Tensor, units: torch.Tensor | None, dim: int) -> torch.Tensor:
    """The values of some units along a dimension; all of them if `units` is `None`."""
    return values if units is None else values.index_select(dim, units)


def _ranges(total: int, bytes_each: int, scaled_weight: ScaledWeight) -> list[slice]:
    step = total
    if scaled_weight.in_parts and scaled_weight.device.type == "cpu" and not torch.compiler.is_compiling():
        step = max(1, min(total, _TEMPORARY_BYTES // max(1, bytes_each)))
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]


def _column_ranges(dy: torch.Tensor, scaled_weight: ScaledWeight) -> list[slice]:
    size, total = scaled_weight.columns_at_once, scaled_weight.in_features
    steps = _ranges(-(-total // size), dy.shape[1] * size * dy.element_size(), scaled_weight)
    return [slice(step.start * size, min(step.stop * size, total)) for step in steps]


def input_gradient(
    dy: torch.Tensor, scales: torch.Tensor, scaled_weight: ScaledWeight, prepared: torch.Tensor | None
) -> torch.Tensor:
    """`dy W'` for the scales in effect, `[T, N]` to `[T, K]`, some groups of columns at a time.

    Args:
        dy (`torch.Tensor`): Gradient of the output, `[T, N]`.
        scales (`torch.Tensor`): The scales in effect.
        scaled_weight (`ScaledWeight`): The layer.
        prepared (`torch.Tensor` or `None`): What `scaled_weight.prepare` made of them, if it was kept.
    """
    ranges = _column_ranges(dy, scaled_weight)
    if len(ranges) == 1:
        return dy @ scaled_weight.columns_in_effect(scales, prepared, dy.dtype, ranges[0])
    dx = dy.new_empty(dy.shape[0], scaled_weight.in_features)
    for columns in ranges:
        torch.mm(dy, scaled_weight.columns_in_effect(scales, prepared, dy.dtype, columns), out=dx[:, columns])
    return dx


def unit_gradient(
    dy: torch.Tensor, x: torch.Tensor, units: torch.Tensor | None, scaled_weight: ScaledWeight
) -> torch.Tensor:
    """`sum_{c in k} C[o, c] (dy^T x)[o, c]` for the selected groups or rows.

    Args:
        dy (`torch.Tensor`): Gradient of the output, `[T, N]`, of the selected rows in a row format.
        x (`torch.Tensor`): Input, `[T, n * g]`, the columns of the selected groups.
        units (`torch.Tensor` or `None`): The selected groups or rows, int64 `[n]`; `None` for all.
        scaled_weight (`ScaledWeight`): The layer.

    Returns:
        `torch.Tensor`: float32 `[N, n]`, or `[n, 1]` in a row format.
    """
    steps = _ranges(dy.shape[1], x.shape[1] * x.element_size(), scaled_weight)
    sums = [scaled_weight.reduce(dy[:, rows].t() @ x, units, rows) for rows in steps]
    return sums[0] if len(sums) == 1 else torch.cat(sums)


def dequantizes_once(
    dy: torch.Tensor, changed: torch.Tensor, scales: torch.Tensor, scaled_weight: ScaledWeight
) -> bool:
    """Whether `both_gradients` gives both gradients as exactly as each is had alone."""
    if not scaled_weight.codes_follow or dy.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    effective, _ = split_zero_points(changed)
    # Half precision has no room for small weights. A scale that became zero has left nothing of its codes.
    return dy.dtype != torch.float16 and int(effective.count_nonzero()) >= int(scales.count_nonzero())


def both_gradients(
    dy: torch.Tensor,
    x: torch.Tensor,
    units: torch.Tensor | None,
    changed: torch.Tensor,
    scaled_weight: ScaledWeight,
    dx: torch.Tensor | None,
    prepared: torch.Tensor | None,
) -> torch.Tensor:
    """What `unit_gradient` returns, and in `dx` what `input_gradient` does, by one dequantization for both."""
    size = scaled_weight.group_size
    sums = []
    for columns in _column_ranges(dy, scaled_weight):
        weight, inverse, shift = scaled_weight.weight_and_codes(changed, prepared, dy.dtype, columns)
        if dx is not None:
            torch.mm(dy, weight, out=dx[:, columns])
        count, chosen, own = inverse.shape[1], None, columns
        if units is not None:
            ends = torch.tensor([columns.start, columns.stop]) // size
            first, last = torch.searchsorted(units, ends).tolist()
            own, chosen = slice(first * size, last * size), units[first:last] - ends[0]
        product = dy.t() @ x[:, own]  # (N, n * g)
        summed = group_reduce(product, gather_groups(weight, chosen, count, size), size) * select(inverse, chosen, 1)
        if shift is not None:
            shift = select(shift.view(len(shift), count, -1), chosen, 1)  # (N, n, m)
            # What the product sums up to over some columns is that with the input summed, which is far smaller.
            pooled = x[:, own].unflatten(1, (-1, size // shift.shape[2])).sum(-1, dtype=torch.float32)  # (T, n * m)
            moved = (pooled.t() @ dy.float()).t().view(shift.shape)  # (N, n, m)
            summed = summed - (moved * shift).sum(-1)
        sums.append(summed)
    return torch.cat(sums, 1)
