"""Merging an adapter as PEFT does it, and LoRA's into the weights before they were quantized."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from comparison.bases import load_base
from comparison.methods import Method


def merge(model: Any, method: Method) -> Any | None:
    """The base with the adapter merged into it as PEFT does it, or `None` where PEFT cannot."""
    if method.kind == "qalora":
        return None
    biases = _biases(model)
    try:
        merged = model.merge_and_unload()
    except (ValueError, NotImplementedError):  # IA3 into 4 bits; LoRA and IA3 into GPTQ
        return None
    for name, bias in biases.items():
        merged.get_submodule(name).bias = bias
    return merged


def merge_into_original(model: Any, source: str, tokenizer: Any, base: str, texts: list[str]) -> Any:
    """LoRA's changes added to the weights before quantization, which are then quantized as the base was.

    Args:
        model (`PeftModel`): The base with LoRA.
        source (`str`): Directory or Hub name of the model before quantization.
        tokenizer: Of the model.
        base (`str`): The format, as [`load_base`] has it.
        texts (`list[str]`): What the base was calibrated on, if its format needs that.
    """
    dtype = model.dtype
    original = load_base(source, "as-is", dtype, [])
    for name, change in _low_rank_changes(model).items():
        weight = original.get_submodule(name).weight
        weight.data = (weight.float() + change.to(weight.device)).to(weight.dtype)
    with tempfile.TemporaryDirectory() as folder:
        original.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return load_base(folder, base, dtype, texts)


@torch.no_grad()
def _low_rank_changes(model: Any) -> dict[str, torch.Tensor]:
    """Layer -> what LoRA adds to its weight, float32 `[out_features, in_features]`."""
    return {
        name.removeprefix("base_model.model."): (
            layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()
        )
        * layer.scaling["default"]
        for name, layer in model.named_modules()
        if getattr(layer, "lora_A", None)
    }


def _biases(model: Any) -> dict[str, torch.Tensor]:
    # PEFT merges LoRA into an HQQLinear by making a new one of the weight alone (merge in peft/tuners/lora/hqq.py of
    # PEFT 0.21.2): the bias is gone. tests/examples/test_merging.py fails once it stays.
    return {
        name.removeprefix("base_model.model."): layer.get_base_layer().bias
        for name, layer in model.named_modules()
        if type(layer).__name__ == "HqqLoraLinear" and layer.get_base_layer().bias is not None
    }
