"""One ratio for each layer under one budget, exactly: blocks are enumerated, then a knapsack over blocks.

The quadratic program is that of Layer-Wise High-Impact Parameter Ratio Optimization (arXiv 2511.17801, equations 5 to
9): with `d` the one-hot choices of all layers, minimise `d^T M d` under a budget, where `M` couples layers of the same
block only. The paper names no solver, and none is needed. A block of 7 layers and 5 ratios has 78,125 combinations,
and only their Pareto front in cost and value can be part of an optimum. Over the fronts the problem is a
multiple-choice knapsack, solved by dynamic programming over Pareto-optimal states. A Lagrangian bound discards states
that cannot lead to the optimum (Pisinger, "A minimal algorithm for the multiple-choice knapsack problem", 1995), so
that 80 blocks take seconds. Costs are whole numbers and are never rounded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_COMBINATIONS = 20_000_000  # of one block: 160 MB for each of a few arrays
_SLACK = 1e-12  # relative: what is less than this better is the rounding of sums
_CHUNK = 4_000_000  # sums computed in one go


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
        if not all(np.isfinite(table).all() for table in (*self.values, *self.pairs.values())):
            raise ValueError(
                "A block has NaN or infinite values, expected finite ones; check the loss on the calibration data."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """How many options each of its layers has."""
        return tuple(len(costs) for costs in self.costs)


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
    keep = np.append(True, best[1:] < best[:-1])[: len(order)]
    order = order[keep]
    return _Front(costs[order], values[order], order)


def pareto_front(block: Block) -> _Front:
    """All combinations of a block's options that are cheaper or better than every other, if they can be enumerated."""
    shape, dims = block.shape, len(block.shape)
    if math.prod(shape) > MAX_COMBINATIONS:
        raise ValueError(
            f"A block of {dims} layers has {math.prod(shape):,} combinations of ratios, expected at most "
            f"{MAX_COMBINATIONS:,}; give fewer ratios, or split the block where layers interact little."
        )
    costs = reduce(np.add.outer, [np.asarray(one, dtype=np.int64) for one in block.costs])  # (options, ...) by layer
    values = reduce(np.add.outer, [np.asarray(one, dtype=np.float64) for one in block.values])
    for pair, table in block.pairs.items():
        values = values + np.expand_dims(table, tuple(layer for layer in range(dims) if layer not in pair))
    return _pareto(costs.ravel(), values.ravel())


def allocate(blocks: Sequence[Block], budget: int) -> Allocation:
    """Chooses an option for each layer so that the sum of all values and pair terms is least within a budget.

    Args:
        blocks (`Sequence[Block]`): The blocks; layers of different blocks do not interact.
        budget (`int`): The most that the chosen options may cost together.

    Returns:
        `Allocation`: An optimum, exact except for the rounding of float64 sums.

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
    points = [point for _, point in sorted(zip(order, found, strict=True))]
    choices = [
        [int(option) for option in np.unravel_index(int(front.origins[point]), block.shape)]
        for block, front, point in zip(blocks, fronts, points, strict=True)
    ]
    return Allocation(choices, *_total(fronts, points))


def _total(fronts: Sequence[_Front], points: Sequence[int]) -> tuple[int, float]:
    """What a point of each front costs, and is worth."""
    chosen = list(zip(fronts, points, strict=True))
    cost = sum(int(front.costs[point]) for front, point in chosen)
    return cost, float(sum(float(front.values[point]) for front, point in chosen))


def _search(fronts: Sequence[_Front], budget: int, price: float, relaxed: list[int]) -> list[int]:
    """The optimal point of each front.

    States are the Pareto-optimal choices for the blocks so far. A lower bound for what a state can lead to is given by
    the relaxed problem at its `price` for costs, an upper bound by the points `relaxed` it takes in the blocks to
    come. States that cannot lead to better than the best choice known are dropped; when none is left, it is optimal.
    """
    slack = _SLACK * sum(float(np.abs(front.values).max()) for front in fronts)
    points = relaxed
    rest_least = sum(int(front.costs[0]) for front in fronts)
    rest_priced = sum(float((front.values + price * front.costs).min()) for front in fronts)
    rest_cost, rest_value = _total(fronts, relaxed)
    best = rest_value
    states = _Front(np.zeros(1, dtype=np.int64), np.zeros(1), np.zeros(1, dtype=np.int64))
    history: list[_Front] = []
    for index, front in enumerate(fronts):
        rest_least -= int(front.costs[0])
        rest_priced -= float((front.values + price * front.costs).min())
        rest_cost -= int(front.costs[relaxed[index]])
        rest_value -= float(front.values[relaxed[index]])
        states = _extend(states, front, budget - rest_least, price, best - rest_priced - slack, budget)
        if not len(states.costs):
            break
        history.append(states)
        # What the states come to with the relaxed problem's points of the blocks to come.
        feasible = int(np.searchsorted(states.costs, budget - rest_cost, side="right"))
        if feasible and states.values[feasible - 1] + rest_value < best:
            best = float(states.values[feasible - 1] + rest_value)
            points = _trace(history, fronts, feasible - 1) + relaxed[index + 1 :]
        bound = states.values + price * (states.costs - budget) + rest_priced
        if not (bound < best - slack).any():
            break
    return points


def _extend(states: _Front, front: _Front, most: int, price: float, bound: float, budget: int) -> _Front:
    """The Pareto front of all states with all points of a front that stay below `most` and `bound`."""
    kept: list[tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]] = []
    count = len(front.costs)
    step = max(1, _CHUNK // count)
    for start in range(0, len(states.costs), step):
        costs = (states.costs[start : start + step, None] + front.costs).ravel()  # (states * points,)
        values = (states.values[start : start + step, None] + front.values).ravel()
        possible = np.flatnonzero((costs <= most) & (values + price * (costs - budget) < bound))
        kept.append((costs[possible], values[possible], possible + start * count))
    costs, values, origins = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    best = _pareto(costs, values)
    return best._replace(origins=origins[best.origins])


def _trace(history: list[_Front], fronts: Sequence[_Front], state: int) -> list[int]:
    """The points of the blocks so far that led to a state of the last of them."""
    points = []
    for states, front in zip(history[::-1], fronts[len(history) - 1 :: -1], strict=True):
        state, point = divmod(int(states.origins[state]), len(front.costs))
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
