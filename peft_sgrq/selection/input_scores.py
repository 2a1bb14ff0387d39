"""Scores from the inputs of layers: block by block where the model is a chain of blocks, else by full passes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from peft_sgrq.choices import size_in_bytes
from peft_sgrq.formats.scaled_weight import ScaledWeight
from peft_sgrq.passes.chain import Chain, NotAChainError, find_stack, layers_by_block
from peft_sgrq.passes.data import Batch
from peft_sgrq.passes.inputs import InputCollector, SharingBrokenError
from peft_sgrq.passes.padding import Padding
from peft_sgrq.passes.processes import gather
from peft_sgrq.passes.running import runner
from peft_sgrq.passes.statistics import InputStatistics

logger = logging.getLogger(__name__)

Score = Callable[[str, InputStatistics], torch.Tensor]


@torch.no_grad()
def collect_input_scores(
    model: nn.Module,
    scaled_weights: Mapping[str, ScaledWeight],
    batches: Sequence[Batch],
    score: Score,
    full: bool,
    memory_limit: int | str | None,
    bar: Any,
) -> dict[str, torch.Tensor]:
    """Scores of layers by criteria on the second moments of their inputs.

    Args:
        model (`nn.Module`): The model, in eval mode.
        scaled_weights (`dict[str, ScaledWeight]`): The layers by name, in the order of the model.
        batches (`Sequence[Batch]`): The data of this process; there may be none.
        score (`Callable`): `(name, statistics)` -> scores of a layer; called once the statistics are complete.
        full (`bool`): Whether whole Hessians are needed; diagonals need one plain pass.
        memory_limit (`int`, `str` or `None`): The most memory that Hessians may use at once in full passes.
        bar: A tqdm progress bar.
    """
    padding, run = Padding(model), runner(model)
    for share in (True, False):
        collection = _Collection(scaled_weights, batches, run, score, padding, full, share, bar)
        try:
            with padding.watching():
                stack = find_stack(model, scaled_weights) if full else None
                if stack is not None:
                    collection.block_by_block(*stack)
                rest = [name for name in scaled_weights if name not in collection.scores]
                if rest:
                    collection.passes(collection.plan(rest, memory_limit) if full else [rest])
            return {name: collection.scores[name] for name in scaled_weights}
        except SharingBrokenError:
            logger.warning("Layers do not share their inputs in all batches; starting again with statistics for each.")
    raise AssertionError("statistics that are not shared cannot break")


@dataclass
class _Collection:
    scaled_weights: Mapping[str, ScaledWeight]
    batches: Sequence[Batch]
    run: Callable[[Batch], Any]
    score: Score
    padding: Padding
    full: bool
    share: bool
    bar: Any
    scores: dict[str, torch.Tensor] = field(default_factory=dict)

    def block_by_block(self, stack_name: str, stack: nn.ModuleList) -> None:
        """Scores the layers in a stack of blocks; none of them if it turns out to be no chain."""
        inside = layers_by_block(self.scaled_weights, stack_name, len(stack))
        blocks = list(stack)[: len(inside)]
        chain, problem = None, None
        try:
            chain = Chain(blocks, self.run, self.batches) if self.batches else None
        except NotAChainError as error:
            problem = str(error)
        found = next((one for one in gather(problem) if one), None)  # of any process
        if found:
            logger.warning(
                "The blocks of %s cannot be run one by one (%s); statistics come from passes through the whole model "
                "instead, within `memory_limit`.",
                stack_name,
                found,
            )
            return
        self.bar.reset(total=len(blocks) * len(self.batches))
        for index, names in enumerate(inside):

            def run_block(number: int, index: int = index) -> None:
                chain.run_block(index, number)  # type: ignore[union-attr]

            self.scores |= self._scored(names, run_block)

    def passes(self, plan: Sequence[Sequence[str]]) -> None:
        """Scores layers by passes over all data, some layers in each."""
        self.bar.reset(total=len(plan) * len(self.batches))
        for names in plan:
            self.scores |= self._scored(names, lambda number: self.run(self.batches[number]))

    def plan(self, names: Sequence[str], memory_limit: int | str | None) -> list[list[str]]:
        """Which layers are scored in which pass, so that the Hessians of no pass exceed the limit."""
        if memory_limit is None:
            return [list(names)]
        limit = size_in_bytes(memory_limit, "memory_limit")
        probe = self._collector(names, full=False)
        for batch in self.batches[:1]:
            with probe.batch(batch):
                self.run(batch)
        shared = max(gather(list(probe.shared().values())), key=len)  # the same on all processes
        together = {name: group for group in shared for name in group}
        plan: list[list[str]] = []
        left = 0
        for group in dict.fromkeys(tuple(together.get(name, [name])) for name in names):
            features = self.scaled_weights[group[0]].in_features
            size = 4 * features * features
            if size > limit:
                raise ValueError(
                    f"`memory_limit` is {memory_limit!r}, expected at least {size} bytes: the Hessian of the "
                    f"{features} inputs of layer {group[0]!r} takes that; raise the limit, or use the criterion "
                    '"diag", which needs no Hessian.'
                )
            if size > left:
                plan.append([])
                left = limit
            plan[-1].extend(group)
            left -= size
        return plan

    def _collector(self, names: Iterable[str], full: bool) -> InputCollector:
        return InputCollector({name: self.scaled_weights[name] for name in names}, self.padding, full, self.share)

    def _scored(self, names: Sequence[str], run: Callable[[int], Any]) -> dict[str, torch.Tensor]:
        """The scores of layers that are called when `run` is given the number of each batch."""
        collector = self._collector(names, self.full)
        for number, batch in enumerate(self.batches):
            with collector.batch(batch):
                run(number)
            self.bar.update()
        collector.reduce()
        return {name: self.score(name, collector.statistics[name]) for name in names}
