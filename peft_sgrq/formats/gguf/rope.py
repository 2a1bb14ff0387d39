"""Rotary embeddings of a file that are not those of its config, which transformers 5.23 passes over."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from peft_sgrq.formats.gguf.file import GGUFFile

logger = logging.getLogger(__name__)
FACTORS = "rope_freqs.weight"  # what each frequency is divided by, float32 [half of the head's columns]: Llama 3's


def rotary_modules(file: GGUFFile, model: nn.Module) -> list[Any]:
    """The modules whose frequencies the file divides, and the config does not scale; none if it does not."""
    if FACTORS not in file.tensors:
        return []
    shape = file.tensors[FACTORS].shape
    found: list[Any] = [module for module in model.modules() if getattr(module, "rope_type", None) == "default"]
    return [module for module in found if tuple(getattr(module, "inv_freq", torch.empty(0)).shape) == shape]


def uses_factors(file: GGUFFile, model: nn.Module) -> bool:
    """Whether the frequencies are divided as the file says: here, or as its config does for Llama 3."""
    return bool(rotary_modules(file, model)) or any(
        getattr(module, "rope_type", None) == "llama3" for module in model.modules()
    )


def divide_frequencies(file: GGUFFile, model: nn.Module) -> None:
    """Divides the frequencies of a loaded model as llama.cpp does (`ggml_rope_ext`, its argument `freq_factors`)."""
    for module in rotary_modules(file, model):
        factors = file.numbers(FACTORS)
        for name in ("inv_freq", "original_inv_freq"):
            frequencies = getattr(module, name, None)
            if frequencies is not None:
                setattr(module, name, frequencies / factors.to(frequencies))


def warn_of_scaling(file: GGUFFile, config: Any) -> None:
    """Says that a file scales positions, unless the config does: transformers does not make it of the header."""
    stated = getattr(config, "rope_parameters", None) or {}
    by_layers = [stated, *(value for value in stated.values() if isinstance(value, dict))]  # Gemma 3 has two kinds
    if any(fields.get("rope_type", "default") != "default" for fields in by_layers):
        return
    fields = {name: file.metadata.get(f"{file.architecture}.rope.{name}") for name in ("scaling.type", "scale_linear")}
    found = {name: value for name, value in fields.items() if value not in (None, "none", 1.0)}
    if found:
        logger.warning(
            "%s scales rotary positions (%s), which transformers does not read: results differ from llama.cpp's. Give "
            "`load_gguf(..., config=AutoConfig.from_pretrained(ORIGINAL))` the config of the original model.",
            file.path.name,
            ", ".join(f"rope.{name} is {value!r}" for name, value in found.items()),
        )
