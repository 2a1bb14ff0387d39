"""The first stage: the blocks of a model, one after another."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peft_sgrq.layer.linear import SGRQLinear
from peft_sgrq.passes.chain import Chain, NotAChainError
from peft_sgrq.passes.data import Batch
from peft_sgrq.passes.padding import Padding
from peft_sgrq.passes.running import runner
from peft_sgrq.passes.statistics import InputStatistics
from peft_sgrq.recovery.block import BlockError, BlockTraining, squared_error
from peft_sgrq.recovery.preservation import FROM_INPUTS, Pull, gradient_pulls, input_pulls, magnitude_pulls
from peft_sgrq.recovery.progress_file import ProgressFile
from peft_sgrq.recovery.reference import Reference

if TYPE_CHECKING:
    from peft_sgrq.recovery.settings import Settings

logger = logging.getLogger(__name__)


class BlockStage:
    """Recovers the blocks of a model in turn.

    Args:
        model (`nn.Module`): The quantized model with the adapter on it, in eval mode.
        layers (`dict[str, SGRQLinear]`): Its adapted layers by name.
        stack (`tuple[str, nn.ModuleList]` or `None`): The list of blocks, and its name.
        reference (`Reference`): The model before quantization.
        batches (`list[Batch]`): The data.
        adapter_name (`str`): Which adapter is trained.
        settings (`Settings`): How.
        file (`ProgressFile`): Which blocks are finished already.
        bar: A tqdm progress bar.

    Raises:
        ValueError: If the model or the reference is no chain of blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, SGRQLinear],
        stack: tuple[str, nn.ModuleList] | None,
        reference: Reference,
        batches: list[Batch],
        adapter_name: str,
        settings: Settings,
        file: ProgressFile,
        bar: Any,
    ) -> None:
        if stack is None:
            raise ValueError(
                "The model has no list of blocks, expected one to recover block by block; set `epochs=0` and "
                "`distill_steps` to train all scales together."
            )
        self._name, blocks = stack
        self._layers = [
            {name: layer for name, layer in layers.items() if name.startswith(f"{self._name}.{index}.")}
            for index in range(len(blocks))
        ]
        self._all = len(blocks)
        while not self._layers[-1]:
            self._layers.pop()
        outside = len(layers) - sum(map(len, self._layers))
        if outside:
            logger.warning(
                "%d adapted layers are in none of the blocks %s; only `distill_steps` trains them.",
                outside,
                self._name,
            )
        self._count = len(self._layers)
        self._model, self._blocks = model, list(blocks)[: self._count]
        self._reference, self._batches, self._settings = reference, batches, settings
        self._adapter_name, self._file, self._bar = adapter_name, file, bar
        self._padding = Padding(reference.model)
        self._put_back: list[str] = []

    def run(self) -> list[BlockError]:
        """Trains the blocks that are not finished, and returns the errors of all."""
        reference_blocks = self._reference.blocks(self._all)[: self._count]
        self._counted = [self._padding.counted(reference_blocks[0], batch) for batch in self._batches]
        pulls = self._pulls_of_gradients(reference_blocks)
        with torch.no_grad(), self._padding.watching():
            ours = self._chain("model", self._blocks, runner(self._model))
            theirs = self._chain("reference", reference_blocks, self._reference.run)
        self._release(*self._layers)
        steps = self._settings.epochs * len(self._batches)
        self._bar.reset(total=steps * (self._count - len(self._file.blocks)))
        for index in range(self._count):
            self._recover(index, ours, theirs, pulls)
        if self._put_back:
            logger.warning(
                "%d blocks did not get better and were left as they were (the first: %s); lower `learning_rate`.",
                len(self._put_back),
                self._put_back[0],
            )
        return self._file.blocks

    def _chain(self, what: str, blocks: Sequence[nn.Module], run: Any) -> Chain:
        try:
            return Chain.checked(blocks, run, self._batches)
        except NotAChainError as error:
            raise ValueError(
                f"The blocks {self._name!r} of the {what} cannot be run one by one ({error}), expected each to take "
                "the hidden states of the one before; set `epochs=0` and `distill_steps` to train all scales together."
            ) from error

    def _recover(self, index: int, ours: Chain, theirs: Chain, pulls: Mapping[str, Pull]) -> None:
        start = time.perf_counter()
        layers = self._layers[index]
        deltas = {name: layer.delta(self._adapter_name) for name, layer in layers.items()}
        finished = index < len(self._file.blocks)
        augmented = self._settings.augmented and not finished
        with torch.no_grad(), ExitStack() as stack:
            inputs = {} if finished else self._watch_inputs(list(layers), stack)
            targets, expected = self._targets(index, ours, theirs, augmented, inputs)
        if finished:
            for name, delta in deltas.items():
                delta.weight.data.copy_(self._file.deltas[name])
        else:
            training = BlockTraining(
                lambda number: ours.call(index, number, ours.hidden(number)),
                targets,
                self._counted,
                list(deltas.values()),
                [
                    (pull, layers[name].scaled_weight.unit.dim)
                    for name, pull in self._pulls(layers, inputs, pulls).items()
                ],
                self._settings.preservation,
            )
            before = self._error(index, ours, theirs)
            if not training.train(
                self._settings.epochs, self._settings.learning_rate, self._settings.seed + index, self._bar.update
            ):
                self._put_back.append(f"{self._name}.{index}")
        after = self._error(index, ours, theirs, advance=True)
        self._release(layers)
        if not finished:
            seconds = time.perf_counter() - start
            error = BlockError(f"{self._name}.{index}", before / expected, after / expected, seconds)
            self._bar.set_postfix_str(f"{error.name}: {error.before:.4g} -> {error.after:.4g}")
            self._file.add(error, deltas)

    @staticmethod
    def _release(*blocks: Mapping[str, SGRQLinear]) -> None:
        """Frees what layers keep for inference: of a dense layer its scaled weight."""
        for layers in blocks:
            for layer in layers.values():
                layer.forget()

    def _targets(
        self, index: int, ours: Chain, theirs: Chain, augmented: bool, inputs: Mapping[str, Any]
    ) -> tuple[list[torch.Tensor], float]:
        """Runs the reference's block; what the quantized one is to give, by batch, and its squared norm `|f(X)|^2`."""
        targets, norm = [], 0.0
        for number, batch in enumerate(self._batches):
            hidden, before = ours.hidden(number), theirs.hidden(number)
            on_ours = theirs.call(index, number, hidden.to(before.device, before.dtype)) if augmented else None
            for statistics in inputs.values():
                statistics.batch = batch
            theirs.run_block(index, number)
            for statistics in inputs.values():
                statistics.batch = None
            target = theirs.hidden(number)
            norm += float(squared_error(target, torch.zeros_like(target), self._counted[number].to(target.device)))
            if on_ours is not None:
                target = (target + on_ours) / 2
            targets.append(target.to(hidden.device))
        return targets, norm

    @torch.no_grad()
    def _error(self, index: int, ours: Chain, theirs: Chain, advance: bool = False) -> float:
        """`|f_q(X_q) - f(X)|^2` over all batches; `advance` makes the outputs the next block's inputs."""
        total = 0.0
        for number, counted in enumerate(self._counted):
            if advance:
                ours.run_block(index, number)
                output = ours.hidden(number)
            else:
                output = ours.call(index, number, ours.hidden(number))
            target = theirs.hidden(number).to(output.device)
            total += float(squared_error(output, target, counted.to(output.device)))
        return total

    # preservation

    def _pulls_of_gradients(self, reference_blocks: Sequence[nn.Module]) -> dict[str, Pull]:
        settings, file = self._settings, self._file
        if not settings.preservation or settings.importance != "fisher":
            return {}
        scaled_weights = {name: layer.scaled_weight for block in self._layers for name, layer in block.items()}
        if not file.pulls:
            self._bar.reset(total=len(self._batches))
            file.pulls = gradient_pulls(
                self._reference, reference_blocks, scaled_weights, self._batches, self._bar.update
            )
            file.save()
        return {name: pull.to(scaled_weights[name].device) for name, pull in file.pulls.items()}

    def _watch_inputs(self, names: Sequence[str], stack: ExitStack) -> dict[str, _Inputs]:
        """Statistics of what the reference's layers get while the context is open."""
        settings = self._settings
        if not settings.preservation or settings.importance not in FROM_INPUTS:
            return {}
        found = {}
        for name in names:
            module = self._reference.layers[name]
            found[name] = _Inputs(self._padding, full=settings.importance != "diag")
            stack.callback(module.register_forward_pre_hook(found[name].take).remove)
        return found

    def _pulls(
        self, layers: Mapping[str, SGRQLinear], inputs: Mapping[str, _Inputs], of_gradients: Mapping[str, Pull]
    ) -> dict[str, Pull]:
        settings = self._settings
        if not settings.preservation:
            return {}
        if settings.importance == "fisher":
            return {name: of_gradients[name] for name in layers}
        scaled_weights = {name: layer.scaled_weight for name, layer in layers.items()}
        if settings.importance == "magnitude":
            return magnitude_pulls(self._reference, scaled_weights)
        statistics = {
            name: one.statistics or InputStatistics(scaled_weights[name].in_features, settings.importance != "diag")
            for name, one in inputs.items()
        }
        return input_pulls(self._reference, scaled_weights, statistics, settings.importance)


class _Inputs:
    """Statistics of the inputs of one layer."""

    def __init__(self, padding: Padding, full: bool) -> None:
        self.batch: Batch | None = None
        self.statistics: InputStatistics | None = None
        self._padding, self._full = padding, full

    def take(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.batch is None:
            return
        x = self._padding.remove(args[0], module, self.batch)
        if self.statistics is None:
            self.statistics = InputStatistics(x.shape[-1], self._full, x.device)
        self.statistics.update(x)
