"""One ratio for each layer under one budget, exactly: blocks are enumerated, then a knapsack over blocks.

The quadratic program is that of Layer-Wise High-Impact Parameter Ratio Optimization (arXiv 2511.17801, equations 5 to
9): with `d` the one-hot choices of all layers, minimise `d^T M d` under a budget, where `M` couples layers of the same
block only. The paper names no solver. None is needed: a block of 7 layers and 5 ratios has 78,125 combinations, of
which only the Pareto front in cost and value can be part of an optimum, and over the fronts the problem is a
multiple-choice knapsack, solved by dynamic programming over Pareto-optimal states. A Lagrangian bound discards states
that cannot lead to the optimum (Pisinger, "A minimal algorithm for the multiple-choice knapsack problem", 1995), so
that 80 blocks take seconds. Costs are whole numbers and are never rounded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_COMBINATIONS = 20_000_000  # of one block: 160 MB for each of a few arrays
_SLACK = 1e-12  # relative: what is less than this better is the rounding of sums
_CHUNK = 4_000_000  # sums looked at in one go


@dataclass(frozen=True)
class Block:
    """Layers that interact, and what each choice for them costs and is worth.

    Attributes:
        costs (`list` of int arrays): For each layer the cost of each of its options, `[options]`.
        values (`list` of float arrays): For each layer the value of each option alone, `[options]`; small is good.
        pairs (`dict`): `(i, j)` with `i < j` -> what options of layers `i` and `j` add together, `[options of i,
            options of j]`. Pairs that are missing do not interact.
    """

    costs: Sequence[NDArray[np.int64]]
    values: Sequence[NDArray[np.float64]]
    pairs: Mapping[tuple[int, int], NDArray[np.float64]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = [len(costs) for costs in self.costs]
        if not sizes or min(sizes) == 0 or sizes != [len(values) for values in self.values]:
            raise ValueError(
                f"A block has {sizes} costs and {[len(values) for values in self.values]} values by layer, expected "
                "as many values as costs and at least one option for each layer; give every option both."
            )
        for (i, j), table in self.pairs.items():
            if not 0 <= i < j < len(sizes) or np.shape(table) != (sizes[i], sizes[j]):
                raise ValueError(
                    f"The pair term {(i, j)} of a block has shape {np.shape(table)}, expected the options of two "
                    f"layers i < j out of {sizes}; name each pair once, the lower layer first."
                )
        if not all(np.isfinite(table).all() for table in (*self.values, *self.pairs.values())):
            raise ValueError(
                "A block has NaN or infinite values, expected finite ones; check the loss on the calibration data."
            )

    @property
    def combinations(self) -> int:
        """In how many ways its layers can choose."""
        return math.prod(len(costs) for costs in self.costs)


class Allocation(NamedTuple):
    """An optimal choice.

    Attributes:
        choices (`list[list[int]]`): For each block the option of each of its layers.
        cost (`int`): What they cost together.
        value (`float`): The minimum of `d^T M d`.
    """

    choices: list[list[int]]
    cost: int
    value: float


class _Front(NamedTuple):
    """Pareto-optimal choices: cost ascending, value strictly descending."""

    costs: NDArray[np.int64]
    values: NDArray[np.float64]
    origins: NDArray[np.int64]  # which combination of a block, or which pair of (state before, point of the front)


def _pareto(costs: NDArray[np.int64], values: NDArray[np.float64]) -> _Front:
    order = np.lexsort((values, costs))
    best = np.minimum.accumulate(values[order])
    keep = np.concatenate([[True], best[1:] < best[:-1]])
    order = order[keep]
    return _Front(costs[order], values[order], order)


def pareto_front(block: Block) -> _Front:
    """All combinations of a block's options that are cheaper or better than every other.

    Raises:
        ValueError: If there are more combinations than can be enumerated.
    """
    if block.combinations > MAX_COMBINATIONS:
        raise ValueError(
            f"A block of {len(block.costs)} layers has {block.combinations:,} combinations of ratios, expected "
            f"at most {MAX_COMBINATIONS:,}; give fewer ratios, or split the block where layers interact little."
        )
    dims = len(block.costs)

    def along(table: NDArray, *axes: int) -> NDArray:
        return table.reshape([table.shape[axes.index(axis)] if axis in axes else 1 for axis in range(dims)])

    shape = tuple(len(costs) for costs in block.costs)
    costs, values = np.zeros(shape, dtype=np.int64), np.zeros(shape)
    for layer in range(dims):
        costs += along(np.asarray(block.costs[layer], dtype=np.int64), layer)
        values += along(np.asarray(block.values[layer], dtype=np.float64), layer)
    for (i, j), table in block.pairs.items():
        values += along(np.asarray(table, dtype=np.float64), i, j)
    return _pareto(costs.ravel(), values.ravel())


def allocate(blocks: Sequence[Block], budget: int) -> Allocation:
    """Chooses an option for each layer so that the sum of all values and pair terms is least within a budget.

    Args:
        blocks (`Sequence[Block]`): The blocks; layers of different blocks do not interact.
        budget (`int`): The most that the chosen options may cost together.

    Returns:
        `Allocation`: An optimum, exact but for the rounding of float64 sums.

    Raises:
        ValueError: If even the cheapest options cost more than the budget, or a block is too large to enumerate.
    """
    fronts = [pareto_front(block) for block in blocks]
    least = sum(int(front.costs[0]) for front in fronts)
    if least > budget:
        raise ValueError(
            f"The budget is {budget:,}, but the smallest ratio of every layer already costs {least:,}; raise the "
            "budget, or offer smaller ratios."
        )
    price, points, critical = _relax(fronts, budget)
    # The block in which the relaxed budget ran out can use what is left of it. It comes first, so that a good choice
    # is known early.
    order = sorted(range(len(fronts)), key=lambda index: index != critical)
    found = _search([fronts[index] for index in order], budget, price, [points[index] for index in order])
    for index, point in zip(order, found, strict=True):
        points[index] = point
    chosen = list(zip(fronts, points, strict=True))
    choices = []
    for block, front, point in zip(blocks, fronts, points, strict=True):
        shape = [len(costs) for costs in block.costs]
        choices.append([int(index) for index in np.unravel_index(int(front.origins[point]), shape)])
    cost = sum(int(front.costs[point]) for front, point in chosen)
    value = sum(float(front.values[point]) for front, point in chosen)
    return Allocation(choices, cost, float(value))


def _search(fronts: Sequence[_Front], budget: int, price: float, points: list[int]) -> list[int]:
    """The optimal point of each front.

    States are the Pareto-optimal choices for the blocks so far. A lower bound for what a state can lead to is given by
    the relaxed problem at its price for costs, an upper bound by the points the relaxed problem takes in the blocks to
    come. States that cannot lead to better than the best choice known are dropped; when none is left, it is optimal.

    Args:
        fronts (`Sequence[_Front]`): The fronts of all blocks.
        budget (`int`): The most the points may cost.
        price (`float`): The multiplier of the relaxed problem.
        points (`list[int]`): For each front the point the relaxed problem takes; they keep to the budget.
    """
    priced = [front.values + price * front.costs for front in fronts]
    slack = _SLACK * sum(float(np.abs(front.values).max()) for front in fronts)
    best = float(sum(front.values[point] for front, point in zip(fronts, points, strict=True)))
    relaxed = points
    rest_least = sum(int(front.costs[0]) for front in fronts)
    rest_priced = sum(float(prices.min()) for prices in priced)
    rest_cost = sum(int(front.costs[point]) for front, point in zip(fronts, relaxed, strict=True))
    rest_value = float(sum(front.values[point] for front, point in zip(fronts, relaxed, strict=True)))
    states = _Front(np.zeros(1, dtype=np.int64), np.zeros(1), np.zeros(1, dtype=np.int64))
    history: list[_Front] = []
    for index, (front, prices) in enumerate(zip(fronts, priced, strict=True)):
        rest_least -= int(front.costs[0])
        rest_priced -= float(prices.min())
        rest_cost -= int(front.costs[relaxed[index]])
        rest_value -= float(front.values[relaxed[index]])
        costs, values, origins = _extend(states, front, budget - rest_least, price, best - rest_priced - slack, budget)
        if not len(costs):
            break
        states = _pareto(costs, values)
        states = states._replace(origins=origins[states.origins])
        history.append(states)
        # What the states come to with the relaxed problem's points of the blocks to come.
        feasible = int(np.searchsorted(states.costs, budget - rest_cost, side="right"))
        if feasible and states.values[feasible - 1] + rest_value < best:
            best = float(states.values[feasible - 1] + rest_value)
            points = _trace(history, [len(front.costs) for front in fronts], feasible - 1) + relaxed[index + 1 :]
        bound = states.values + price * (states.costs - budget) + rest_priced
        if not (bound < best - slack).any():
            break
    return points


def _extend(
    states: _Front, front: _Front, most: int, price: float, bound: float, budget: int
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """Costs, values and origins of all states with all points of a front that stay below `most` and `bound`."""
    kept: list[tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]] = []
    count = len(front.costs)
    step = max(1, _CHUNK // count)
    for start in range(0, len(states.costs), step):
        costs = (states.costs[start : start + step, None] + front.costs).ravel()  # (states * points,)
        values = (states.values[start : start + step, None] + front.values).ravel()
        possible = np.flatnonzero((costs <= most) & (values + price * (costs - budget) < bound))
        kept.append((costs[possible], values[possible], possible + start * count))
    costs, values, origins = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    return costs, values, origins


def _trace(history: list[_Front], sizes: list[int], state: int) -> list[int]:
    """The points of the blocks so far that led to a state of the last of them."""
    points = []
    for index in range(len(history) - 1, -1, -1):
        state, point = divmod(int(history[index].origins[state]), sizes[index])
        points.append(point)
    return points[::-1]


def _relax(fronts: Sequence[_Front], budget: int) -> tuple[float, list[int], int | None]:
    """The price of the relaxed problem, a point of each front that keep to the budget, and the front that exceeds it.

    The relaxed problem mixes points, so only the convex hull of each front counts. Its segments are taken by their
    gain for the cost, best first, until the budget is used up; the first that does not fit gives the price.
    """
    gains: list[tuple[float, int, int, int]] = []  # gain for the cost, cost, front and end of a segment
    for index, front in enumerate(fronts):
        hull = _lower_hull(front)
        for start, end in pairwise(hull):
            cost = int(front.costs[end] - front.costs[start])
            gains.append((float(front.values[start] - front.values[end]) / cost, cost, index, end))
    points = [0] * len(fronts)
    spent = sum(int(front.costs[0]) for front in fronts)
    # Along a hull the gains decline, and the sort keeps the order of equal ones: a front's segments come in order.
    for rate, cost, index, end in sorted(gains, key=lambda gain: -gain[0]):
        if spent + cost > budget:
            return rate, points, index
        spent, points[index] = spent + cost, end
    return 0.0, points, None


def _lower_hull(front: _Front) -> list[int]:
    hull: list[int] = []
    for index, (cost, value) in enumerate(zip(front.costs.tolist(), front.values.tolist(), strict=True)):
        while len(hull) > 1:
            (c0, v0), (c1, v1) = ((front.costs[i], front.values[i]) for i in hull[-2:])
            if (v1 - v0) * (cost - c0) < (value - v0) * (c1 - c0):  # the middle point is below the line: it stays
                break
            hull.pop()
        hull.append(index)
    return hull
