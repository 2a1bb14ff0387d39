"""`recover`: an adapter that gives a quantized model back what quantization took."""

from __future__ import annotations

import copy
import os
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from tqdm.auto import tqdm

from peft_sgrq.config import SGRQConfig
from peft_sgrq.formats.registry import is_quantized
from peft_sgrq.layer.base_layers import refuse_adapters
from peft_sgrq.layer.linear import SGRQLinear
from peft_sgrq.passes.chain import find_stack
from peft_sgrq.passes.data import load_batches
from peft_sgrq.passes.processes import copy_from_first, gather, process_count, process_index, together
from peft_sgrq.passes.reference import Reference, check_tokenizer, read_config, refuse_unquantized
from peft_sgrq.passes.running import longest
from peft_sgrq.passes.untouched import untouched
from peft_sgrq.recovery.block_by_block import BlockByBlock
from peft_sgrq.recovery.distillation import Distillation, Distilling
from peft_sgrq.recovery.job import Job, Settings
from peft_sgrq.recovery.progress import BlockError, ProgressFile, check_progress_file, identity


@dataclass
class Recovery:
    """What [`recover`] returns.

    Attributes:
        model (`PeftModel`): The quantized model with the adapter on it.
        blocks (`list[BlockError]`): How far each block's outputs were off before and after, and the seconds it took.
        distillation (`Distillation` or `None`): How far next-token probabilities were off before and after the second
            stage; `None` without one.
        seconds (`float`): The wall time of all.
    """

    model: PeftModel
    blocks: list[BlockError] = field(default_factory=list)
    distillation: Distillation | None = None
    seconds: float = 0.0


def recover(
    model: nn.Module,
    reference: nn.Module | str | os.PathLike[str],
    data: Any,
    config: SGRQConfig | None = None,
    tokenizer: Any = None,
    *,
    adapter_name: str = "default",
    epochs: int = 5,
    learning_rate: float = 3e-2,
    augmented: bool = True,
    preservation: float = 0.0,
    importance: str = "fisher",
    distill_steps: int = 0,
    distill_learning_rate: float = 2e-2,
    column: str | None = None,
    samples: int | None = 128,
    max_length: int = 512,
    batch_size: int = 8,
    seed: int = 0,
    progress_file: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Recovery:
    """Trains the scales of a quantized model so that it computes what the model did before quantization.

    Block by block, each transformer block's outputs are matched to those of the reference's block; the inputs of a
    block come from the recovered blocks before it. A second stage may then train all scales together on the
    reference's next-token probabilities. Codes and zero points stay, and no scale changes its sign. The result is an
    ordinary SGRQ adapter: save it, merge it (exactly), go on training it, or start another from it with
    `SGRQConfig(init_weights=path)`.

    With several processes (torch.distributed, accelerate) each has a part of the data, and a step takes a batch of
    each: `n` processes give what one does with `n` times the `batch_size`. All of them end with the same adapter.

    Memory holds the model, one block of the reference, if that is a checkpoint, and the hidden states of the data at
    one block: the inputs of the quantized block and its targets (with `augmented` also `f(X)` itself).

    Args:
        model (`nn.Module`): The quantized model, without adapters.
        reference (`nn.Module`, `str` or path): The model before quantization, or its checkpoint, which is read
            block by block and never whole in memory.
        data: Calibration data, as in [`calibrate`].
        config (`SGRQConfig` or `None`): What to train; `None` is `SGRQConfig()`, all scales.
        tokenizer: The tokenizer for texts.
        adapter_name (`str`): Name of the adapter.
        epochs (`int`): How often each block sees the data; 0 leaves the first stage out.
        learning_rate (`float`): That of the first stage. Deltas are relative changes. The default is for bases of few
            bits; where blocks do not get better, a warning says so, and a smaller one helps.
        augmented (`bool`): Match `f(X_q)` as well as `f(X)`: what the reference's block makes of the inputs that the
            quantized block really gets.
        preservation (`float`): How much salient weights are held at their values before quantization, relative to the
            error of the outputs; 0 turns it off.
        importance (`str`): Which weights are salient there: `"fisher"` by squared gradients of the reference's loss,
            `"magnitude"` all alike.
        distill_steps (`int`): Steps of the second stage, a batch of each process each.
        distill_learning_rate (`float`): That of the second stage.
        column, samples, max_length, batch_size: How the data is read, as in [`calibrate`].
        seed (`int`): Seed for choosing samples and ordering batches.
        progress_file (`str`, path or `None`): A file that keeps finished blocks. An interrupted recovery goes on from
            it when it is called again with the same arguments. Delete it when the adapter is saved. Of several
            processes the first one keeps it.
        progress (`bool`): Show a progress bar, with the block's error before and after.

    Returns:
        `Recovery`: The model with the adapter, and the errors by block.

    Raises:
        ValueError: If the model is not quantized, so that its weights are those of the reference; if the reference is
            not that of the model (layers, shapes, tensors, vocabulary, tokenizer), the data is empty or leaves a
            process without any, the blocks cannot be run one by one, or the progress file is another recovery's. The
            model is as it was then, also when interrupted.
        TypeError: If an argument has the wrong type.

    Source: block-wise matching with preservation, Cao and Aref 2025 (arXiv 2504.13932), on ApiQ (Liao et al. 2024,
    arXiv 2402.05147); scales alone, and the second stage, EfficientQAT (Chen et al. 2024, arXiv 2407.11062).

    Example:
        ```py
        >>> recovery = peft_sgrq.recover(model, "org/model", texts, tokenizer=tokenizer)
        >>> recovery.model.merge_and_unload().save_pretrained("recovered")
        ```
    """
    start = time.perf_counter()
    settings = Settings(
        epochs=epochs,
        learning_rate=learning_rate,
        augmented=augmented,
        preservation=preservation,
        importance=importance,
        distill_steps=distill_steps,
        distill_learning_rate=distill_learning_rate,
        seed=seed,
    )
    settings.check()
    config = _checked_config(config)
    refuse_adapters(model, "recover")
    if torch.is_inference_mode_enabled():
        raise ValueError("Recovery needs gradients, found `torch.inference_mode()`; call it outside of that.")
    with together():
        if progress_file is not None and process_index() == 0:
            check_progress_file(progress_file)
    if isinstance(reference, (str, os.PathLike)):
        read_config(os.fspath(reference))
    check_tokenizer(tokenizer, reference)
    batches = load_batches(data, tokenizer, column, samples, longest(model, max_length), batch_size, seed)
    if not all(gather(len(batches))):
        raise ValueError(
            f"The data has fewer sequences than there are processes ({process_count()}), expected at least one for "
            "each; give more data, or start fewer processes."
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("The model is on the meta device, expected one with weights; load them first.")
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    peft_model = get_peft_model(model, config, adapter_name)
    recovery = Recovery(peft_model)
    try:
        layers = {name: module for name, module in model.named_modules() if isinstance(module, SGRQLinear)}
        scaled_weights = {name: layer.scaled_weight for name, layer in layers.items()}
        stack = find_stack(model, layers)
        before = Reference(reference, model, stack and stack[0], scaled_weights)
        with (
            untouched(model),
            untouched(before.model),
            tqdm(desc="Recovering", disable=not progress or process_index() > 0) as bar,
        ):
            if not any(map(is_quantized, model.modules())):
                refuse_unquantized(before, scaled_weights)
            deltas = {name: layer.delta(adapter_name) for name, layer in layers.items()}
            copy_from_first(delta.weight.detach() for delta in deltas.values())  # they may begin at random
            job = Job(model, layers, stack, deltas, before, batches, settings, bar)
            if epochs:
                made_with = identity(job, peft_model.peft_config[adapter_name])
                recovery.blocks = BlockByBlock(job, ProgressFile(progress_file, made_with)).run()
            if distill_steps:
                recovery.distillation = Distilling(job).train()
    except BaseException:
        peft_model.unload()
        for parameter, required in trainable.items():
            parameter.requires_grad_(required)
        raise
    recovery.seconds = time.perf_counter() - start
    return recovery


def _checked_config(config: SGRQConfig | None) -> SGRQConfig:
    if config is None:
        return SGRQConfig()
    if not isinstance(config, SGRQConfig):
        raise TypeError(f"`config` is a {type(config).__name__}, expected an SGRQConfig, or None for all scales.")
    if config.modules_to_save or config.trainable_token_indices:
        raise ValueError(
            "The config has `modules_to_save` or `trainable_token_indices`, expected scales alone: recovery trains "
            "nothing else; leave them out, and train them with the task."
        )
    return copy.deepcopy(config)  # PEFT writes the name of the base into it
