"""Formulas of scales, offsets and groups that several formats share."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def inverse_or_zero(scales: torch.Tensor) -> torch.Tensor:
    """`1 / S`, and zero where a scale is zero."""
    return (1 / scales).nan_to_num(torch.nan, 0.0, 0.0)


def rescaled_offset(
    offset: torch.Tensor, scales: torch.Tensor, original: torch.Tensor, moves: torch.Tensor | None = None
) -> torch.Tensor:
    """What becomes of a stored offset, which is zero point times scale, when the scale changes, or the zero point.

    In `W = q * S + offset` the offset belongs to the scale: only if both change alike is `W'` the weight times
    `1 + delta`, with the zero point where it was, as in all other formats. Where the scale is the same, so is the
    offset, bit for bit.

    Args:
        offset (`torch.Tensor`): Stored offsets, float32.
        scales (`torch.Tensor`): The new scales, same shape.
        original (`torch.Tensor`): The stored scales, same shape.
        moves (`torch.Tensor` or `None`): By how many steps the zero point moves, same shape.
    """
    # No `torch.where`, which takes a CPU as long as all of this. Zero is taken away from an offset, not added, lest a
    # negative zero become another.
    changed = offset * (scales / original).nan_to_num(1.0, 1.0, 1.0)
    return changed if moves is None else changed - (0.0 - scales * moves)


def gather_groups(values: torch.Tensor, units: torch.Tensor | None, count: int, size: int) -> torch.Tensor:
    """Columns of the selected groups of a matrix, `[M, K]` -> `[M, n * size]`; the last group padded by zeros."""
    missing = count * size - values.shape[1]
    if missing:
        values = F.pad(values, (0, missing))
    if units is None:
        return values
    return values.view(-1, count, size).index_select(1, units).flatten(1)
