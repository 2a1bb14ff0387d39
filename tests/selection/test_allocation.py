"""The allocation of ratios: its optimum is that of trying everything."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_sgrq.selection.layerwise.knapsack import Block, allocate, pareto_front

quick = settings(max_examples=150, deadline=None)


def worth(block: Block, choice: tuple[int, ...]) -> float:
    alone = sum(float(values[option]) for values, option in zip(block.values, choice, strict=True))
    return alone + sum(float(table[choice[i], choice[j]]) for (i, j), table in block.pairs.items())


def price(block: Block, choice: tuple[int, ...]) -> int:
    return sum(int(costs[option]) for costs, option in zip(block.costs, choice, strict=True))


def every_choice(block: Block) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(len(costs)) for costs in block.costs)))


def brute_force(blocks: list[Block], budget: int) -> float | None:
    """The least value within the budget, if any choice keeps to it."""
    best = None
    for choices in itertools.product(*map(every_choice, blocks)):
        cost = sum(map(price, blocks, choices))
        value = sum(map(worth, blocks, choices))
        if cost <= budget and (best is None or value < best):
            best = value
    return best


@st.composite
def blocks(draw: st.DrawFn, elements: st.SearchStrategy[float]) -> Block:
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    costs = [np.array(draw(st.lists(st.integers(0, 12), min_size=size, max_size=size))) for size in sizes]
    values = [np.array(draw(st.lists(elements, min_size=size, max_size=size)), dtype=float) for size in sizes]
    pairs = {}
    for i, j in itertools.combinations(range(len(sizes)), 2):
        if draw(st.booleans()):
            row = st.lists(elements, min_size=sizes[j], max_size=sizes[j])
            pairs[i, j] = np.array(draw(st.lists(row, min_size=sizes[i], max_size=sizes[i])), dtype=float)
    return Block(costs, values, pairs)


# Whole numbers: sums in any order are equal, so the comparison needs no tolerance, and ties are common.
@pytest.mark.slow
@quick
@given(st.lists(blocks(st.integers(-4, 4)), min_size=1, max_size=3), st.integers(0, 60))
def test_the_optimum_is_that_of_brute_force(problem, budget):
    expected = brute_force(problem, budget)
    if expected is None:
        with pytest.raises(ValueError, match="smallest ratio of every layer already costs"):
            allocate(problem, budget)
        return
    found = allocate(problem, budget)
    assert found.value == expected and found.cost <= budget
    assert (
        sum(worth(block, tuple(choice)) for block, choice in zip(problem, found.choices, strict=True)) == found.value
    )
    assert sum(price(block, tuple(choice)) for block, choice in zip(problem, found.choices, strict=True)) == found.cost


@pytest.mark.slow
@quick
@given(st.lists(blocks(st.floats(-1, 1)), min_size=1, max_size=3), st.integers(0, 60))
def test_the_optimum_is_that_of_brute_force_in_real_numbers(problem, budget):
    expected = brute_force(problem, budget)
    if expected is not None:
        assert allocate(problem, budget).value == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_the_optimum_is_that_of_a_table_over_all_costs(seed):
    # Larger than brute force can do, in whole numbers: the textbook knapsack over every possible cost.
    random = np.random.default_rng(seed)
    problem = [
        Block(
            [np.sort(random.integers(1, 40, 4)) for _ in range(4)],
            [-np.sort(random.integers(0, 1000, 4)).astype(float) for _ in range(4)],
            {pair: random.integers(-200, 200, (4, 4)).astype(float) for pair in itertools.combinations(range(4), 2)},
        )
        for _ in range(12)
    ]
    budget = int(sum(sum(costs[1] for costs in block.costs) for block in problem))
    table = np.zeros(budget + 1)
    for block in problem:
        after = np.full(budget + 1, np.inf)
        for choice in every_choice(block):
            cost = price(block, choice)
            if cost <= budget:
                after[cost:] = np.minimum(after[cost:], table[: budget + 1 - cost] + worth(block, choice))
        table = after
    assert allocate(problem, budget).value == table[-1]


def test_a_larger_budget_is_never_worse():
    random = np.random.default_rng(0)
    problem = [Block([random.integers(1, 9, 5)] * 3, [random.normal(size=5) for _ in range(3)]) for _ in range(6)]
    least = sum(int(costs.min()) for block in problem for costs in block.costs)
    values = [allocate(problem, budget).value for budget in range(least, 9 * 18)]
    assert values == sorted(values, reverse=True) and values[0] > values[-1]


def test_the_front_of_seven_layers_and_five_ratios_is_short_and_exact():
    random = np.random.default_rng(0)
    costs = [np.array([1, 2, 4, 8, 16]) * factor for factor in (4, 1, 1, 4, 14, 14, 4)]
    values = [-np.cumsum(random.random(5)) for _ in costs]
    pairs = {pair: random.normal(size=(5, 5)) * 0.1 for pair in itertools.combinations(range(7), 2)}
    block = Block(costs, values, pairs)
    front = pareto_front(block)
    assert len(front.costs) < 300
    assert (np.diff(front.costs) > 0).all() and (np.diff(front.values) < 0).all()
    for index in (0, len(front.costs) // 2, -1):
        choice = tuple(np.unravel_index(int(front.origins[index]), [5] * 7))
        assert price(block, choice) == front.costs[index]
        assert worth(block, choice) == pytest.approx(front.values[index])


def test_gains_that_are_all_proportional_to_the_cost_spend_the_budget():
    # The relaxed problem does not tell these choices apart at all.
    costs = [np.array([1, 2, 4, 8, 16]) * factor for factor in (4, 1, 1, 4, 14, 14, 4)]
    blocks = [Block(costs, [-cost.astype(float) for cost in costs])] * 40
    found = allocate(blocks, 10_000)
    assert found.cost == 10_000 and found.value == -10_000


def test_a_block_too_large_to_enumerate_is_refused():
    layers = 30
    block = Block([np.arange(1, 6)] * layers, [np.zeros(5)] * layers)
    with pytest.raises(ValueError, match=r"30 layers has 931,.* combinations .* fewer ratios"):
        allocate([block], 1000)


@pytest.mark.parametrize("where", ["values", "pairs"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_block_with_values_that_are_not_finite_is_refused(where, value):
    values, pairs = [np.zeros(2), np.zeros(2)], {(0, 1): np.zeros((2, 2))}
    (values[1] if where == "values" else pairs[0, 1])[0] = value
    with pytest.raises(ValueError, match="NaN or infinite values"):
        Block([np.array([1, 2]), np.array([1, 2])], values, pairs)


def test_no_blocks_cost_nothing():
    assert allocate([], 0) == ([], 0, 0.0)
