"""The arithmetic of scale tuning: one formula for the scales in effect, one autograd function for the layer.

A layer whose weight is stored as codes and scales computes, with `C` the unit-scale values of the codes, `S` the
scales, and `r`, `k` the maps from rows and columns to rows and groups of `S`::

    W[o, c] = C[o, c] * S[r(o), k(c)]
    S'      = round_to_storage(S * (1 + delta))        delta: float32, zero at the start, only for selected groups
    y       = x W'^T + b,   W' = C * S'
    dL/dx   = dy W'
    dL/ddelta[r, k] = S[r, k] * sum_{o in r, c in k} C[o, c] (dy^T x)[o, c]

The rounding is straight-through: its derivative is taken as one. Where codes follow from the weight that `dL/dx` is
made with, `C = W' / S'`, a backward pass dequantizes once. The sum needs `x` only at the selected columns, so
only those are kept for the backward pass, and `x` itself where all are selected (`saved_inputs.py`). Where there is
one scale per output row, the sum over all columns is the product the forward pass has made already and, without a
bias, no second product is needed::

    dL/ddelta[o] = sum_t dy[t, o] y[t, o] S[o] / S'[o]

Zero points that a format stores as floats can be moved, too, by `e` steps. The gradient of `e` needs the input summed
over the columns of a group, `pool_k(x) = sum_{c in k} x[c]`, and no codes::

    W'       = S' (C + e)
    dL/de[r, k]     = S'[r, k] * sum_{o in r} (dy^T pool_k(x))[o]
    dL/ddelta[r, k] = S[r, k] * (what stands above + e[r, k] * sum_{o in r} (dy^T pool_k(x))[o])

Training all scales is PEQA (Kim et al. 2023, arXiv 2305.14152); selecting salient columns is SGR-Q.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from peft_sgrq.formats.scale_matrix import ScaleMatrix, split_zero_points
from peft_sgrq.formats.scaled_weight import ScaledWeight
from peft_sgrq.formats.selectable_unit import SelectableUnit
from peft_sgrq.layer.gradients import both_gradients, dequantizes_once, input_gradient, select, unit_gradient
from peft_sgrq.layer.saved_inputs import SavedInput

# What is trained is `e / 4`: a quarter of the range of 4-bit codes. The learning rate that suits scales suits it then.
ZERO_POINT_UNIT = 4.0


def effective_scales(
    scaled_weight: ScaleMatrix,
    delta: torch.Tensor,
    units: torch.Tensor | None,
    scales: torch.Tensor | None = None,
    zero_points: torch.Tensor | None = None,
) -> torch.Tensor:
    """The scales a layer computes with: `round_to_storage(S * (1 + delta))` at the selected groups, `S` elsewhere.

    With moved zero points these stand beside them, in steps; formats take both apart by `split_zero_points`.

    Args:
        scaled_weight (`ScaleMatrix`): Owner of the scales `S`, float32 `[rows, groups]`.
        delta (`torch.Tensor`): Relative changes, float32, `[rows, n]` for a group format and `[n, 1]` for a row
            format, `n` the number of selected groups or rows.
        units (`torch.Tensor` or `None`): Indices of the selected groups (rows in a row format), int64 `[n]`,
            ascending; `None` selects all of them.
        scales (`torch.Tensor` or `None`): `scaled_weight.scales()`, if the caller has them already.
        zero_points (`torch.Tensor` or `None`): Moves of the zero points as they are trained, float32 `[rows, groups]`.

    Returns:
        `torch.Tensor`: float32 `[rows, groups]`, every value representable in the format's storage dtype; with
        `zero_points` float32 `[2, rows, groups]`.
    """
    scales = scaled_weight.scales() if scales is None else scales  # (R, G)
    changed, dim = scales, scaled_weight.unit.dim
    if units is None:
        changed = scaled_weight.round_to_storage(scales * (1 + delta))
    elif units.shape[0]:  # a format may round scales together
        tuned = scales.index_select(dim, units) * (1 + delta)
        changed = scaled_weight.round_to_storage(scales.index_copy(dim, units, tuned))
    return changed if zero_points is None else torch.stack((changed, ZERO_POINT_UNIT * zero_points))


class _RoundSTE(torch.autograd.Function):
    """Rounds float32 values to another dtype's grid; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return values.to(dtype).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


def round_straight_through(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounds `values` to the grid of `dtype`, keeping their own dtype; the derivative is taken as one."""
    return values if dtype == values.dtype else _RoundSTE.apply(values, dtype)


def _kept(y: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """Columns of an output for the backward pass, `[..., N]` -> `[T, n]`, which outlast that it is written to."""
    flat = y.reshape(-1, y.shape[-1])
    if rows is not None:
        return flat.index_select(1, rows)
    if torch.compiler.is_compiling():
        return flat
    try:
        return torch._lazy_clone(flat)  # copied only if somebody writes
    except RuntimeError:  # not every storage can be shared like that
        return flat.clone()


def _in_effect(
    scaled_weight: ScaledWeight,
    prepared: torch.Tensor | None,
    delta: torch.Tensor,
    units: torch.Tensor | None,
    scales: torch.Tensor | None,
    zero_points: torch.Tensor | None = None,
) -> torch.Tensor:
    """The scales a forward pass computed with, by what it prepared of them if that was kept."""
    if prepared is not None:
        return scaled_weight.prepared_scales(prepared)
    return effective_scales(scaled_weight, delta, units, scales, zero_points)


class _ScaledLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        delta: torch.Tensor,
        units: torch.Tensor | None,
        scaled_weight: ScaledWeight,
        saved_input: SavedInput,
        zero_points: torch.Tensor | None,
        prepared: torch.Tensor,
    ) -> torch.Tensor:
        own = x.clone() if scaled_weight.writes_to_input else x
        y = scaled_weight.linear(own, prepared)  # (..., N)
        if not torch.compiler.is_compiling() and y._is_view():
            y = y.detach()  # it may be written to, as a ReLU in place does it: autograd forbids that for views
        in_rows = scaled_weight.unit is SelectableUnit.ROW
        # A bias much larger than the product would leave few digits of y - b, and so would a moved zero point.
        ctx.product_known = in_rows and scaled_weight.bias is None and zero_points is None
        saved = None
        if ctx.needs_input_grad[1] and delta.numel():
            if ctx.product_known:
                saved = _kept(y, units)  # (T, n)
            else:
                saved = x if in_rows else saved_input.save(x, units, scaled_weight, y.dtype)
        ctx.save_for_backward(saved, delta, units, zero_points, prepared if scaled_weight.keeps_prepared else None)
        ctx.scaled_weight = scaled_weight
        ctx.x_shape = x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved, delta, units, zero_points, prepared = ctx.saved_tensors
        scaled_weight: ScaledWeight = ctx.scaled_weight
        dy = grads[0].reshape(-1, grads[0].shape[-1])  # (T, N)
        dx = ddelta = sums = None
        scales = scaled_weight.scales() if delta.numel() else None  # (R, G)
        changed = _in_effect(scaled_weight, prepared, delta, units, scales, zero_points)
        if scales is None:
            if ctx.needs_input_grad[0]:
                dx = input_gradient(dy, changed, scaled_weight, prepared).reshape(ctx.x_shape)
            return dx, torch.zeros_like(delta) if ctx.needs_input_grad[1] else None, None, None, None, None, None
        in_groups = saved is not None and scaled_weight.unit is SelectableUnit.GROUP
        if in_groups and dequantizes_once(dy, changed, scales, scaled_weight):
            # The sums are made this way if `dx` is not wanted, too: that must not change their bits.
            dx = dy.new_empty(dy.shape[0], scaled_weight.in_features) if ctx.needs_input_grad[0] else None
            sums = both_gradients(dy, saved, units, changed, scaled_weight, dx, prepared)
        elif ctx.needs_input_grad[0]:
            dx = input_gradient(dy, changed, scaled_weight, prepared)
        if ctx.needs_input_grad[1] and ctx.product_known:
            total = (select(dy, units, 1).float() * saved.float()).sum(0).unsqueeze(1)  # (n, 1)
            effective = select(changed, units, 0)  # (n, 1)
            # Where the scale in effect is zero the output does not tell the product any more.
            ddelta = torch.where(effective == 0, 0.0, total * (select(scales, units, 0) / effective))
        elif ctx.needs_input_grad[1]:
            if scaled_weight.unit is SelectableUnit.ROW:
                dy = select(dy, units, 1)  # (T, n)
                saved = scaled_weight.computed_input(saved).reshape(-1, saved.shape[-1]).to(dy.dtype)  # (T, K)
            elif units is None:
                saved = scaled_weight.select_columns(saved, None)  # (T, G * g)
            if sums is None:
                sums = unit_gradient(dy, saved, units, scaled_weight)
            ddelta = scaled_weight.reduce_rows(sums) * select(scales, units, scaled_weight.unit.dim)
        return None if dx is None else dx.reshape(ctx.x_shape), ddelta, None, None, None, None, None


class _ZeroPointGradient(torch.autograd.Function):
    """Passes an output through, and gives its gradient to moves of zero points, and to deltas what these add to it."""

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        delta: torch.Tensor,
        zero_points: torch.Tensor,
        units: torch.Tensor | None,
        scaled_weight: ScaledWeight,
        prepared: torch.Tensor,
    ) -> torch.Tensor:
        kept = prepared if scaled_weight.keeps_prepared else None
        ctx.save_for_backward(scaled_weight.pool(x), delta, zero_points, units, kept)
        ctx.scaled_weight = scaled_weight
        ctx.mark_dirty(y)  # it is the layer's own; as a view nobody could write to it
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        pooled, delta, zero_points, units, prepared = ctx.saved_tensors
        scaled_weight: ScaledWeight = ctx.scaled_weight
        dy = grads[0].reshape(-1, grads[0].shape[-1])  # (T, N)
        product = (pooled.to(dy.dtype).t() @ dy).t()  # (N, G); the few columns first is faster
        sums = scaled_weight.reduce_rows(product.float())  # (R, G)
        ddelta = scales = None
        if ctx.needs_input_grad[2] and delta.numel():
            scales = scaled_weight.scales()  # (R, G)
            ddelta = select(scales * (ZERO_POINT_UNIT * zero_points) * sums, units, scaled_weight.unit.dim)
        changed, _ = split_zero_points(_in_effect(scaled_weight, prepared, delta, units, scales))
        return grads[0], None, ddelta, (ZERO_POINT_UNIT * changed).mul_(sums), None, None, None


def scaled_linear(
    x: torch.Tensor,
    delta: torch.Tensor,
    units: torch.Tensor | None,
    scaled_weight: ScaledWeight,
    saved_input: SavedInput | None = None,
    zero_points: torch.Tensor | None = None,
) -> torch.Tensor:
    """The layer's output with its scales changed by `delta`, differentiable in `x` and `delta`.

    The forward pass is the format's own kernel with other scales, so it gives the bits of the merged layer.

    Args:
        x (`torch.Tensor`): Input `[..., in_features]`, as `ScaledWeight.cast_input` returns it.
        delta (`torch.Tensor`): Relative scale changes, float32, shaped as in `effective_scales`.
        units (`torch.Tensor` or `None`): Selected groups or rows, int64 `[n]`; `None` for all.
        scaled_weight (`ScaledWeight`): The quantized (or dense) layer.
        saved_input (`SavedInput` or `None`): The input before its cast, which other layers may have saved already.
        zero_points (`torch.Tensor` or `None`): Moves of zero points as they are trained, float32 `[rows, groups]`.

    Returns:
        `torch.Tensor`: `[..., out_features]`, the bias included.
    """
    fixed = None if zero_points is None else zero_points.detach()
    read = scaled_weight.read_once()
    prepared = read.prepare(effective_scales(read, delta.detach(), units, zero_points=fixed))
    y = _ScaledLinear.apply(x, delta, units, scaled_weight, saved_input or SavedInput(), fixed, prepared)
    if zero_points is None:
        return y
    return _ZeroPointGradient.apply(y, x, delta, zero_points, units, scaled_weight, prepared)
