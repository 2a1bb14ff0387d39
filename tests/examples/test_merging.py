"""Merging in the comparison: as PEFT does it, its lost biases put back, and into the weights before quantization."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison.bases import load_base, targets_of
from comparison.merging import merge, merge_into_original
from comparison.methods import adapt, parse_method
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.slow

hqq = pytest.mark.skipif(find_spec("hqq") is None, reason="hqq is not installed")
bases = pytest.mark.parametrize("base", [pytest.param("hqq-8-16", marks=hqq), "nf4"])
LORA = parse_method("lora-4:original")


@pytest.fixture(scope="module")
def biased_dir(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a random bias in each layer."""
    config = LlamaConfig.from_pretrained(llama_dir, attention_bias=True, mlp_bias=True)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    directory = tmp_path_factory.mktemp("biased")
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(llama_dir).save_pretrained(directory)
    return directory


def base_layer_of(directory: Path, base: str) -> Any:
    return load_base(str(directory), base, torch.float32, [])


def changed(base: Any, size: float) -> Any:
    """The base with LoRA whose B is random."""
    model = adapt(copy.deepcopy(base), LORA, targets_of(base), None).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=size)
    return model


@hqq
def test_peft_still_loses_the_bias_of_hqq_layers(biased_dir):
    model = base_layer_of(biased_dir, "hqq-4-16")
    name = targets_of(model)[0]
    assert model.get_submodule(name).bias is not None
    merged = get_peft_model(model, LoraConfig(target_modules=[name])).merge_and_unload()
    assert merged.get_submodule(name).bias is None, "PEFT keeps it now: remove _biases from comparison/merging.py"


@bases
@torch.no_grad()
def test_merging_lora_keeps_the_biases(base, biased_dir, ids):
    model = base_layer_of(biased_dir, base)
    expected = {name: model.get_submodule(name).bias.clone() for name in targets_of(model)}
    before = model(input_ids=ids).logits
    merged = merge(changed(model, 0.0), parse_method("lora-4"))
    for name, bias in expected.items():
        assert torch.equal(merged.get_submodule(name).bias, bias)
    # Nothing was added, and what is on the grid is quantized to itself, but for what HQQ's optimizer moves.
    torch.testing.assert_close(merged(input_ids=ids).logits, before, rtol=0, atol=0.05 * float(before.std()))


@bases
@torch.no_grad()
def test_merging_into_the_original_is_quantizing_the_changed_weights(base, biased_dir, ids):
    quantized, original = base_layer_of(biased_dir, base), base_layer_of(biased_dir, "as-is")
    tokenizer = AutoTokenizer.from_pretrained(biased_dir)
    same = merge_into_original(changed(quantized, 0.0), str(biased_dir), tokenizer, base, [])
    assert torch.equal(same(input_ids=ids).logits, quantized(input_ids=ids).logits)
    model = changed(quantized, 1.0)
    merged = merge_into_original(model, str(biased_dir), tokenizer, base, [])
    name = targets_of(quantized)[0]
    change = model.base_model.model.get_submodule(name).get_delta_weight("default")
    expected = original.get_submodule(name).weight + change
    found = merged.get_submodule(name)(torch.eye(expected.shape[1])) - merged.get_submodule(name).bias
    error = (found.T - expected).norm() / expected.norm()
    assert change.norm() > expected.norm() / 2 and 0 < error < (0.01 if base.startswith("hqq") else 0.12)
