"""Products with a packed matrix. On CPUs some rows of it at a time: fresh memory costs as much as dequantizing."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional as F

from peft_sgrq.formats.gguf.block_scales import BlockScales, Factors
from peft_sgrq.formats.gguf.blocks import scale_codes

_PART_BYTES = 16 << 20


def _parts(held: BlockScales, factors: Factors, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """The matrix dequantized, some rows at a time, `[n, K]`, and which rows these are."""
    in_row = held.blocks.shape[0] // held.rows
    step = held.rows
    if held.blocks.device.type == "cpu" and not torch.compiler.is_compiling():
        step = max(1, _PART_BYTES // (in_row * held.kind.size * dtype.itemsize))
    for start in range(0, held.rows, step):
        rows = slice(start, min(start + step, held.rows))
        blocks = slice(rows.start * in_row, rows.stop * in_row)
        offsets = None if factors.offsets is None else factors.offsets[blocks]
        weight = scale_codes(held.kind, held.blocks[blocks], factors.scales[blocks], offsets, dtype)
        yield rows, weight.view(rows.stop - rows.start, -1)


def product(x: torch.Tensor, held: BlockScales, factors: Factors, bias: torch.Tensor | None) -> torch.Tensor:
    """`x W^T + b`, `[..., K]` -> `[..., N]`, with the weight rounded to the dtype of the input.

    Args:
        x (`torch.Tensor`): The input.
        held (`BlockScales`): The packed matrix.
        factors (`Factors`): What its codes are multiplied by, and what is added.
        bias (`torch.Tensor` or `None`): `[N]`.
    """
    y = None
    for rows, weight in _parts(held, factors, x.dtype):
        part = F.linear(x, weight, None if bias is None else bias[rows].to(x.dtype))
        if len(weight) == held.rows:
            return part
        y = x.new_empty(*x.shape[:-1], held.rows) if y is None else y
        y[..., rows] = part
    return x.new_empty(*x.shape[:-1], 0) if y is None else y


def transposed_product(dy: torch.Tensor, held: BlockScales, factors: Factors) -> torch.Tensor:
    """`dy W`, `[..., N]` -> `[..., K]`: the gradient of the input."""
    flat = dy.reshape(-1, dy.shape[-1])
    parts = _parts(held, factors, dy.dtype)
    rows, weight = next(parts)
    dx = flat[:, rows] @ weight
    for rows, weight in parts:
        dx.addmm_(flat[:, rows], weight)
    return dx.view(*dy.shape[:-1], -1)
