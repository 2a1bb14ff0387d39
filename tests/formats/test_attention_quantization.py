"""compressed-tensors models that quantize keys, values and queries: their gradients, and the bits of the base."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from support.bases import logits, train_steps
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from peft_sgrq import SGRQConfig

ct = pytest.importorskip("compressed_tensors")


def quantized(directory: Any, queries: bool) -> LlamaForCausalLM:
    """4-bit weights, and keys and values (with `queries` these, too) of 8 bits by token and head."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=64)
    cache = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="group", group_size=16, dynamic=True)
    groups = {"linear": QuantizationScheme(targets=["Linear"], weights=weights)}
    if queries:
        groups["attention"] = QuantizationScheme(targets=["LlamaAttention"], input_activations=cache)
    config = QuantizationConfig(config_groups=groups, ignore=["lm_head"], kv_cache_scheme=None if queries else cache)
    apply_quantization_config(model, config)
    for module in model.modules():
        args = getattr(getattr(module, "quantization_scheme", None), "weights", None)
        if args is not None:
            values = module.weight.data.unflatten(1, (-1, 64))
            scale, _ = calculate_qparams(values.amin(-1), values.amax(-1), args)
            module.weight_scale.data.copy_(scale)
    ModelCompressor.from_pretrained_model(model).compress_model(model)
    return model.requires_grad_(False)


def gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("queries", [False, True], ids=["keys and values", "queries, too"])
def test_gradients_pass_straight_through_where_attention_is_quantized(llama_dir, ids, queries):
    model = get_peft_model(quantized(llama_dir, queries), SGRQConfig(task_type="CAUSAL_LM")).train()
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False).logits
    found = gradients(model, ids)
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in found.values())
    for module in model.modules():  # with 8 bits the rounding is small, and so is what it changes in the gradients
        if hasattr(module, "kv_cache"):
            module.quantization_enabled = False
    with torch.no_grad():
        assert not torch.equal(model(input_ids=ids, use_cache=False).logits, plain), "nothing is quantized"
    for name, expected in gradients(model, ids).items():
        assert (found[name] - expected).norm() < 0.1 * expected.norm(), name


@pytest.mark.parametrize("queries", [False, True], ids=["keys and values", "queries, too"])
def test_the_bits_are_those_of_the_base_and_merged_equals_unmerged(llama_dir, ids, queries):
    model = quantized(llama_dir, queries)
    with torch.no_grad():
        base = model(input_ids=ids, use_cache=False).logits
    model = get_peft_model(quantized(llama_dir, queries), SGRQConfig(task_type="CAUSAL_LM")).eval()
    assert torch.equal(logits(model, ids), base)
    train_steps(model, ids)
    unmerged = logits(model.eval(), ids)
    assert not torch.equal(unmerged, base)
    model.merge_adapter()
    assert torch.equal(logits(model, ids), unmerged)


def test_compressed_tensors_still_loses_the_gradient_of_keys_and_values(llama_dir, ids):
    model = get_peft_model(quantized(llama_dir, queries=False), SGRQConfig(task_type="CAUSAL_LM")).train()
    for module in model.modules():
        if hasattr(module, "kv_cache"):
            del module.kv_cache.forward  # what `pass_gradients` put there
    # What still holds keys and values may get them a gradient later; further steps show that it does not.
    with pytest.raises(RuntimeError, match="No gradient reached the deltas of 4 layers"):
        for _ in range(3):
            gradients(model, ids)
