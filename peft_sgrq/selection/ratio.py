"""How many scales are selected: a share, the knee of the saliency, or one threshold for all layers under a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from peft_sgrq.choices import Budget, check_budget, size_in_bytes

WINSORISED_AT = 0.99


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


def knee(scores: torch.Tensor, winsorised_at: float = WINSORISED_AT) -> float:
    """The share of columns at the knee of the cumulative saliency: those with more of it than the mean.

    With the columns in descending order, `L(p)` the share of saliency in the first share `p` of them, the knee is
    where `L(p) - p` is largest. `L` is concave and its slope is a column's saliency over the mean one, so that is the
    share of columns above the mean. Scores above a percentile are lowered to it first: a few outlier channels, which
    activations of language models have, would move the mean above nearly all columns.

    Args:
        scores (`torch.Tensor`): Saliency of each column, not of each group (a row in a row format), float `[n]`.
        winsorised_at (`float`): That percentile, in (0, 1]; 1.0 changes nothing.

    Returns:
        `float`: A share in [0, 1); 0 if all columns are equally salient.
    """
    values = scores.detach().double().flatten()
    if winsorised_at < 1:
        values = values.clamp(max=float(torch.quantile(values, winsorised_at)))
    return float((values > values.mean()).double().mean())


def budget_in_scales(budget: Budget, total: int, bytes_per_scale: int) -> int:
    """How many scales a budget stands for.

    Args:
        budget (`float`, `int` or `str`): A share of all scales in (0, 1] as a `float`, a number of scales as an `int`,
            or the size of the adapter's deltas such as `"20MB"`.
        total (`int`): How many scales the layers have.
        bytes_per_scale (`int`): What a trained scale takes in the adapter file.
    """
    check_budget(budget)
    if isinstance(budget, str):
        return size_in_bytes(budget, "budget") // bytes_per_scale
    return budget if isinstance(budget, int) else math.floor(budget * total + 1e-9)


def counts_above_threshold(
    scores: Sequence[torch.Tensor], costs: Sequence[int], budget: int, fixed: int = 0
) -> list[int]:
    """How many groups of each layer lie above the one threshold at which a budget is spent.

    Args:
        scores (`Sequence[torch.Tensor]`): Scores of each layer's groups, comparable between layers, `[selectable]`.
        costs (`Sequence[int]`): Scales in a group of each layer.
        budget (`int`): Scales to select in all.
        fixed (`int`): Scales selected elsewhere already, part of the budget.

    Returns:
        `list[int]`: A count for each layer, at least one.

    Raises:
        ValueError: If the budget is less than one group in each layer.
    """
    least = fixed + sum(costs)
    if budget < least:
        raise ValueError(
            f"`budget` allows {budget} scales, expected at least {least}: each layer trains at least one group"
            f"{f', and `ratio_pattern` sets {fixed}' if fixed else ''}; raise the budget, or target fewer layers."
        )
    counts = [1] * len(scores)
    ordered = [
        layer.detach().cpu().double().sort(descending=True).values[1:] for layer in scores
    ]  # the first is taken
    layers = torch.cat([torch.full((len(rest),), index) for index, rest in enumerate(ordered)])
    order = torch.argsort(torch.cat(ordered), descending=True, stable=True)
    spent = torch.tensor(costs)[layers[order]].cumsum(0) if len(order) else torch.empty(0)
    for index in layers[order[spent <= budget - least]].tolist():
        counts[index] += 1
    return counts
