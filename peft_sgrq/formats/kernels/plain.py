"""The reduction in plain torch: what the other variants are held against."""

from __future__ import annotations

import torch


def multiply_and_sum(product: torch.Tensor, codes: torch.Tensor, group_size: int) -> torch.Tensor:
    """Sums `product * codes` over the columns of each group; `[N, n * group_size]` to float32 `[N, n]`."""
    terms = (product * codes).view(product.shape[0], -1, group_size)  # (N, n, g)
    return terms.sum(-1, dtype=torch.float32)
