"""Double quantization: which layers of a model have nested scales, and what un-nesting them cost."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from peft_sgrq.formats.bnb_4bit.weight import Bnb4bitWeight, quant_state_of

logger = logging.getLogger(__name__)


def nested_layers(model: nn.Module) -> dict[str, int]:
    """Names of the 4-bit layers with nested scales, as they are without adapters, and how many scales each has."""
    states = {name: quant_state_of(module) for name, module in model.named_modules() if Bnb4bitWeight.matches(module)}
    return {
        name.removesuffix(".base_layer"): state.absmax.numel()
        for name, state in states.items()
        if state is not None and state.nested
    }


def note_unnested(model: nn.Module, before: dict[str, int], what: str) -> None:
    """Reports what un-nesting scales cost, and keeps the quantization config of the model true.

    Args:
        model (`nn.Module`): The model after merging.
        before (`dict[str, int]`): What `nested_layers` returned before.
        what (`str`): What wrote the scales, to begin the sentence with.
    """
    after = nested_layers(model)
    count = sum(size for name, size in before.items() if name not in after)
    if not count:
        return
    logger.warning(
        "%s wrote the double-quantized scales of %d layers as plain float32, which is exact and takes %.1f MB "
        "more. The model is still 4-bit and loads as before.",
        what,
        len(before) - len(after),
        count * 3 / 1e6,  # a float32 in place of a byte
    )
    config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if after or config is None:
        return
    if isinstance(config, dict):
        config["bnb_4bit_use_double_quant"] = False
    else:
        config.bnb_4bit_use_double_quant = False
