"""The first stage: the blocks of a model, one after another."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from peft_sgrq.passes.chain import Chain, NotAChainError, layers_by_block
from peft_sgrq.passes.padding import Padding
from peft_sgrq.passes.processes import gather, together
from peft_sgrq.passes.running import runner
from peft_sgrq.recovery.block_training import squared_error, train_block
from peft_sgrq.recovery.job import Job
from peft_sgrq.recovery.preservation import Pull, preservation_terms
from peft_sgrq.recovery.progress import BlockError, ProgressFile

logger = logging.getLogger(__name__)


class BlockByBlock:
    """Recovers the blocks of a model in turn.

    Args:
        job (`Job`): The recovery.
        file (`ProgressFile`): Which blocks are finished already.

    Raises:
        ValueError: If the model or the reference is no chain of blocks.
    """

    def __init__(self, job: Job, file: ProgressFile) -> None:
        if job.stack is None:
            raise ValueError(
                "The model has no list of blocks, expected one to recover block by block; set `epochs=0` and "
                "`distill_steps` to train all scales together."
            )
        self._job, self._file = job, file
        self._name, blocks = job.stack
        names = layers_by_block(job.layers, self._name, len(blocks))
        outside = len(job.layers) - sum(map(len, names))
        if outside:
            logger.warning(
                "%d adapted layers are in none of the blocks %s; only `distill_steps` trains them.",
                outside,
                self._name,
            )
        self._names, self._blocks = names, list(blocks)[: len(names)]
        self._padding = Padding(job.reference.model)
        self._put_back: list[str] = []

    def run(self) -> list[BlockError]:
        """Trains the blocks that are not finished, and returns the errors of all."""
        job, count = self._job, len(self._blocks)
        reference_blocks = job.reference.blocks(len(job.stack[1]))[:count]  # type: ignore[index]
        self._counted = [self._padding.counted(reference_blocks[0], batch) for batch in job.batches]
        self._weigh(reference_blocks)
        with torch.no_grad(), self._padding.watching(), together():
            self._ours = self._chain("model", self._blocks, runner(job.model))
            self._theirs = self._chain("reference", reference_blocks, job.reference.run)
        self._check_stream()
        self._release([name for names in self._names for name in names])
        steps = job.settings.epochs * max(gather(len(job.batches)))
        job.bar.reset(total=steps * (count - len(self._file.blocks)))
        for index in range(count):
            self._recover(index)
        if self._put_back:
            logger.warning(
                "%d blocks did not get better and were left as they were (the first: %s); lower `learning_rate`.",
                len(self._put_back),
                self._put_back[0],
            )
        return self._file.blocks

    def _weigh(self, reference_blocks: Sequence[nn.Module]) -> None:
        """Finds what preservation weighs, if it is asked for and not in the file."""
        job = self._job
        if job.settings.preservation and not self._file.pulls:
            names = [name for names in self._names for name in names]
            weights = {name: job.layers[name].scaled_weight for name in names}
            job.bar.reset(total=len(job.batches))
            self._file.pulls = preservation_terms(
                job.settings.importance, job.reference, reference_blocks, weights, job.batches, job.bar.update
            )
            self._file.save()

    def _chain(self, what: str, blocks: Sequence[nn.Module], run: Any) -> Chain:
        try:
            return Chain(blocks, run, self._job.batches)
        except NotAChainError as error:
            raise ValueError(
                f"The blocks {self._name!r} of the {what} cannot be run one by one ({error}), expected each to take "
                "the hidden states of the one before; set `epochs=0` and `distill_steps` to train all scales together."
            ) from error

    @torch.no_grad()
    def _check_stream(self) -> None:
        """Refuses a reference whose hidden states are others from the start: of another model, or not rotated alike.

        Quantizing an embedding to 2 bits changes it by less than its own length; another basis does not.
        """
        different = length = 0.0
        for number, counted in enumerate(self._counted):
            ours, theirs = self._ours.hidden(number), self._theirs.hidden(number)
            different += float(squared_error(ours, theirs, counted)) if ours.shape == theirs.shape else float("inf")
            length += float(squared_error(theirs, torch.zeros_like(theirs), counted))
        if sum(gather(different)) > sum(gather(length)):
            raise ValueError(
                "The first block of the reference takes other hidden states than that of the model, expected the same "
                "but for what quantization took; give the model that was quantized, rotated if that one was."
            )

    def _recover(self, index: int) -> None:
        start = time.perf_counter()
        job, name, names = self._job, f"{self._name}.{index}", self._names[index]
        finished = index < len(self._file.blocks)
        targets, expected = self._targets(index, job.settings.augmented and not finished)
        if finished:
            for layer in names:
                job.deltas[layer].weight.data.copy_(self._file.deltas[layer])
        else:
            before = self._error(index)
            better = train_block(
                lambda number: self._ours.call(index, number, self._ours.hidden(number)),
                targets,
                self._counted,
                [job.deltas[layer] for layer in names],
                [self._pull(layer) for layer in names] if job.settings.preservation else [],
                job.settings,
                job.settings.seed + index,
                job.bar.update,
            )
            if not better:
                self._put_back.append(name)
        after = self._error(index, advance=True)
        self._release(names)
        if not finished:
            error = BlockError(name, before / expected, after / expected, time.perf_counter() - start)
            job.bar.set_postfix_str(f"{name}: {error.before:.4g} -> {error.after:.4g}")
            self._file.add(error, {layer: job.deltas[layer] for layer in names})

    def _pull(self, layer: str) -> tuple[Pull, int]:
        weight = self._job.layers[layer].scaled_weight
        return Pull(*(part.to(weight.device) for part in self._file.pulls[layer])), weight.unit.dim

    def _release(self, names: Sequence[str]) -> None:
        """Frees what layers keep for inference, such as the scaled weight of a dense layer."""
        for name in names:
            self._job.layers[name].forget()

    @torch.no_grad()
    def _targets(self, index: int, augmented: bool) -> tuple[list[torch.Tensor], float]:
        """Runs the reference's block; the targets of the quantized one, by batch, and `|f(X)|^2` over all batches."""
        targets, norm = [], 0.0
        for number, counted in enumerate(self._counted):
            hidden, before = self._ours.hidden(number), self._theirs.hidden(number)
            on_ours = self._theirs.call(index, number, hidden.to(before.device, before.dtype)) if augmented else None
            self._theirs.run_block(index, number)
            target = self._theirs.hidden(number)
            norm += float(squared_error(target, torch.zeros_like(target), counted))
            targets.append((target if on_ours is None else (target + on_ours) / 2).to(hidden.device))
        return targets, sum(gather(norm))

    @torch.no_grad()
    def _error(self, index: int, advance: bool = False) -> float:
        """`|f_q(X_q) - f(X)|^2` over all batches; `advance` makes the outputs the next block's inputs."""
        found = 0.0
        for number, counted in enumerate(self._counted):
            if advance:
                self._ours.run_block(index, number)
            hidden = self._ours.hidden(number)
            output = hidden if advance else self._ours.call(index, number, hidden)
            found += float(squared_error(output, self._theirs.hidden(number), counted))
        return sum(gather(found))
