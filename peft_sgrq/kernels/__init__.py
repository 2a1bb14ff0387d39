"""Reductions of the backward pass; used by `peft_sgrq.functional` alone."""

from __future__ import annotations

import torch


def group_reduce(product: torch.Tensor, codes: torch.Tensor, group_size: int) -> torch.Tensor:
    """Sums `product * codes` over the columns of each group, in float32.

    Args:
        product (`torch.Tensor`): `dy^T x` at the selected columns, `[N, n * group_size]`.
        codes (`torch.Tensor`): Unit-scale values at the same columns, same shape and dtype.
        group_size (`int`): Columns per group.

    Returns:
        `torch.Tensor`: float32 `[N, n]`.
    """
    terms = (product * codes).view(product.shape[0], -1, group_size)  # (N, n, g)
    return terms.sum(-1, dtype=torch.float32)
