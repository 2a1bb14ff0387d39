"""A ratio for each layer under one budget, by what tuning it gains on the calibration loss."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from tqdm.auto import tqdm

from peft_sgrq.base.prepare import prepare_base
from peft_sgrq.base.trainable_kernels import use_trainable_kernels
from peft_sgrq.choices import Budget, check_ratio
from peft_sgrq.config import SGRQConfig
from peft_sgrq.layer.base_layers import named_base_layers, refuse_adapters, scaled_weight_of
from peft_sgrq.passes.data import Batch, load_batches
from peft_sgrq.passes.processes import process_index
from peft_sgrq.selection.layer_saliency import LayerSaliency
from peft_sgrq.selection.layerwise.gains import Options, directions, estimate, halves, measure
from peft_sgrq.selection.layerwise.knapsack import MAX_COMBINATIONS, allocate
from peft_sgrq.selection.layerwise.probe import probing, split_rows, stack_rows
from peft_sgrq.selection.ratio import budget_in_scales, count_selected
from peft_sgrq.selection.saliency import Saliency

DEFAULT_RATIOS = (0.05, 0.1, 0.2, 0.4, 0.8)
METHODS = ("fisher", "measured")
_BLOCK = re.compile(r"(.*?\.\d+)\.")


@dataclass(frozen=True)
class LayerRatios:
    """Ratios by layer.

    Attributes:
        ratios (`dict[str, float]`): Module name -> ratio, as `Saliency.select(ratio=...)` and `config.ratio_pattern`
            take it.
        scales (`int`): How many scales they select.
        budget (`int`): How many scales were allowed.
        expected (`float`): The change of the loss the quadratic model expects of one step on them; negative is good.
        seconds (`float`): The wall time.
    """

    ratios: dict[str, float]
    scales: int
    budget: int
    expected: float
    seconds: float


def allocate_ratios(
    model: nn.Module,
    config: SGRQConfig,
    data: Any,
    saliency: Saliency,
    tokenizer: Any = None,
    *,
    ratios: Sequence[float] = DEFAULT_RATIOS,
    budget: Budget | None = None,
    method: Literal["fisher", "measured"] = "fisher",
    column: str | None = None,
    samples: int | None = 128,
    max_length: int = 512,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> LayerRatios:
    """The ratio of each layer, of a small set, that gains most under one budget.

    A step on the scales a layer would select at each ratio is tried, alone and together with other layers of its
    block, and of all combinations the best within the budget is found exactly. `gains.py` says what is tried and why,
    `knapsack.py` how the best is found. On the small models of docs/selection-results.md this did not beat one ratio
    for all layers: what one step gains says little about a long training.

    Args:
        model (`nn.Module`): The base model, without adapters. It is left as it was, bit for bit.
        config (`SGRQConfig`): Its `adapter_dtype` counts for a budget in bytes. Layers that its `ratio_pattern` names
            keep the ratio they have there, at the cost of the budget.
        data: As in `calibrate`; a few dozen sequences are enough. Give data of the task to come, with its labels
            where these are not the inputs, to get ratios for that task.
        saliency (`Saliency`): Which groups a layer selects first. Its layers are those that get ratios.
        tokenizer: The tokenizer for texts.
        ratios (`Sequence[float]`): What to choose from, each in (0, 1].
        budget (`float`, `int` or `str`): A share of all scales (`float`), a number of scales (`int`), or a size of the
            adapter's deltas such as `"20MB"`; `None` takes `config.budget`.
        method (`"fisher"` or `"measured"`): `"fisher"` estimates all terms from one backward pass over the data.
            `"measured"`, as in the paper, needs a forward pass over half of the data for each term, 560 for a block of
            7 layers at 5 ratios, and no assumption about the curvature.
        column, samples, max_length, batch_size, seed: As in `calibrate`.
        progress (`bool`): Show a progress bar.

    Returns:
        `LayerRatios`

    Raises:
        ValueError: If the smallest ratios exceed the budget, the data is empty or all padding, the model has an
            adapter, the saliency is that of another model, or an argument cannot be used.
        TypeError: If an argument has the wrong type.

    Example:
        ```py
        >>> found = allocate_ratios(model, config, batches, saliency, budget=0.1)
        >>> saliency.configure(config, ratio=found.ratios)
        ```
    """
    start = time.perf_counter()
    if method not in METHODS:
        raise ValueError(f"`method` is {method!r}, expected one of {METHODS}; fisher is the cheaper one.")
    offered = _check_ratios(ratios)
    refuse_adapters(model, "allocate ratios")
    use_trainable_kernels(model)
    prepare_base(model)
    saliency.check(model)
    check_affordable(config, saliency, offered, budget)  # before the data is read
    batches = load_batches(data, tokenizer, column, samples, max_length, batch_size, seed)
    ratios_by_layer = ratios_on(model, config, batches, saliency, offered, budget, method, batch_size, progress)
    return replace(ratios_by_layer, seconds=time.perf_counter() - start)


def ratios_on(
    model: nn.Module,
    config: SGRQConfig,
    batches: Iterable[Batch],
    saliency: Saliency,
    offered: Sequence[float] = DEFAULT_RATIOS,
    budget: Budget | None = None,
    method: str = "fisher",
    batch_size: int = 8,
    progress: bool = True,
) -> LayerRatios:
    """What [`allocate_ratios`] finds on batches of data, for a model and ratios that have been checked."""
    start = time.perf_counter()
    limit = check_affordable(config, saliency, offered, budget)
    rows = split_rows(batches)
    fixed = _fixed_counts(config, saliency)
    choices = {name: _choices(layer, offered, fixed.get(name)) for name, layer in saliency.layers.items()}
    modules = dict(named_base_layers(model))
    scaled_weights = {
        name: scaled_weight_of(name, modules[name], layer.group_size) for name, layer in saliency.layers.items()
    }
    options: dict[str, Options] = {}
    groups: dict[str, torch.Tensor] = {}
    for name, layer in saliency.layers.items():
        order = torch.argsort(layer.group_scores(), descending=True, stable=True)[: max(choices[name])]
        groups[name], ranks = order.sort()  # the groups ascending, and for each its place in the order of saliency
        counts = torch.tensor(list(choices[name]))
        masks = (ranks < counts.unsqueeze(1)).float().unsqueeze(2 - layer.unit.dim)
        options[name] = Options(masks.to(scaled_weights[name].device), (counts * layer.scales_per_group).numpy())
    sizes = {name: len(counts) for name, counts in choices.items()}
    blocks = split_blocks(sizes)
    first, second = halves(rows)
    passes = (
        len(second) if method == "fisher" else sum(_count_terms([sizes[name] for name in names]) for names in blocks)
    )
    with (
        tqdm(total=len(first) + passes, desc="Ratios by layer", disable=not progress or process_index() > 0) as bar,
        probing(model, scaled_weights, groups) as probe,
    ):
        steps = directions(probe, first, bar.update)
        if method == "fisher":
            problem = estimate(probe, steps, options, blocks, second, bar.update)
        else:
            problem = measure(probe, steps, options, blocks, stack_rows(second, batch_size), bar.update)
    solution = allocate(problem, limit)
    found = {
        name: list(choices[name].values())[option]
        for names, chosen in zip(blocks, solution.choices, strict=True)
        for name, option in zip(names, chosen, strict=True)
    }
    return LayerRatios(
        ratios={name: found[name] for name in saliency.layers},
        scales=solution.cost,
        budget=limit,
        expected=solution.value,
        seconds=time.perf_counter() - start,
    )


def check_affordable(
    config: SGRQConfig, saliency: Saliency, ratios: Sequence[float] = DEFAULT_RATIOS, budget: Budget | None = None
) -> int:
    """How many scales the budget allows; needs no data.

    Args:
        config, ratios, budget: As [`allocate_ratios`] takes them.
        saliency (`Saliency`): The layers. Their scores count only where `ratio_pattern` says `"knee"`; where they are
            still 0, the least that a knee can be is taken.

    Raises:
        ValueError: If the smallest ratios exceed it.
    """
    total = sum(layer.scales for layer in saliency.layers.values())
    limit = budget_in_scales(
        config.budget if budget is None else budget, total, 2 if config.adapter_dtype == "bfloat16" else 4
    )
    fixed = _fixed_counts(config, saliency)
    least = sum(
        fixed.get(name, count_selected(min(ratios), layer.selectable)) * layer.scales_per_group
        for name, layer in saliency.layers.items()
    )
    if least > limit:
        raise ValueError(
            f"`budget` allows {limit} scales, but the smallest ratio ({min(ratios):g}) takes {least} in all layers "
            "together; raise the budget, or offer smaller ratios."
        )
    return limit


def _count_terms(sizes: Sequence[int]) -> int:
    """How many terms a block has whose layers have so many options: one for each option, and each pair of them."""
    return sum(sizes) + (sum(sizes) ** 2 - sum(size * size for size in sizes)) // 2


def _check_ratios(ratios: Sequence[float]) -> list[float]:
    if not isinstance(ratios, Sequence) or not ratios or any(isinstance(ratio, str) for ratio in ratios):
        raise TypeError(f"`ratios` is {ratios!r}, expected some numbers in (0, 1] such as {DEFAULT_RATIOS}.")
    for ratio in ratios:
        check_ratio(ratio, "ratios")
    return sorted(set(ratios))


def _fixed_counts(config: SGRQConfig, saliency: Saliency) -> dict[str, int]:
    counts = saliency.counts(1.0, config.ratio_pattern)
    return {name: counts[name] for name in saliency.overruled(config.ratio_pattern)}


def _choices(layer: LayerSaliency, ratios: Sequence[float], fixed: int | None) -> dict[int, float]:
    """Count of groups -> ratio, ascending; ratios that select as many groups are one choice, the smallest of them."""
    if fixed is not None:
        return {fixed: fixed / layer.selectable}
    counts: dict[int, float] = {}
    for ratio in ratios:
        counts.setdefault(count_selected(ratio, layer.selectable), ratio)
    return counts


def split_blocks(options: Mapping[str, int]) -> list[list[str]]:
    """Layers by transformer block: those whose names agree up to the first number.

    A block with too many combinations to enumerate (a mixture of experts) is split by parent module, and layers of
    different parts are taken not to interact; if a part is still too large, its layers stand alone.

    Args:
        options (`Mapping[str, int]`): Name of each layer -> how many options it has.
    """
    blocks = _group(options, lambda name: match[1] if (match := _BLOCK.match(name)) else name)
    for by_key in (lambda name: name.rpartition(".")[0], lambda name: name):
        fits = [math.prod(options[name] for name in names) <= MAX_COMBINATIONS for names in blocks]
        parts = zip(blocks, fits, strict=True)
        blocks = [part for names, whole in parts for part in ([names] if whole else _group(names, by_key))]
    return blocks


def _group(names: Iterable[str], by_key: Callable[[str], str]) -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(by_key(name), []).append(name)
    return list(groups.values())
