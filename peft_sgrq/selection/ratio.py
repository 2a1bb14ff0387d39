"""How many scales are selected: a share, the knee of the saliency, or one threshold for all layers under a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

NAMED_RATIOS = ("knee", "global", "layerwise")
WINSORISED_AT = 0.99
DEFAULT_BUDGET = 0.4  # the share of SGR-Q

Ratio = float | str
Budget = float | int | str


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


def check_budget(budget: object, name: str = "budget") -> None:
    """Refuses what is no budget as [`budget_in_scales`] takes it."""
    expected = (
        'expected a share of all scales in (0, 1] such as 0.4, a number of scales as an int, or a size such as "20MB"'
    )
    if isinstance(budget, bool) or not isinstance(budget, (int, float, str)):
        raise TypeError(f"`{name}` is {budget!r}, {expected}.")
    valid = budget >= 1 if isinstance(budget, int) else True
    if isinstance(budget, float):
        valid = math.isfinite(budget) and 0 < budget <= 1
    if isinstance(budget, str):
        try:
            size_in_bytes(budget, name)
        except ValueError:
            valid = False
    if not valid:
        raise ValueError(f"`{name}` is {budget!r}, {expected}.")


def size_in_bytes(size: int | str, name: str) -> int:
    """Bytes of a size such as `"20MB"`, `"4GiB"` or a number of bytes; a ValueError names what it is the size of."""
    from accelerate.utils.modeling import convert_file_size_to_int  # type: ignore[import-untyped]

    try:
        found = int(convert_file_size_to_int(size))
    except (ValueError, AttributeError):
        found = 0
    if found <= 0:
        raise ValueError(f'`{name}` is {size!r}, expected a size such as "20MB" or a number of bytes; correct it.')
    return found


def check_ratio(ratio: object, name: str = "ratio") -> None:
    """Refuses what is neither a share in (0, 1] nor one of `NAMED_RATIOS`."""
    names = ", ".join(f'"{known}"' for known in NAMED_RATIOS)
    if isinstance(ratio, str):
        if ratio not in NAMED_RATIOS:
            raise ValueError(f"`{name}` is {ratio!r}, expected a number in (0, 1] or one of {names}.")
        return
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
        raise TypeError(f"`{name}` is {ratio!r}, expected a number in (0, 1] or one of {names}; 1.0 is the default.")
    if not (math.isfinite(ratio) and 0 < ratio <= 1):
        raise ValueError(
            f"`{name}` is {ratio}, expected a share of the scales in (0, 1]; 0.4 trains 40 % of them, 1.0 all."
        )


def check_ratio_pattern(pattern: object) -> None:
    """Refuses what is not a dict from module names, or patterns of them, to numbers in (0, 1] or `"knee"`."""
    if not isinstance(pattern, dict):
        raise TypeError(f"`ratio_pattern` is {pattern!r}, expected a dict from module names or patterns to ratios.")
    for key, value in pattern.items():
        if not isinstance(key, str):
            raise TypeError(
                f"`ratio_pattern` has the key {key!r}, expected the name of a module or a pattern of names."
            )
        check_ratio(value, f"ratio_pattern[{key!r}]")
        if value in ("global", "layerwise"):
            raise ValueError(
                f"`ratio_pattern[{key!r}]` is {value!r}, which is about all layers, expected a number in (0, 1] or "
                '"knee"; set `ratio` instead.'
            )


def counts_above_threshold(
    scores: Sequence[torch.Tensor], costs: Sequence[int], budget: int, fixed: int = 0
) -> list[int]:
    """How many groups of each layer lie above the one threshold at which a budget is spent.

    Args:
        scores (`Sequence[torch.Tensor]`): Of the groups of each layer, comparable between layers, `[selectable]`.
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
