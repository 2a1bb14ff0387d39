"""Models of compressed-tensors and of fine-grained fp8: what is refused, restored codes, and training."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.bases import TRAINING, logits, train_steps
from support.compressed_layers import adapt, fp8_layer
from support.quantized_checkpoints import FORMATS, FP8_BLOCKS, edit_config, in_shards, save_wide_llama
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from peft_sgrq import SGRQConfig, merge_checkpoint, restore_codes
from peft_sgrq.formats.fp8_blocks.weight import Fp8BlockLinear
from peft_sgrq.formats.registry import resolve_weight

pytestmark = pytest.mark.slow

FLOAT8 = torch.float8_e4m3fn
W4A16 = next(form for form in FORMATS if form.name.endswith("W4A16"))
FP8 = next(form for form in FORMATS if form.name.endswith("FP8"))
FP8_DYNAMIC = next(form for form in FORMATS if form.name.endswith("FP8_DYNAMIC"))


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
    ours, theirs = resolve_weight(restored, 64), resolve_weight(on_gpu, 64)
    assert ours.fingerprint() == theirs.fingerprint()
    assert torch.equal(ours.scales(), theirs.scales())
    changed = ours.scales() * 1.5
    assert torch.equal(ours.dequantize(changed, torch.float32), theirs.dequantize(changed, torch.float32))
    before = theirs.write_scales(changed)
    assert torch.equal(theirs.scales(), changed)
    assert theirs.restore_scales(before) is not before
    assert torch.equal(theirs.scales(), ours.scales())


@pytest.mark.parametrize(("form", "count"), [(FP8, 1), (FP8_DYNAMIC, 0)], ids=["FP8", "FP8_DYNAMIC"])
def test_a_merge_warns_of_scales_that_servers_do_not_keep(form, count, tmp_path, caplog):
    base = form.make(tmp_path)
    model = form.adapted(base, init_weights=False)
    model.save_pretrained(tmp_path / "adapter")
    for merge in (
        lambda: merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged"),
        model.merge_and_unload,
    ):
        caplog.clear()
        merge()
        assert caplog.text.count("quantizes what was merged anew") == count


# training with transformers


@pytest.mark.parametrize("form", [W4A16, FP8_DYNAMIC, FP8_BLOCKS], ids=lambda form: form.name)
def test_the_trainer_of_transformers_trains_and_resumes(form, tmp_path, ids):
    from datasets import Dataset

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
