"""Layers of compressed-tensors and of fine-grained fp8: gradients, activations, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from bases import TRAINING, logits, train_steps
from checkpoints import CT_SCHEMES, FORMATS, FP8_BLOCKS, edit_config, in_shards, save_wide_llama
from datasets import Dataset
from layers import delta_of, relative_error, the_layer
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from peft_sgrq import SGRQConfig, restore_codes
from peft_sgrq.backends import resolve_backend
from peft_sgrq.backends.compressed_tensors import keep_compressed
from peft_sgrq.backends.fp8_blocks import Fp8BlockLinear
from peft_sgrq.functional import effective_scales

FLOAT8 = torch.float8_e4m3fn
W4A16 = next(form for form in FORMATS if form.name.endswith("W4A16"))
FP8_DYNAMIC = next(form for form in FORMATS if form.name.endswith("FP8_DYNAMIC"))


def compressed(scheme: str, rows: int = 256, columns: int = 384, bias: bool = True) -> nn.Linear:
    """A layer of compressed-tensors in float32, as transformers loads it."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import compress_module
    from compressed_tensors.quantization import initialize_module_for_quantization, preset_name_to_scheme

    layer = nn.Linear(columns, rows, bias=bias)
    initialize_module_for_quantization(layer, preset_name_to_scheme(scheme, ["Linear"]))
    layer.quantization_status = "frozen"
    layer.weight_scale.data = torch.rand_like(layer.weight_scale) * 0.01 + 0.005
    if hasattr(layer, "input_scale"):
        layer.input_scale.data.fill_(0.02)
    compress_module(layer)
    keep_compressed(layer)
    return layer.requires_grad_(False)


def fp8_layer(rows: int = 256, columns: int = 384, bias: bool = True, block: Any = (128, 128)) -> Fp8BlockLinear:
    codes = torch.randn(rows, columns).to(FLOAT8)
    shape = (1, 1) if block is None else (-(-rows // block[0]), -(-columns // block[1]))
    own_bias = nn.Parameter(torch.randn(rows)) if bias else None
    layer = Fp8BlockLinear(codes, torch.rand(shape) + 0.5, block, torch.float32, own_bias)
    return layer.requires_grad_(False)


def adapt(layer: nn.Module, **config: Any) -> PeftModel:
    settings = {"target_modules": ["0"], "init_weights": False, "ratio": 0.5, **config}
    return get_peft_model(nn.Sequential(layer), SGRQConfig(**settings)).train()


LAYERS = [
    *(
        (lambda scheme=scheme, bias=bias: compressed(scheme, bias=bias))
        for scheme in CT_SCHEMES
        for bias in (True, False)
    ),
    lambda: fp8_layer(),
    lambda: fp8_layer(bias=False),
    lambda: fp8_layer(rows=200, columns=300),  # the last blocks are partial
    lambda: fp8_layer(block=None),
]
NAMES = [f"{scheme}{bias}" for scheme in CT_SCHEMES for bias in ("-bias", "")]
NAMES += ["fp8-bias", "fp8", "fp8-partial", "fp8-tensor"]


@pytest.fixture(params=LAYERS, ids=NAMES)
def layer(request) -> nn.Module:
    return request.param()


def reference(model: PeftModel, x: torch.Tensor, deltas: dict[str, torch.Tensor]) -> torch.Tensor:
    """`x (C * S (1 + sum of deltas))^T + b` in float64, each scale spread over its rows and columns."""
    layer = the_layer(model)
    backend = layer.backend
    scales = backend.scales().double()
    factors = torch.ones_like(scales)
    for name, delta in deltas.items():
        factors = factors.index_add(backend.selected_dim, layer.sgrq_delta[name].groups, delta)
    spread = (scales * factors).repeat_interleave(backend.rows_per_scale, 0)[: backend.out_features]
    spread = spread.repeat_interleave(backend.group_size, 1)[:, : backend.in_features]
    codes = backend.codes(None, torch.float32).double()[:, : backend.in_features]
    y = x @ (codes * spread).T
    return y if backend.bias is None else y + backend.bias.double()


@pytest.mark.parametrize("adapters", [1, 2])
def test_gradients_equal_float64_references(layer, adapters):
    model = adapt(layer)
    names = ["default", "b"][:adapters]
    if adapters == 2:
        add_adapter_of(model, "b")
    x = torch.randn(2, 7, the_layer(model).in_features, requires_grad=True)
    dy = torch.randn(2, 7, the_layer(model).out_features)
    (model(x) * dy).sum().backward()
    # What the layer computes with: its activations may be quantized, straight-through.
    computed = the_layer(model).backend.cast_input(x).detach().double().requires_grad_()
    deltas = {name: delta_of(model, name).detach().double().requires_grad_() for name in names}
    (reference(model, computed, deltas) * dy.double()).sum().backward()
    assert relative_error(x.grad, computed.grad) < 1e-5
    for name in names:
        assert deltas[name].grad.abs().max() > 0
        assert relative_error(delta_of(model, name).grad, deltas[name].grad) < 1e-5


def add_adapter_of(model: PeftModel, name: str) -> None:
    model.add_adapter(name, SGRQConfig(target_modules=["0"], init_weights=False, ratio=0.7))
    model.base_model.set_adapter(list(model.peft_config))


def test_the_codes_of_some_groups_are_those_of_all(layer):
    backend = resolve_backend(layer, 64)
    groups = torch.arange(0, backend.selectable, 2)
    every = backend.codes(None, torch.float32)
    if backend.granularity == "row":
        expected = every[groups]
    else:
        expected = every.view(-1, backend.selectable, backend.group_size)[:, groups].flatten(1)
    assert torch.equal(backend.codes(groups, torch.float32), expected)


def test_merged_equals_unmerged_and_codes_stay(layer):
    model, x = adapt(layer).eval(), torch.randn(5, layer.in_features)
    base = the_layer(model).base_layer
    before = {name: tensor.detach().clone() for name, tensor in base.named_parameters()}
    expected, plain = model(x), base(x)
    assert not torch.equal(expected, plain)
    assert torch.equal(model.train()(x), expected)
    model.merge_adapter()
    assert torch.equal(model(x), expected)
    after = dict(base.named_parameters())
    changed = [name for name, tensor in before.items() if not equal_bytes(after[name], tensor)]
    assert changed in (["weight_scale"], ["weight_scale_inv"])
    model.unmerge_adapter()
    assert all(equal_bytes(dict(base.named_parameters())[name], tensor) for name, tensor in before.items())
    with model.disable_adapter():
        assert torch.equal(model(x), plain)


def equal_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.data.reshape(-1).view(torch.uint8), b.data.reshape(-1).view(torch.uint8))


def test_a_copy_computes_alike_and_is_independent(layer):
    model, x = adapt(layer).eval(), torch.randn(5, layer.in_features)
    expected = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), expected)
    twin.merge_adapter()
    with torch.no_grad():
        delta_of(twin).add_(1)
    assert torch.equal(model(x), expected)
    assert not torch.equal(the_layer(twin).base_layer(x), the_layer(model).base_layer(x))


def test_zero_scales_get_a_gradient_through_nothing_but_codes():
    layer = fp8_layer()
    layer.weight_scale_inv.data[0, 0] = 0
    model = adapt(layer, ratio=1.0)
    model(torch.randn(5, 384)).sum().backward()
    assert delta_of(model).grad[0, 0] == 0  # a relative change of zero is none
    assert torch.isfinite(delta_of(model).grad).all()


def test_zero_delta_in_float32_is_the_base(layer):
    model, x = adapt(layer, init_weights=True).eval(), torch.randn(5, layer.in_features)
    assert torch.equal(model(x), the_layer(model).base_layer(x))
    backend = the_layer(model).backend
    assert torch.equal(
        effective_scales(backend, delta_of(model).detach() * 0, the_layer(model).sgrq_delta["default"].groups),
        backend.scales(),
    )


# activations quantized on the fly


@pytest.mark.parametrize("scheme", ["W8A8", "FP8_DYNAMIC", "FP8_BLOCK"])
def test_compressed_tensors_still_loses_the_gradient_of_quantized_activations(scheme):
    # Ours is straight-through (above). Once this fails, compressed-tensors' own would do.
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import decompress_module
    from compressed_tensors.quantization.lifecycle.forward import set_forward_quantized

    layer = compressed(scheme, bias=False)
    del layer.forward  # what `keep_compressed` put there
    set_forward_quantized(layer)
    decompress_module(layer)
    x = torch.randn(5, layer.in_features, requires_grad=True)
    assert not layer(x).requires_grad


def test_a_compressed_embedding_is_decompressed_as_without_an_adapter():
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import compress_module, decompress_module
    from compressed_tensors.quantization import initialize_module_for_quantization, preset_name_to_scheme

    embedding = nn.Embedding(64, 256)
    initialize_module_for_quantization(embedding, preset_name_to_scheme("W8A16", ["Embedding"]))
    embedding.weight_scale.data.fill_(0.02)
    embedding.quantization_status = "frozen"
    compress_module(embedding)
    expected = copy.deepcopy(embedding)
    decompress_module(expected)
    keep_compressed(embedding)
    ids = torch.arange(5)
    assert torch.equal(embedding(ids), expected(ids))


# what is refused


def test_a_decompressed_model_is_refused(tmp_path, ids):
    model = W4A16.load(W4A16.make(tmp_path))
    logits(model, ids)
    with pytest.raises(ValueError, match=r"decompressed it .*load the model anew and add the adapter before"):
        get_peft_model(model, SGRQConfig(target_modules=["q_proj"]))


def test_a_refused_model_still_decompresses_as_before(tmp_path, ids):
    base = W4A16.make(tmp_path)
    expected = logits(W4A16.load(base), ids)
    model = W4A16.load(base)
    with pytest.raises(ValueError, match="cannot be adapted"):
        get_peft_model(model, SGRQConfig(target_modules=["q_proj", "embed_tokens"]))
    assert torch.equal(logits(model, ids), expected)
    assert model.model.layers[0].mlp.down_proj.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("scheme", ["MXFP4", "MXFP8"])
def test_power_of_two_scales_are_refused_with_the_reason(scheme):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import compress_module
    from compressed_tensors.quantization import initialize_module_for_quantization, preset_name_to_scheme

    layer = nn.Linear(128, 64)
    initialize_module_for_quantization(layer, preset_name_to_scheme(scheme, ["Linear"]))
    layer.weight_scale.data.fill_(1)
    compress_module(layer)
    with pytest.raises(ValueError, match=r"powers of two \(E8M0"):
        adapt(layer)


def test_fp8_blocks_with_power_of_two_scales_are_refused():
    scales = torch.ones(2, 3).to(torch.float8_e8m0fnu)
    with pytest.raises(ValueError, match=r"powers of two \(E8M0"):
        Fp8BlockLinear(torch.zeros(256, 384).to(FLOAT8), scales, (128, 128), torch.float32, None)


def test_codes_of_another_checkpoint_are_not_restored(tmp_path, ids):
    base = FP8_BLOCKS.make(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(base)
    before = logits(model, ids)
    weight = model.model.layers[0].mlp.down_proj.weight
    original = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp\.down_proj' has another weight than the codes"):
        restore_codes(model)
    with torch.no_grad():
        weight.copy_(original)
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    assert torch.equal(logits(model, ids), before)
    edit_config(base, quantization_config={"quant_method": "gptq"})
    with pytest.raises(ValueError, match=r"quantization method 'gptq', expected 'fp8'"):
        restore_codes(model)
    with pytest.raises(ValueError, match=r"quantization method None, expected 'fp8'"):
        restore_codes(model, save_wide_llama(tmp_path / "plain"))


def test_transformers_still_spreads_the_scales_of_partial_blocks_wrongly():
    # It takes 300 rows with three scales for blocks of 100, not 128, so such a layer's codes are not restored. Once
    # this fails, they can be.
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    layer = fp8_layer(rows=300, columns=128, bias=False)
    theirs = Fp8Dequantize(None)._dequantize_one(layer.weight.data, layer.weight_scale_inv.data, torch.float32)
    assert not torch.equal(theirs, layer.dense_weight(layer.weight_scale_inv))


def test_codes_are_restored_from_shards(tmp_path, ids):
    shards = in_shards(FP8_BLOCKS.make(tmp_path), tmp_path / "shards")
    model = AutoModelForCausalLM.from_pretrained(shards)
    before = logits(model, ids)
    assert restore_codes(model) == 7
    assert torch.equal(logits(model, ids), before)


def test_an_adapter_on_a_dequantized_model_is_told_about_restoring(tmp_path):
    base = FP8_BLOCKS.make(tmp_path)
    FP8_BLOCKS.adapted(base, init_weights=False).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"is not quantized .*expected in fine-grained fp8 .*restore_codes\(model\)"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")


def test_the_layers_of_a_gpu_have_the_scales_and_the_digest_of_those_restored_without_one():
    from transformers.integrations.finegrained_fp8 import FP8Linear

    restored = fp8_layer()
    on_gpu = FP8Linear(384, 256, block_size=(128, 128), has_bias=True)
    on_gpu.weight.data, on_gpu.weight_scale_inv.data = restored.weight.data, restored.weight_scale_inv.data
    ours, theirs = resolve_backend(restored, 64), resolve_backend(on_gpu, 64)
    assert ours.fingerprint() == theirs.fingerprint()
    assert torch.equal(ours.scales(), theirs.scales())
    changed = ours.scales() * 1.5
    assert torch.equal(ours.dequantize(changed, torch.float32), theirs.dequantize(changed, torch.float32))
    before = theirs.write_scales(changed)
    assert torch.equal(theirs.scales(), changed)
    assert theirs.restore_scales(before) is not before
    assert torch.equal(theirs.scales(), ours.scales())


# training with transformers


@pytest.mark.parametrize("form", [W4A16, FP8_DYNAMIC, FP8_BLOCKS], ids=lambda form: form.name)
def test_the_trainer_of_transformers_trains_and_resumes(form, tmp_path, ids):
    model = form.adapted(form.make(tmp_path))
    arguments = TrainingArguments(output_dir=str(tmp_path / "run"), max_steps=2, **TRAINING)
    rows = [{"input_ids": row, "labels": row} for row in ids.tolist()]
    trainer = Trainer(model, arguments, train_dataset=Dataset.from_list(rows))
    trainer.train()
    deltas = [value for name, value in model.named_parameters() if "sgrq_delta" in name]
    assert all(delta.dtype == torch.float32 and delta.abs().max() > 0 for delta in deltas)
    expected = logits(model.eval(), ids)
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(form.load(tmp_path / "base"), tmp_path / "adapter", is_trainable=True)
    assert torch.equal(logits(loaded.eval(), ids), expected)
    losses = train_steps(loaded, ids, steps=3)
    assert losses[-1] < losses[0]
