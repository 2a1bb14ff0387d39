"""Bugs of GPTQModel, and of transformers with it: shown to be there, so that their workarounds go when they do."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from support.packed_layers import packed_layer, require
from support.single_layers import adapt
from torch import nn

from peft_sgrq.base.workarounds.awq_scale_dtype import keep_awq_scales
from peft_sgrq.base.workarounds.gptq_zero_points import save_zero_points_as_loaded
from peft_sgrq.base.workarounds.gptqmodel_few_cores import give_gptqmodel_workers
from peft_sgrq.base.workarounds.loading_attributes import forget_loading_attributes

pytestmark = pytest.mark.slow


class _Model(nn.Module):
    """What of a model the workaround for zero points looks at."""

    def __init__(self, layer: nn.Module, file_format: str) -> None:
        super().__init__()
        self.layer = layer
        self.config = type("Config", (), {})()
        self.config.quantization_config = {"quant_method": "gptq", "checkpoint_format": file_format}


def awq_layer(**options) -> nn.Module:
    return packed_layer("awq", **options).layer


def test_gptqmodel_still_loads_nothing_on_two_cores(monkeypatch):
    gptqmodel = pytest.importorskip("gptqmodel")
    monkeypatch.delenv("GPTQMODEL_CPU_WORKERS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert gptqmodel._default_cpu_workers() == 1  # of which its loader wants two
    give_gptqmodel_workers()
    assert gptqmodel._default_cpu_workers() == 2
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "3")
    give_gptqmodel_workers()
    assert gptqmodel._default_cpu_workers() == 3  # what the user says


def test_gptqmodel_still_rounds_awq_scales_in_place():
    layer = awq_layer()
    layer(torch.randn(2, 128, dtype=torch.bfloat16))
    assert layer.scales.dtype == torch.bfloat16, "see peft_sgrq/base/workarounds/awq_scale_dtype.py"


def test_gptqmodel_still_binds_copies_to_the_original():
    layer, x = packed_layer("gptq").layer.eval(), torch.randn(2, 128)
    layer.optimize()
    copied = copy.deepcopy(layer)
    copied.scales.data.mul_(2)
    with torch.no_grad():
        assert torch.equal(copied(x), layer(x)), "see peft_sgrq/formats/int32_packed/bound_copies.py"


def test_a_merge_into_a_copy_of_a_gptq_layer_is_exact_and_leaves_the_original_alone():
    layer, x = packed_layer("gptq").layer.eval(), torch.randn(2, 128)
    layer.optimize()
    with torch.no_grad():
        before = layer(x)
    model = adapt(copy.deepcopy(layer)).eval()
    with torch.no_grad():
        tuned = model(x)
        merged = model.merge_and_unload()(x)
        assert torch.equal(merged, tuned) and not torch.equal(merged, before)
        assert torch.equal(layer(x), before)
    assert "dequantize_weight" in vars(layer)


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_awq_layers_keep_their_tensors_and_their_output(bias):
    layer, x = awq_layer(bias=bias), torch.randn(2, 128, dtype=torch.bfloat16)
    keep_awq_scales(nn.Sequential(layer))
    keep_awq_scales(nn.Sequential(layer))
    scales, offset = layer.scales, layer.bias
    kept = layer(x)
    assert layer.scales is scales and layer.bias is offset and scales.dtype == torch.float16
    assert len(layer._forward_hooks) == len(layer._forward_pre_hooks) == 1
    layer._forward_hooks.clear()
    layer._forward_pre_hooks.clear()
    assert torch.equal(layer(x), kept)


def test_awq_layers_keep_their_tensors_when_a_forward_pass_fails():
    layer = awq_layer()
    keep_awq_scales(nn.Sequential(layer))
    scales = layer.scales
    with pytest.raises(RuntimeError):
        layer(torch.randn(2, 100, dtype=torch.bfloat16))
    assert layer.scales is scales


def test_scales_rounded_before_are_reported(caplog):
    layer = awq_layer()
    layer(torch.randn(2, 128, dtype=torch.bfloat16))
    keep_awq_scales(nn.Sequential(layer, awq_layer()))
    assert "scales of 1 AWQ layers (the first: 0)" in caplog.text and "load the base anew" in caplog.text


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_state_dict_has_the_zero_points_of_the_format_and_is_loaded_from_it(bits):
    made = packed_layer("gptq", bits=bits)
    made.layer.qzeros.copy_(packed_layer("gptq", bits=bits).layer.qzeros)
    in_memory, x = made.layer.qzeros.clone(), torch.randn(2, 128, dtype=torch.float16)
    expected = made.layer(x)
    model = _Model(made.layer, "gptq")
    save_zero_points_as_loaded(model)
    save_zero_points_as_loaded(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert not torch.equal(state["layer.qzeros"], in_memory)
    assert torch.equal(made.layer.qzeros, in_memory) and made.layer.qzero_format() == 2
    made.layer.qzeros.zero_()
    model.load_state_dict(state)
    assert torch.equal(made.layer.qzeros, in_memory)
    assert torch.equal(made.layer(x), expected)


def test_a_file_of_the_second_format_is_left_alone():
    made = packed_layer("gptq")
    model = _Model(made.layer, "gptq_v2")
    save_zero_points_as_loaded(model)
    assert torch.equal(model.state_dict()["layer.qzeros"], made.layer.qzeros)


def test_transformers_still_saves_wrong_zero_points(tmp_path):
    require("gptq")
    pytest.importorskip("optimum", reason="optimum is not installed, which transformers loads GPTQ with")
    from transformers import AutoModelForCausalLM, GPTQConfig

    directory = _tiny_gptq_checkpoint(tmp_path / "base")

    def load(place: Path):
        return AutoModelForCausalLM.from_pretrained(place, quantization_config=GPTQConfig(bits=4, backend="torch"))

    model = load(directory)
    model.save_pretrained(tmp_path / "again")
    zeros = [load(place).model.layers[0].self_attn.q_proj.qzeros for place in (directory, tmp_path / "again")]
    assert not torch.equal(*zeros), "see peft_sgrq/base/workarounds/gptq_zero_points.py"
    save_zero_points_as_loaded(model)
    model.save_pretrained(tmp_path / "mended")
    assert torch.equal(load(tmp_path / "mended").model.layers[0].self_attn.q_proj.qzeros, zeros[0])


def test_transformers_still_saves_the_kernel_a_model_was_loaded_with(tmp_path):
    require("gptq")
    pytest.importorskip("optimum", reason="optimum is not installed, which transformers loads GPTQ with")
    from transformers import AutoModelForCausalLM, GPTQConfig

    place = _tiny_gptq_checkpoint(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(place, quantization_config=GPTQConfig(bits=4, backend="torch"))
    assert model.config.to_dict()["quantization_config"]["backend"] == "torch", (
        "see base/workarounds/loading_attributes.py"
    )
    forget_loading_attributes(model)
    assert model.config.to_dict()["quantization_config"]["backend"] == "auto"


def _tiny_gptq_checkpoint(directory: Path) -> Path:
    """A Llama of one block with random GPTQ layers of the first format, written by hand."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    config.quantization_config = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": False,
        "desc_act": False,
        "checkpoint_format": "gptq",
    }
    state = {}
    for name, tensor in LlamaForCausalLM(config).state_dict().items():
        prefix = name.removesuffix(".weight")
        if name.endswith("_proj.weight"):
            packed = packed_layer("gptq", rows=64, columns=64).layer
            fields = ("qweight", "qzeros", "scales", "g_idx")
            state |= {f"{prefix}.{field}": getattr(packed, field).clone() for field in fields}
        else:
            state[name] = tensor.clone()
    directory.mkdir()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
