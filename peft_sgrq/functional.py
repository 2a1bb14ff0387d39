"""The arithmetic of scale tuning: one formula for the scales in effect, one autograd function for the layer.

A layer whose weight is stored as codes and scales computes, with `C` the unit-scale values of the codes, `S` the
scales, and `r`, `k` the maps from rows and columns to rows and groups of `S`::

    W[o, c] = C[o, c] * S[r(o), k(c)]
    S'      = round_to_storage(S * (1 + delta))        delta: float32, zero at the start, only for selected groups
    y       = x W'^T + b,   W' = C * S'
    dL/dx   = dy W'
    dL/ddelta[r, k] = S[r, k] * sum_{o in r, c in k} C[o, c] (dy^T x)[o, c]

The rounding is straight-through: its derivative is taken as one. The sum needs `x` only at the selected columns, so
only those are kept for the backward pass. Where there is one scale per output row, the sum over all columns is the
product the forward pass has made already and, without a bias, no second product is needed::

    dL/ddelta[o] = sum_t dy[t, o] y[t, o] S[o] / S'[o]

Training all scales is PEQA (Kim et al. 2023, arXiv 2305.14152); selecting salient columns is SGR-Q.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from peft_sgrq.backends.base import ScaleBackend
from peft_sgrq.kernels import group_reduce


def effective_scales(backend: ScaleBackend, delta: torch.Tensor, groups: torch.Tensor | None) -> torch.Tensor:
    """The scales a layer computes with: `round_to_storage(S * (1 + delta))` at the selected groups, `S` elsewhere.

    Args:
        backend (`ScaleBackend`): Owner of the scales `S`, float32 `[rows, groups]`.
        delta (`torch.Tensor`): Relative changes, float32, `[rows, n]` for a group format and `[n, 1]` for a row
            format, `n` the number of selected groups or rows.
        groups (`torch.Tensor` or `None`): Indices of the selected groups (rows in a row format), int64 `[n]`,
            ascending; `None` selects all of them.

    Returns:
        `torch.Tensor`: float32 `[rows, groups]`, every value representable in the format's storage dtype.
    """
    scales = backend.scales()  # (R, G)
    if groups is None:
        return backend.round_to_storage(scales * (1 + delta))
    dim = backend.selected_dim
    changed = scales.index_select(dim, groups) * (1 + delta)
    return scales.index_copy(dim, groups, backend.round_to_storage(changed))


def _select(values: torch.Tensor, groups: torch.Tensor | None, dim: int) -> torch.Tensor:
    return values if groups is None else values.index_select(dim, groups)


def _input_gradient(
    dy: torch.Tensor, delta: torch.Tensor, groups: torch.Tensor | None, backend: ScaleBackend
) -> torch.Tensor:
    return dy @ backend.dequantize(effective_scales(backend, delta, groups), dy.dtype)  # (..., K)


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


class _GroupScaledLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, delta: torch.Tensor, groups: torch.Tensor | None, backend: ScaleBackend
    ) -> torch.Tensor:
        y = backend.linear(x, backend.prepare(effective_scales(backend, delta, groups)))  # (..., N)
        x_selected = None
        if ctx.needs_input_grad[1]:
            x_selected = backend.select_columns(backend.computed_input(x), groups).to(y.dtype)  # (T, n * g)
        ctx.save_for_backward(x_selected, delta, groups)
        ctx.backend = backend
        ctx.x_shape = x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        x_selected, delta, groups = ctx.saved_tensors
        backend: ScaleBackend = ctx.backend
        dy = grads[0].reshape(-1, grads[0].shape[-1])  # (T, N)
        dx = ddelta = None
        if ctx.needs_input_grad[0]:
            dx = _input_gradient(dy, delta, groups, backend).reshape(ctx.x_shape)
        if ctx.needs_input_grad[1]:
            product = dy.t() @ x_selected  # (N, n * g)
            codes = backend.codes(groups, dy.dtype)  # (N, n * g)
            ddelta = backend.reduce_rows(group_reduce(product, codes, backend.group_size))  # (R, n) float32
            ddelta = ddelta * _select(backend.scales(), groups, 1)
        return dx, ddelta, None, None


class _RowScaledLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, delta: torch.Tensor, groups: torch.Tensor | None, backend: ScaleBackend
    ) -> torch.Tensor:
        y = backend.linear(x, backend.prepare(effective_scales(backend, delta, groups)))  # (..., N)
        # A bias much larger than the product would leave few digits of y - b.
        product_known = backend.bias is None
        ctx.save_for_backward((y if product_known else x) if ctx.needs_input_grad[1] else None, delta, groups)
        ctx.backend = backend
        ctx.product_known = product_known
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        saved, delta, groups = ctx.saved_tensors
        backend: ScaleBackend = ctx.backend
        dy = grads[0]
        dx = ddelta = None
        if ctx.needs_input_grad[0]:
            dx = _input_gradient(dy, delta, groups, backend)
        if ctx.needs_input_grad[1]:
            dy_rows = _select(dy.reshape(-1, dy.shape[-1]), groups, 1)  # (T, n)
            saved = saved.reshape(-1, saved.shape[-1])  # (T, N) or (T, K)
            if ctx.product_known:
                product = _select(saved, groups, 1)  # (T, n)
                total = (dy_rows.float() * product.float()).sum(0).unsqueeze(1)  # (n, 1)
                scales, effective = _select(backend.scales(), groups, 0), effective_scales(backend, delta, groups)
                effective = _select(effective, groups, 0)
                # Where the scale in effect is zero the output does not tell the product any more.
                ddelta = torch.where(effective == 0, 0.0, total * (scales / effective))
            else:
                codes = backend.codes(groups, dy.dtype)  # (n, K)
                x = backend.computed_input(saved).to(dy.dtype)
                ddelta = group_reduce(dy_rows.t() @ x, codes, backend.group_size)  # (n, 1)
                ddelta = ddelta * _select(backend.scales(), groups, 0)
        return dx, ddelta, None, None


def scaled_linear(
    x: torch.Tensor, delta: torch.Tensor, groups: torch.Tensor | None, backend: ScaleBackend
) -> torch.Tensor:
    """The layer's output with its scales changed by `delta`, differentiable in `x` and `delta`.

    The forward pass is the format's own kernel with other scales, so it gives the bits of the merged layer.

    Args:
        x (`torch.Tensor`): Input `[..., in_features]`, as `ScaleBackend.cast_input` returns it.
        delta (`torch.Tensor`): Relative scale changes, float32, shaped as in `effective_scales`.
        groups (`torch.Tensor` or `None`): Selected groups or rows, int64 `[n]`; `None` for all.
        backend (`ScaleBackend`): The quantized (or dense) layer.

    Returns:
        `torch.Tensor`: `[..., out_features]`, the bias included.
    """
    function = _RowScaledLinear if backend.granularity == "row" else _GroupScaledLinear
    return function.apply(x, delta, groups, backend)
