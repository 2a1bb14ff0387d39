"""How many scales are selected."""

from __future__ import annotations

import torch


def count_selected(ratio: float, selectable: int) -> int:
    """The number of groups a ratio stands for: the nearest whole number, at least one."""
    return min(selectable, max(1, int(ratio * selectable + 0.5)))


def select_top(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` highest scores, ascending; of equal scores the first ones.

    Args:
        scores (`torch.Tensor`): Float `[selectable]`.
        count (`int`): How many.

    Returns:
        `torch.Tensor`: int64 `[count]`, on the CPU.
    """
    order = torch.argsort(scores.detach().cpu(), descending=True, stable=True)
    return order[:count].sort().values
