"""One ratio for each layer under one budget, exactly: blocks are enumerated, then a knapsack over blocks.

The quadratic program is that of Layer-Wise High-Impact Parameter Ratio Optimization (arXiv 2511.17801, equations 5 to
9): with `d` the one-hot choices of all layers, minimise `d^T M d` under a budget, where `M` couples layers of the same
block only. The paper names no solver. None is needed: a block of 7 layers and 5 ratios has 78,125 combinations, of
which only the Pareto front in cost and value can be part of an optimum, and over the fronts the problem is a
multiple-choice knapsack, solved by dynamic programming over Pareto-optimal states. A Lagrangian bound discards states
that cannot reach the optimum (Pisinger, "A minimal algorithm for the multiple-choice knapsack problem", 1995), so that
80 blocks take seconds. Costs are whole numbers and are never rounded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_COMBINATIONS = 20_000_000  # of one block: 160 MB for each of a few arrays
_SLACK = 1e-9  # relative; a state is dropped only if it is worse by more than rounding could make it


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
    origins: NDArray[np.int64]  # which combination, or which pair of (state so far, option of the next block)


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
        `Allocation`: An exact optimum; of equal ones the cheapest.

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
    multiplier, upper = _relax(fronts, budget)
    # What each option costs more, at the price of the multiplier, than the best of its block.
    priced = [front.values + multiplier * front.costs for front in fronts]
    floor = [float(prices.min()) for prices in priced]
    slack = _SLACK * (1.0 + sum(float(np.abs(front.values).max()) for front in fronts))
    gap = upper + multiplier * budget - sum(floor) + slack
    states = _Front(np.zeros(1, dtype=np.int64), np.zeros(1), np.zeros(1, dtype=np.int64))
    reduced: list[_Front] = []
    history: list[_Front] = []
    rest_cost, rest_floor = least, sum(floor)
    for front, prices, bottom in zip(fronts, priced, floor, strict=True):
        rest_cost -= int(front.costs[0])
        rest_floor -= bottom
        keep = prices - bottom <= gap
        options = _Front(front.costs[keep], front.values[keep], front.origins[keep])
        costs = (states.costs[:, None] + options.costs).ravel()  # (states * options,)
        values = (states.values[:, None] + options.values).ravel()
        bound = values + multiplier * (costs - budget) + rest_floor
        possible = np.flatnonzero((costs + rest_cost <= budget) & (bound <= upper + slack))
        states = _pareto(costs[possible], values[possible])
        states = states._replace(origins=possible[states.origins])
        reduced.append(options)
        history.append(states)
    return _trace(blocks, reduced, history)


def _trace(blocks: Sequence[Block], reduced: list[_Front], history: list[_Front]) -> Allocation:
    if not history:
        return Allocation([], 0, 0.0)
    state = len(history[-1].costs) - 1  # the best value is the last of a front
    cost, value = int(history[-1].costs[state]), float(history[-1].values[state])
    choices: list[list[int]] = []
    for block, options, states in zip(reversed(blocks), reversed(reduced), reversed(history), strict=True):
        state, option = divmod(int(states.origins[state]), len(options.costs))
        shape = tuple(len(costs) for costs in block.costs)
        choices.append([int(index) for index in np.unravel_index(int(options.origins[option]), shape)])
    return Allocation(choices[::-1], cost, value)


def _relax(fronts: Sequence[_Front], budget: int) -> tuple[float, float]:
    """The multiplier of the relaxed problem, and the value of a choice that keeps within the budget.

    The relaxed problem mixes options, so only the convex hull of each front counts. Its segments are taken by their
    gain for the cost, best first, until the budget is used up; the first that does not fit gives the multiplier.
    """
    gains: list[tuple[float, int, float]] = []  # gain for the cost, cost, gain of a segment
    for front in fronts:
        hull = _lower_hull(front)
        costs, values = front.costs[hull], front.values[hull]
        for more, less in zip(np.diff(costs), -np.diff(values), strict=True):
            gains.append((float(less) / int(more), int(more), float(less)))
    spent = sum(int(front.costs[0]) for front in fronts)
    value = sum(float(front.values[0]) for front in fronts)
    multiplier = 0.0
    # Along a hull the gains decline, and the sort keeps the order of equal ones: a block's segments come in order.
    for rate, more, less in sorted(gains, key=lambda gain: -gain[0]):
        if spent + more > budget:
            multiplier = rate
            break
        spent, value = spent + more, value - less
    return multiplier, value


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
