"""Bugs of other packages: each is shown to be there, so that its workaround goes when it does; and the workarounds."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.bases import INT8, NF4, NF4_NESTED, Base, logits, train_steps
from support.single_layers import linear_4bit, linear_8bit
from support.small_models import TIED, load, outputs, save, train_randomly
from torch import nn
from transformers import AutoModelForCausalLM

from peft_sgrq import SGRQConfig
from peft_sgrq.base.workarounds.bnb_cpu_packing import disable_cpu_packing

packing = pytest.mark.skipif(
    not bnb.functional.has_avx512bf16(), reason="bitsandbytes repacks 4-bit layers only on CPUs with AVX512-BF16"
)


def weight_of(layer: bnb.nn.Linear4bit) -> torch.Tensor:
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


def reloaded(layer: bnb.nn.Linear4bit) -> bnb.nn.Linear4bit:
    """A layer made from the state dict of another."""
    state = dict(layer.state_dict())
    fresh = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False)
    stats = {key.removeprefix("weight."): value for key, value in state.items() if key.startswith("weight.")}
    fresh.weight = bnb.nn.Params4bit.from_prequantized(state["weight"], stats, device="cpu", module=fresh)
    return fresh


def stored_bytes(layer: bnb.nn.Linear4bit) -> dict[str, tuple[torch.dtype, bytes]]:
    state = layer.state_dict()
    return {key: (value.dtype, value.contiguous().view(torch.uint8).numpy().tobytes()) for key, value in state.items()}


def packed(layer: bnb.nn.Linear4bit) -> bnb.nn.Linear4bit:
    """The layer after a forward pass as bitsandbytes does it, in its own CPU layout."""
    layer.support_avx512bf16_for_cpu = True
    layer.eval()(torch.randn(2, layer.in_features, dtype=torch.bfloat16))
    assert layer.weight.quant_state.packing_format_for_cpu
    return layer


@packing
def test_bitsandbytes_still_corrupts_packed_layers():
    layer = linear_4bit(64, 128, bias=False, dtype=torch.bfloat16)
    before = weight_of(layer)
    assert torch.equal(weight_of(reloaded(layer)), before)
    error = (weight_of(reloaded(packed(layer))) - before).abs().max()
    assert error > 0.5, "bitsandbytes saves packed layers right now: see peft_sgrq/base/workarounds/bnb_cpu_packing.py"


@packing
@pytest.mark.filterwarnings("ignore:.*autograd kernel was not registered.*")
def test_bitsandbytes_still_loses_the_gradient_of_packed_layers():
    layer = packed(linear_4bit(64, 128, bias=False)).train()
    x = torch.randn(2, 128, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is None, "packed layers pass gradients now: see peft_sgrq/base/workarounds/bnb_cpu_packing.py"


@packing
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("block", [32, 64, 128])
def test_a_packed_layer_of_a_bfloat16_base_is_repaired_exactly(quant_type, block, storage):
    layer = linear_4bit(64, 256, quant_type, block, bias=False, dtype=torch.bfloat16, storage=storage)
    before, state = weight_of(layer), stored_bytes(layer)
    disable_cpu_packing(nn.Sequential(packed(layer)))
    assert torch.equal(weight_of(layer), before)
    assert stored_bytes(layer) == state
    assert torch.equal(weight_of(reloaded(layer)), before)


@packing
@pytest.mark.parametrize(("dtype", "nested"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)])
def test_a_packed_layer_is_repaired_but_for_the_bits_it_lost(dtype, nested):
    layer = linear_4bit(64, 256, nested=nested, bias=False, dtype=dtype)
    twin = linear_4bit(64, 256, nested=nested, bias=False, dtype=dtype)
    twin.weight = copy.deepcopy(layer.weight)
    state = twin.weight.quant_state
    scales = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset if nested else state.absmax
    disable_cpu_packing(nn.Sequential(packed(layer)))
    found = layer.weight.quant_state
    assert not found.nested and found.absmax.dtype == torch.float32
    assert torch.equal(found.absmax, scales.bfloat16().float())
    assert torch.equal(layer.weight.data, twin.weight.data)
    assert torch.equal(weight_of(reloaded(layer)), weight_of(layer))


@packing
def test_a_repair_says_what_was_lost(caplog):
    model = nn.ModuleDict({"one": packed(linear_4bit(64, 128)), "two": linear_4bit(64, 128)})
    disable_cpu_packing(model)
    assert "repacked 1 4-bit layers (the first: one)" in caplog.text and "load the base anew" in caplog.text
    caplog.clear()
    disable_cpu_packing(model)
    assert not caplog.text


def unguarded(base: Base, directory: Any) -> Any:
    """A model as transformers loads it, with bitsandbytes' CPU repacking on."""
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=base.dtype, quantization_config=base.quantization
    ).eval()


@packing
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("when", ["before-the-adapter", "after-the-adapter"])
def test_training_after_an_evaluation_keeps_its_gradients(llama_dir, ids, nested, when):
    # Layers without an adapter lie between those with one and the loss.
    base = Base("nf4", nested, torch.bfloat16)
    model = unguarded(base, llama_dir)
    if when == "before-the-adapter":
        logits(model, ids)
        assert model.model.layers[1].mlp.down_proj.weight.quant_state.packing_format_for_cpu
    model = get_peft_model(model, SGRQConfig(target_modules=r".*layers\.0\.self_attn\.q_proj")).eval()
    evaluated = logits(model, ids)
    losses = train_steps(model, ids, steps=3)
    assert losses[-1] < losses[0]
    trained = logits(model.eval(), ids)
    assert not torch.equal(trained, evaluated)
    model.merge_adapter()
    assert torch.equal(logits(model, ids), trained)


@packing
def test_a_model_merged_after_an_evaluation_is_saved_right(llama_dir, ids, tmp_path):
    model = get_peft_model(unguarded(NF4_NESTED, llama_dir), SGRQConfig(init_weights=False)).eval()
    expected = logits(model, ids)
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged, ids), expected)
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    disable_cpu_packing(loaded)
    assert torch.equal(logits(loaded, ids), expected)


@pytest.mark.parametrize("base", [NF4, NF4_NESTED, INT8], ids=lambda base: base.name)
def test_transformers_still_cannot_save_a_prequantized_model(base, llama_dir, tmp_path):
    base.load(llama_dir).save_pretrained(tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    try:
        loaded.save_pretrained(tmp_path / "again")
    except NotImplementedError:
        return
    pytest.fail("transformers saves pre-quantized models now: see peft_sgrq/base/workarounds/transformers_save.py")


def test_bitsandbytes_still_writes_to_int8_inputs():
    layer = linear_8bit(24, 40, threshold=6.0).eval()
    x = torch.randn(3, 40, dtype=torch.float16)
    x[0, 0] = 10
    before = x.clone()
    with torch.no_grad():
        layer(x)
    assert torch.equal(x, before)
    assert x._version > 0, "int8 layers leave their input alone now: see `BnbInt8Weight.writes_to_input`"


def _lora_on_tied(kind, tmp_path, **config):
    """Logits of a tied model with a trained LoRA adapter, and of the merged one after saving and loading it."""
    base = save(TIED[kind], tmp_path / "base")
    model = get_peft_model(load(base), LoraConfig(target_modules=["q_proj"], **config))
    expected = outputs(train_randomly(model))
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    return expected, outputs(load(tmp_path / "merged"))


def test_peft_still_merges_rows_of_a_head_into_the_embedding(tmp_path):
    expected, found = _lora_on_tied("llama", tmp_path, trainable_token_indices={"lm_head": [3, 7]})
    assert not torch.allclose(found, expected, atol=1e-3)


def test_peft_still_leaves_out_weights_it_untied(tmp_path):
    expected, found = _lora_on_tied("bart", tmp_path, modules_to_save=["lm_head"])
    assert not torch.allclose(found, expected, atol=1e-3)
