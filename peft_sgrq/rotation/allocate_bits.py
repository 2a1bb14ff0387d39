"""`allocate_bits`: more bits for the layers that need them, fewer for others, under one budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm.auto import tqdm

from peft_sgrq.choices import size_in_bytes
from peft_sgrq.passes.data import load_batches
from peft_sgrq.passes.running import longest
from peft_sgrq.passes.untouched import untouched
from peft_sgrq.rotation.bit_plan import BitPlan, stored_bits
from peft_sgrq.rotation.bit_values import Pairs, Rounding, by_fisher, by_measured_loss, by_output
from peft_sgrq.rotation.quantize import quantizable_layers
from peft_sgrq.rotation.recorded_calls import recorded_calls, same_tensor
from peft_sgrq.rotation.scheme import BIT_CRITERIA, WIDTHS, parse_scheme, require_compressed_tensors
from peft_sgrq.selection.layerwise.allocate_ratios import split_blocks
from peft_sgrq.selection.layerwise.gains import halves
from peft_sgrq.selection.layerwise.knapsack import Block, allocate
from peft_sgrq.selection.layerwise.probe import Row, mean_loss, run_row, split_rows

_STEP = 0.25  # bits between points of the curve


def allocate_bits(
    model: nn.Module,
    data: Any,
    *,
    tokenizer: Any = None,
    bits: float | str = 2.5,
    widths: Sequence[int] = (2, 3, 4),
    group_size: int = 64,
    criterion: Literal["fisher", "measured", "output"] = "fisher",
    pairs: bool = False,
    fuse: bool = True,
    ignore: Sequence[str] = (),
    column: str | None = None,
    samples: int | None = 64,
    max_length: int = 512,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> BitPlan:
    """Finds how many bits each layer of a dense model is to get, so that rounding costs least within a budget.

    What each width costs in each layer is estimated on half of the data, and of all choices within the budget the
    best is found exactly. On the other half the loss with all layers rounded is measured, and so is that of the widest
    uniform plan within the budget. Where that is as good, it is what is returned.

    Args:
        model (`nn.Module`): A dense causal language model in the dtype it will be quantized in, as scales have that.
            It is left as it was.
        data: Calibration data, as in [`calibrate`].
        tokenizer: The tokenizer for texts.
        bits (`float` or `str`): The budget: bits a weight in the mean, with scales; or the size of the quantized
            layers, such as `"3GB"`.
        widths (`Sequence[int]`): What to choose from, each 2 to 8.
        group_size (`int`): Columns that share a scale; a layer whose columns are no multiple of it has one a row.
        criterion (`str`): `"fisher"` estimates the change of the loss to second order from one backward pass;
            `"measured"` measures it, by a forward pass over half of the data for each width of each unit; `"output"`
            takes the relative error of a layer's outputs, without a backward pass.
        pairs (`bool`): With `"measured"`: what two units of a block cost together, as in the paper, for a forward pass
            each pair of widths.
        fuse (`bool`): Layers with the same input (query, key and value; gate and up) get one width, as engines run
            them as one layer. Those are a unit.
        ignore (`Sequence[str]`): Linear layers that stay as they are, at no cost.
        column, samples, max_length, batch_size, seed: How the data is read, as in [`calibrate`].
        progress (`bool`): Show a progress bar.

    Returns:
        `BitPlan`: For [`quantize`], AutoRound and GPTQModel.

    Raises:
        ValueError: If even the smallest widths exceed the budget, the model cannot be quantized, or the data is empty.
        TypeError: If an argument has the wrong type.
        ImportError: If compressed-tensors is missing.

    Source: the programme of Layer-Wise High-Impact Parameter Ratio Optimization (arXiv 2511.17801), with the bits of
    whole layers in place of shares of columns, as no loader holds two widths in one layer.

    Example:
        ```py
        >>> plan = peft_sgrq.allocate_bits(model, texts, tokenizer=tokenizer, bits=2.75)
        >>> peft_sgrq.quantize(model, plan).save_pretrained("planned")
        ```
    """
    require_compressed_tensors()
    offered = _check_widths(widths)
    if criterion not in BIT_CRITERIA:
        raise ValueError(f"`criterion` is {criterion!r}, expected one of {BIT_CRITERIA}.")
    if pairs and criterion != "measured":
        raise ValueError(f'`pairs` needs the criterion "measured", found {criterion!r}; leave it out.')
    scheme = parse_scheme(f"W{offered[-1]}A16", group_size)
    layers = quantizable_layers(model, ignore)
    costs = {name: [stored_bits(layer, width, scheme) for width in offered] for name, layer in layers.items()}
    weights = sum(layer.weight.numel() for layer in layers.values())
    budget = _budget(bits, weights, costs)
    batches = load_batches(data, tokenizer, column, samples, longest(model, max_length), batch_size, seed)
    first, second = halves(split_rows(batches))
    units = _units(model, layers, first[0]) if fuse else [[name] for name in layers]
    blocks = _blocks(units, len(offered))
    rounding = Rounding(layers, offered, scheme)
    values, together = _values(model, rounding, units, blocks, criterion, pairs, first, progress)
    problem = _problem(units, blocks, costs, values, together)
    found = _widths(layers, units, blocks, allocate(problem, budget).choices, offered)
    predicted = {
        ",".join(unit): float(value[offered.index(found[unit[0]])]) for unit, value in zip(units, values, strict=True)
    }
    bits_of = _spent(found, costs, offered)
    plan = BitPlan(found, scheme.group_size, bits_of / weights, bits_of // 8, budget // 8, criterion)
    plan.predicted, plan.curve = predicted, _curve(problem, weights, costs)
    plan.by_row = [name for name, layer in layers.items() if scheme.by_row(layer.in_features)]
    plan.ignored = [name for name, one in model.named_modules() if isinstance(one, nn.Linear) and name not in layers]
    return _no_worse_than_uniform(plan, model, rounding, costs, budget, weights, second)


def _check_widths(widths: Sequence[int]) -> list[int]:
    if isinstance(widths, str) or not isinstance(widths, Sequence) or not widths:
        raise TypeError(f"`widths` is {widths!r}, expected whole numbers of bits such as (2, 3, 4).")
    for width in widths:
        if not isinstance(width, int) or width not in WIDTHS:
            raise ValueError(f"`widths` has {width!r}, expected whole numbers from {WIDTHS[0]} to {WIDTHS[-1]}.")
    return sorted(set(widths))


def _budget(bits: float | str, weights: int, costs: Mapping[str, list[int]]) -> int:
    """The budget in bits."""
    if isinstance(bits, str):
        budget = 8 * size_in_bytes(bits, "bits")
    elif isinstance(bits, bool) or not isinstance(bits, (int, float)):
        raise TypeError(f'`bits` is a {type(bits).__name__}, expected bits a weight or a size such as "3GB".')
    elif not (math.isfinite(bits) and bits > 0):
        raise ValueError(f"`bits` is {bits!r}, expected a positive number of bits a weight.")
    else:
        budget = math.floor(bits * weights * (1 + 1e-12))  # the bits of a plan are enough for it
    least = sum(cost[0] for cost in costs.values())
    if least > budget:
        raise ValueError(
            f"`bits` is {bits!r}, but with scales the smallest widths take {math.ceil(1e3 * least / weights) / 1e3} "
            f"bits a weight ({-(-least // 8)} bytes); raise it, offer smaller widths, give a larger `group_size`, or "
            "load the model in a smaller dtype, which scales have, too."
        )
    return budget


def _units(model: nn.Module, layers: Mapping[str, nn.Linear], row: Row) -> list[list[str]]:
    """Layers that take the same tensor, together."""
    with untouched(model), torch.no_grad(), recorded_calls(model, lambda name, _: name in layers) as calls:
        run_row(model, row)
    units: list[list[str]] = []
    inputs: list[torch.Tensor | None] = []
    for name in layers:
        x = calls[name][0].x if name in calls else None
        place = next(
            (at for at, other in enumerate(inputs) if x is not None and other is not None and same_tensor(x, other)),
            None,
        )
        if place is None:
            units.append([name])
            inputs.append(x)
        else:
            units[place].append(name)
    return units


def _blocks(units: Sequence[Sequence[str]], options: int) -> list[list[int]]:
    """Which units are in each block."""
    index = {unit[0]: place for place, unit in enumerate(units)}
    return [[index[name] for name in names] for names in split_blocks(dict.fromkeys(index, options))]


def _values(
    model: nn.Module,
    rounding: Rounding,
    units: list[list[str]],
    blocks: list[list[int]],
    criterion: str,
    pairs: bool,
    rows: list[Row],
    progress: bool,
) -> tuple[list[NDArray[np.float64]], Pairs]:
    together: Pairs = {}
    with tqdm(desc="Bits by layer", disable=not progress) as bar:
        if criterion == "fisher":
            values = by_fisher(model, rounding, units, rows, bar.update)
        elif criterion == "output":
            values = by_output(model, rounding, units, rows, bar.update)
        else:
            values, together = by_measured_loss(model, rounding, units, blocks, pairs, rows, bar.update)
    return [np.minimum.accumulate(value) for value in values], together  # more bits are not worth less


def _problem(
    units: list[list[str]],
    blocks: list[list[int]],
    costs: Mapping[str, list[int]],
    values: list[NDArray[np.float64]],
    together: Pairs,
) -> list[Block]:
    problem = []
    for block in blocks:
        place = {unit: at for at, unit in enumerate(block)}
        of_unit = [np.array([costs[name] for name in units[unit]], dtype=np.int64).sum(axis=0) for unit in block]
        tables = {(place[one], place[two]): table for (one, two), table in together.items() if one in place}
        problem.append(Block(of_unit, [values[unit] for unit in block], tables))
    return problem


def _widths(
    names: Iterable[str],
    units: list[list[str]],
    blocks: list[list[int]],
    choices: list[list[int]],
    offered: list[int],
) -> dict[str, int]:
    chosen = {
        unit: offered[option]
        for block, options in zip(blocks, choices, strict=True)
        for unit, option in zip(block, options, strict=True)
    }
    found = {name: chosen[place] for place, unit in enumerate(units) for name in unit}
    return {name: found[name] for name in names}


def _spent(widths: Mapping[str, int], costs: Mapping[str, list[int]], offered: list[int]) -> int:
    """The bits that layers take at some widths."""
    return sum(costs[name][offered.index(width)] for name, width in widths.items())


def _curve(problem: list[Block], weights: int, costs: Mapping[str, list[int]]) -> list[tuple[float, float]]:
    """What the best plans are predicted to cost, from the smallest widths to the largest."""
    least, most = (sum(cost[at] for cost in costs.values()) / weights for at in (0, -1))
    points = [least, *np.arange(math.ceil(least / _STEP) * _STEP, most, _STEP).tolist(), most]
    return [(point, allocate(problem, math.ceil(point * weights)).value) for point in points]


def _no_worse_than_uniform(
    plan: BitPlan,
    model: nn.Module,
    rounding: Rounding,
    costs: Mapping[str, list[int]],
    budget: int,
    weights: int,
    rows: list[Row],
) -> BitPlan:
    """The plan, or the widest uniform one within the budget if that has no larger loss on other data."""
    offered = list(rounding.widths)
    fitting = [width for at, width in enumerate(offered) if sum(cost[at] for cost in costs.values()) <= budget]
    uniform = dict.fromkeys(plan.layers, fitting[-1])
    with untouched(model):
        plan.held_out["dense"] = mean_loss(model, rows)
        for name, widths in (("planned", plan.layers), ("uniform", uniform)):
            with rounding.applied(widths):
                plan.held_out[name] = mean_loss(model, rows)
    if plan.held_out["planned"] < plan.held_out["uniform"]:
        return plan
    spent = _spent(uniform, costs, offered)
    plan.layers, plan.bits, plan.size, plan.uniform = uniform, spent / weights, spent // 8, True
    return plan
