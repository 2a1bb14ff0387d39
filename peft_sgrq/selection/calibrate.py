"""Calibration: how salient the columns of a model are on some data."""

from __future__ import annotations

import copy
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from peft_sgrq.adapter.targets import find_targets, name_targets
from peft_sgrq.base.prepare import prepare_base
from peft_sgrq.base.trainable_kernels import use_trainable_kernels
from peft_sgrq.choices import CUSTOM, DEFAULT_CRITERION, WITHOUT_DATA, check_criterion, size_in_bytes
from peft_sgrq.config import SGRQConfig
from peft_sgrq.formats.compressed_tensors.weight import keep_compressed
from peft_sgrq.formats.scaled_weight import ScaledWeight
from peft_sgrq.layer.base_layers import refuse_adapters
from peft_sgrq.passes.chain import find_stack
from peft_sgrq.passes.data import Batch, load_batches
from peft_sgrq.passes.processes import gather, process_index
from peft_sgrq.passes.reference import Reference
from peft_sgrq.passes.running import longest
from peft_sgrq.passes.statistics import InputStatistics
from peft_sgrq.passes.untouched import untouched
from peft_sgrq.selection.criteria import DIAGONAL, GRADIENTS, HESSIAN, Criterion, LayerStatistics, weight_scores
from peft_sgrq.selection.gradient_scores import collect_gradient_scores
from peft_sgrq.selection.input_scores import collect_input_scores
from peft_sgrq.selection.layer_saliency import LayerSaliency
from peft_sgrq.selection.layerwise.allocate_ratios import check_affordable, ratios_on
from peft_sgrq.selection.saliency import Saliency

logger = logging.getLogger(__name__)


def calibrate(
    model: nn.Module,
    config: SGRQConfig,
    data: Any = None,
    tokenizer: Any = None,
    *,
    criterion: str | Criterion | None = None,
    column: str | None = None,
    samples: int | None = 128,
    max_length: int = 512,
    batch_size: int = 8,
    original: nn.Module | str | os.PathLike[str] | None = None,
    memory_limit: int | str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Saliency:
    """Scores the columns of the layers a config targets on calibration data, and fills the config's selection.

    Call it before `get_peft_model`, on the quantized model, in train or eval mode. The model is left as it was, bit
    for bit, also when interrupted; only bitsandbytes' repacking of 4-bit layers on CPUs stays switched off, which
    `get_peft_model` does, too. Transformer blocks are processed one after another, so that memory holds the model, the
    statistics of one block and the hidden states of the data, however deep the model is.

    With several processes (torch.distributed, accelerate) each processes its part of the data; the statistics are
    summed, and all processes select the same.

    Args:
        model (`nn.Module`): The base model, without adapters.
        config (`SGRQConfig`): What is targeted, the ratio and the criterion. Its `selection`, `criterion` and
            `base_fingerprint` are filled in place; the rest stays.
        data: A `DataLoader` (or other batches: mappings with `input_ids` `[B, T]`), a list of texts, or a
            `datasets.Dataset`. Tokens with `attention_mask` 0 do not count. May be `None` if the criterion needs no
            data.
        tokenizer: The tokenizer for texts.
        criterion (`str`, `Callable` or `None`): Replaces the config's; `None` in both is `"diag"`. A function is given
            a [`LayerStatistics`] with the whole Hessian and returns scores >= 0 of each weight,
            `[out_features, in_features]`, or of each column, `[in_features]` (each row in a row format).
        column (`str` or `None`): Column of the dataset with texts, chats or token ids; `None` takes the first it has
            of `input_ids`, `text` and `messages`.
        samples (`int` or `None`): The most sequences to use; `None` for all.
        max_length (`int`): The most tokens of a text to use.
        batch_size (`int`): Texts in a batch; a DataLoader has its own.
        original (`nn.Module`, `str` or `None`): For the criterion `"error"`: the model before quantization, or its
            checkpoint, which is read block by block.
        memory_limit (`int`, `str` or `None`): The most memory that Hessians may use at once, in bytes or as `"4GB"`,
            in models that are not a chain of blocks, which then need several forward passes over the data. `None` for
            no limit.
        seed (`int`): Seed for choosing samples, and for the criterion `"random"`.
        progress (`bool`): Show a progress bar.

    Returns:
        `Saliency`: The scores of all columns; other ratios can be selected from it without calibrating again.

    Raises:
        ValueError: If the data is empty or all padding, the dataset has no such column, the model is on the meta
            device, has an adapter or no targeted layer, or activations are not finite.
        TypeError: If an argument has the wrong type.

    Example:
        ```py
        >>> config = SGRQConfig(ratio="knee", task_type="CAUSAL_LM")
        >>> saliency = peft_sgrq.calibrate(model, config, texts, tokenizer=tokenizer)
        >>> trainer = SFTTrainer(model, peft_config=config, train_dataset=dataset)
        ```
    """
    start = time.perf_counter()
    if isinstance(model, DistributedDataParallel):
        model = model.module
    refuse_adapters(model, "calibrate")
    chosen = criterion if criterion is not None else config.criterion or DEFAULT_CRITERION
    if not callable(chosen):
        check_criterion(chosen)
    name = f"{CUSTOM}{getattr(chosen, '__name__', type(chosen).__name__)}" if callable(chosen) else chosen
    if name == "error" and original is None:
        raise ValueError(
            "The criterion 'error' compares with the weights before quantization, found no `original`; give that "
            "model, or its checkpoint."
        )
    if memory_limit is not None:
        size_in_bytes(memory_limit, "memory_limit")
    use_trainable_kernels(model)
    scaled_weights = _targets(model, config)
    prepare_base(model)
    unscored = {layer: LayerSaliency.of(weight, torch.zeros(weight.lines)) for layer, weight in scaled_weights.items()}
    saliency = Saliency(unscored, name)
    _check_ratio_early(config, saliency)
    batches: list[Batch] = []
    with untouched(model), tqdm(desc="Calibrating", disable=not progress or process_index() > 0) as bar:
        keep_compressed(model)  # its hook would decompress all layers at the first forward pass
        if name not in WITHOUT_DATA or data is not None:
            batches = load_batches(data, tokenizer, column, samples, longest(model, max_length), batch_size, seed)
        saliency.tokens = sum(gather(sum(int(batch.counted.sum()) for batch in batches)))
        loaded = time.perf_counter()
        if name in WITHOUT_DATA:
            scores = {layer: weight_scores(layer, weight, name, seed) for layer, weight in scaled_weights.items()}
        else:
            scores = _scores(model, scaled_weights, batches, chosen, original, memory_limit, saliency.tokens, bar)
    saliency.layers = {layer: replace(found, scores=scores[layer]) for layer, found in unscored.items()}
    saliency.seconds = {"data": loaded - start, "scores": time.perf_counter() - loaded}
    if config.ratio == "layerwise":
        allocated = ratios_on(model, config, batches, saliency, progress=progress)
        saliency.ratios = gather(allocated.ratios)[0]
        saliency.seconds["ratios"] = allocated.seconds
    saliency.configure(config)
    saliency.seconds["total"] = time.perf_counter() - start
    return saliency


def _check_ratio_early(config: SGRQConfig, saliency: Saliency) -> None:
    """Rejects an impossible ratio before the long computation, and warns of one that selects nothing."""
    if config.ratio == 1 and not config.ratio_pattern:
        logger.warning(
            "The config's `ratio` is 1.0, at which every scale is trained whatever its saliency; set another such as "
            "0.4, now or later by `saliency.configure(config, ratio=0.4)`."
        )
    if config.ratio == "layerwise":
        check_affordable(config, saliency)
    else:
        saliency.configure(copy.copy(config))


def _scores(
    model: nn.Module,
    scaled_weights: Mapping[str, ScaledWeight],
    batches: list[Batch],
    chosen: str | Criterion,
    original: Any,
    memory_limit: int | str | None,
    tokens: int,
    bar: Any,
) -> dict[str, torch.Tensor]:
    """Scores of the layers by a criterion that needs data."""
    if isinstance(chosen, str) and chosen in GRADIENTS:
        found = collect_gradient_scores(model, scaled_weights, batches, GRADIENTS[chosen], tokens, bar)
        return {layer: _checked(layer, values) for layer, values in found.items()}
    score = _scorer(model, scaled_weights, chosen, original)
    full = callable(chosen) or chosen not in DIAGONAL
    scores = collect_input_scores(model, scaled_weights, batches, score, full, memory_limit, bar)
    if chosen == "error" and not any(bool(values.any()) for values in scores.values()):
        raise ValueError(
            "The criterion 'error' found no difference between the model and `original`, expected the weights before "
            "quantization; give the model that was quantized."
        )
    return scores


def _targets(model: nn.Module, config: SGRQConfig) -> dict[str, ScaledWeight]:
    config = name_targets(model, copy.deepcopy(config))
    scaled_weights = find_targets(model, config)
    if not scaled_weights:
        raise ValueError(
            f"The model has none of the layers that the config targets (target_modules={config.target_modules!r}), "
            "expected at least one; check the names."
        )
    for name, scaled_weight in scaled_weights.items():
        if scaled_weight.device.type == "meta":
            raise ValueError(
                f"Layer {name!r} has no weights yet (it is on the meta device), expected a model with weights to "
                "calibrate; load them first."
            )
    return scaled_weights


def _scorer(
    model: nn.Module, scaled_weights: Mapping[str, ScaledWeight], chosen: str | Criterion, original: Any
) -> Callable[[str, InputStatistics], torch.Tensor]:
    """The scores of a layer from its name and the statistics of its inputs, checked."""
    if isinstance(chosen, str) and chosen.startswith(CUSTOM):
        raise ValueError(
            f"`criterion` is {chosen!r}, a function that was given to an earlier calibration, expected the function "
            "itself; give it as `criterion=` again."
        )
    criterion = (HESSIAN | DIAGONAL)[chosen] if isinstance(chosen, str) else chosen
    reference = None
    if original is not None and (chosen == "error" or callable(chosen)):
        stack = find_stack(model, scaled_weights)
        reference = Reference(original, model, stack and stack[0], scaled_weights, "original")

    def score(name: str, inputs: InputStatistics) -> torch.Tensor:
        scaled_weight = scaled_weights[name]
        if not inputs.tokens:
            logger.warning("No calibration token came to layer %s; all of its columns score 0.", name)
        elif not bool(torch.isfinite(inputs.diagonal).all()):
            raise ValueError(
                f"The inputs of layer {name!r} are not finite on the calibration data, expected finite activations; "
                "check the model, or load it in bfloat16 or float32."
            )
        weight = scaled_weight.dequantize(scaled_weight.scales(), torch.float32)  # (N, K)
        before = None if reference is None else reference.weight(name, scaled_weight)
        scores = criterion(LayerStatistics(name, weight, inputs, before))
        whole = (scaled_weight.out_features, scaled_weight.in_features)
        summed = (scaled_weight.lines,)
        if not isinstance(scores, torch.Tensor) or tuple(scores.shape) not in (whole, summed):
            raise ValueError(
                f"The criterion returned {tuple(scores.shape) if isinstance(scores, torch.Tensor) else scores!r} for "
                f"layer {name!r}, expected a tensor of shape {whole} or {summed}; correct the function."
            )
        return _checked(name, scaled_weight.unit.sum_to_lines(scores))

    return score


def _checked(name: str, scores: torch.Tensor) -> torch.Tensor:
    if not (torch.isfinite(scores).all() and (scores >= 0).all()):
        raise ValueError(
            f"The scores of layer {name!r} are negative, NaN or infinite, expected finite numbers >= 0; check the "
            "criterion and the model's activations on this data."
        )
    return scores
