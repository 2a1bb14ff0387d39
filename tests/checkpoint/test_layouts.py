"""Layouts on the disk: the documented packing of each format, and scales rewritten by the formula and nothing else."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.quantized_checkpoints import edit_config, same_bytes, save_wide_llama, tensors_of, write_adapter
from transformers import AutoModelForCausalLM, TorchAoConfig

from peft_sgrq import merge_checkpoint, verify_checkpoint
from peft_sgrq.config import SGRQConfig
from peft_sgrq.files.folder import CheckpointFolder
from peft_sgrq.formats.registry import find_layer

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def pack(values: torch.Tensor, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Packs unsigned values along the last dimension into int32 words, the first value in the lowest bits."""
    stream = torch.zeros(values.shape[0], values.shape[1] * bits, dtype=torch.int64)
    for bit in range(bits):
        stream[:, bit::bits] = values >> bit & 1
    if order is not None:  # the word holds its eight values in another order
        nibbles = stream.view(values.shape[0], -1, 8, bits)
        stream = nibbles[:, :, list(order)].reshape(stream.shape)
    words = (stream.view(values.shape[0], -1, 32) << torch.arange(32)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def integers(rows: int, columns: int, bits: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, (rows, columns))


def gptq_tensors(bits: int, rows: int, columns: int, group: int, act_order: bool) -> dict[str, torch.Tensor]:
    """A layer of GPTQ (or of AutoRound in its own packing, which has no index)."""
    groups = -(-columns // group)
    index = torch.arange(columns, dtype=torch.int32) // group
    return {
        "qweight": pack(integers(rows, columns, bits), bits).t().contiguous(),
        "qzeros": pack(integers(groups, rows, bits), bits),
        "scales": torch.rand(groups, rows).to(torch.float16),
        "g_idx": index[torch.randperm(columns)] if act_order else index,
    }


def awq_tensors(rows: int, columns: int, group: int) -> dict[str, torch.Tensor]:
    groups = columns // group
    return {
        "qweight": pack(integers(columns, rows, 4), 4, _AWQ_ORDER),
        "qzeros": pack(integers(groups, rows, 4), 4, _AWQ_ORDER),
        "scales": torch.rand(groups, rows).to(torch.float16),
    }


def save(directory: Path, layer: dict[str, torch.Tensor], **quantization: Any) -> Path:
    """A checkpoint of one quantized layer and one other tensor."""
    directory.mkdir()
    tensors = {f"model.layers.0.q_proj.{name}": tensor for name, tensor in layer.items()}
    save_file({**tensors, "model.norm.weight": torch.ones(8)}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": quantization}))
    return directory


LAYER = "model.layers.0.q_proj"


def layer_of(base: Path, **config: Any) -> Any:
    return find_layer(CheckpointFolder(base), LAYER, SGRQConfig(**config))


def check_merge(base: Path, tmp: Path, groups: list[int], selectable: int, dtype: str, key: str) -> None:
    """Merges random deltas of one layer; the stored scales are `round(S (1 + delta))`, the rest is as before."""
    rows = layer_of(base).scales_shape[0]
    values = torch.randn(rows, len(groups)) * 0.1
    quantization = {"scale_dtype": dtype}
    adapter = write_adapter(tmp / "adapter", {LAYER: (values, groups, selectable)}, base_quantization=quantization)
    merge_checkpoint(base, adapter, tmp / "out")
    before, after = tensors_of(base), tensors_of(tmp / "out")
    expected = before[f"{LAYER}.{key}"].to(getattr(torch, dtype)).float()
    expected[groups] *= 1 + values.t()
    assert same_bytes(after[f"{LAYER}.{key}"], expected.to(getattr(torch, dtype)))
    others = before.keys() - {f"{LAYER}.{key}"}
    assert all(same_bytes(before[name], after[name]) for name in others)
    assert verify_checkpoint(base, adapter, tmp / "out").ok


@pytest.mark.parametrize(  # every number of bits, in order and in activation order, with and without a partial group
    ("bits", "act_order", "columns"),
    [(2, False, 256), (3, True, 224), (4, False, 224), (4, True, 256), (8, True, 224), (8, False, 256)],
)
def test_gptq_scales_are_rewritten_by_group(bits, act_order, columns, tmp_path):
    tensors = gptq_tensors(bits, 64, columns, 64, act_order)
    base = save(tmp_path / "base", tensors, quant_method="gptq", bits=bits, group_size=64, desc_act=act_order)
    layer = layer_of(base)
    assert (layer.name, layer.in_features, layer.out_features) == (f"gptq-w{bits}g64", columns, 64)
    check_merge(base, tmp_path, [0, 3], 4, "float16", "scales")


def test_gptq_with_one_scale_a_row_is_one_group(tmp_path):
    base = save(tmp_path / "base", gptq_tensors(4, 64, 256, 256, False), quant_method="gptq", bits=4, group_size=-1)
    assert layer_of(base).name == "gptq-w4g256"
    check_merge(base, tmp_path, [0], 1, "float16", "scales")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_awq_scales_are_rewritten_in_the_dtype_training_rounded_to(dtype, tmp_path):
    base = save(tmp_path / "base", awq_tensors(64, 256, 64), quant_method="awq", bits=4, group_size=64, version="gemm")
    layer = layer_of(base)
    assert (layer.name, layer.in_features, layer.out_features) == ("awq-w4g64", 256, 64)
    check_merge(base, tmp_path, [1, 2], 4, dtype, "scales")


@pytest.mark.parametrize("packing", ["auto_round:auto_gptq", "auto_round:gptqmodel", "auto_round:auto_awq"])
def test_autoround_packings_are_told_apart(packing, tmp_path):
    tensors = awq_tensors(64, 256, 64) if "awq" in packing else gptq_tensors(4, 64, 256, 64, False)
    tensors.pop("g_idx", None)
    fields = {"quant_method": "auto-round", "bits": 4, "group_size": 64, "packing_format": packing}
    base = save(tmp_path / "base", tensors, **fields)
    layer = layer_of(base)
    assert layer.name == ("awq-w4g64" if "awq" in packing else "autoround-w4g64")
    assert (layer.in_features, layer.out_features) == (256, 64)
    check_merge(base, tmp_path, [1, 2], 4, "float16", "scales")


def test_awq_in_the_gemv_version_is_refused(tmp_path):
    tensors = {"qweight": torch.zeros(64, 32, dtype=torch.int32), "scales": torch.ones(64, 8, dtype=torch.float16)}
    base = save(tmp_path / "base", tensors, quant_method="awq", bits=4, group_size=64, version="gemv")
    adapter = write_adapter(tmp_path / "adapter", {LAYER: (torch.zeros(64, 1), [0], 4)})
    with pytest.raises(ValueError, match=r"GEMM version of AWQ.*merge in memory"):
        merge_checkpoint(base, adapter, tmp_path / "out")


def test_zero_scales_stay_zero(tmp_path):
    tensors = gptq_tensors(4, 64, 256, 64, False)
    tensors["scales"][1] = 0
    base = save(tmp_path / "base", tensors, quant_method="gptq", bits=4, group_size=64)
    check_merge(base, tmp_path, [0, 1], 4, "float16", "scales")
    assert not tensors_of(tmp_path / "out")[f"{LAYER}.scales"][1].any()


def test_scales_that_overflow_are_refused_and_nothing_is_left(tmp_path):
    base = save(tmp_path / "base", gptq_tensors(4, 64, 256, 64, False), quant_method="gptq", bits=4, group_size=64)
    adapter = write_adapter(tmp_path / "adapter", {LAYER: (torch.full((64, 1), 1e7), [0], 4)})
    with pytest.raises(ValueError, match=r"NaN or infinite scales for layer"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@settings(max_examples=25, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    rows=st.sampled_from([32, 96]),
    words=st.integers(1, 6),
    group=st.sampled_from([32, 64, 128]),
)
def test_the_geometry_of_gptq_follows_from_its_shapes(bits, rows, words, group):
    columns = 32 * words
    group = min(group, columns)
    tensors = gptq_tensors(bits, rows, columns, group, True)
    with tempfile.TemporaryDirectory() as directory:
        layer = layer_of(save(Path(directory) / "base", tensors, quant_method="gptq", group_size=group))
    assert (layer.name, layer.in_features, layer.out_features) == (f"gptq-w{bits}g{group}", columns, rows)
    assert layer.scales_shape == (rows, -(-columns // group))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu], ids=str)
def test_power_of_two_scales_are_refused_with_the_reason(dtype, tmp_path):
    tensors = {"weight_packed": torch.zeros(64, 32, dtype=torch.uint8), "weight_scale": torch.zeros(64, 2).to(dtype)}
    base = save(tmp_path / "base", tensors, quant_method="compressed-tensors")
    adapter = write_adapter(tmp_path / "adapter", {LAYER: (torch.zeros(64, 1), [0], 2)})
    with pytest.raises(ValueError, match=r"powers of two \(E8M0"):
        merge_checkpoint(base, adapter, tmp_path / "out")


def torchao_config(kind: str) -> Any:
    import torchao.quantization as ao

    return {
        "int8-row": lambda: ao.Int8WeightOnlyConfig(),
        "int8-64": lambda: ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(64)),
        "intx4-64": lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(64)),
        "intx3-32": lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=ao.PerGroup(32)),
        "float8_e4m3fn-row": lambda: ao.Float8WeightOnlyConfig(),
    }[kind]()


@pytest.mark.parametrize("kind", ["int8-row", "int8-64", "intx4-64", "intx3-32", "float8_e4m3fn-row"])
def test_torchao_loads_the_rewritten_scales(kind, tmp_path):
    pytest.importorskip("torchao")
    dense = save_wide_llama(tmp_path / "dense")
    quantized = AutoModelForCausalLM.from_pretrained(
        dense, dtype=torch.bfloat16, quantization_config=TorchAoConfig(torchao_config(kind))
    )
    quantized.save_pretrained(tmp_path / "base")
    name = "model.layers.0.mlp.down_proj"
    layer = find_layer(CheckpointFolder(tmp_path / "base"), name, SGRQConfig())
    assert layer.name == f"torchao-{kind}"
    groups = [0, 2]
    shape = layer.delta_shape(2)
    values = torch.randn(shape) * 0.1
    adapter = write_adapter(tmp_path / "adapter", {name: (values, groups, layer.selectable)})
    merge_checkpoint(tmp_path / "base", adapter, tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").get_submodule(name).weight
    original = quantized.get_submodule(name).weight
    expected = original.scale.float()
    if layer.unit == "row":
        expected[groups] *= 1 + values
    else:
        expected[:, groups] *= 1 + values
    assert same_bytes(found.scale, expected.to(original.scale.dtype))
    assert same_bytes(found.qdata, original.qdata)
    assert verify_checkpoint(tmp_path / "base", adapter, tmp_path / "out").ok


def test_what_torchao_packs_for_one_kernel_is_refused_with_a_way_out(tmp_path):
    base = save(tmp_path / "base", {"_weight_qdata": torch.zeros(8, 8, dtype=torch.int8)}, quant_method="torchao")
    adapter = write_adapter(tmp_path / "adapter", {LAYER: (torch.zeros(8, 1), [0], 1)})
    with pytest.raises(ValueError, match=r"torchao's .*merge in memory with `merge_and_unload`"):
        merge_checkpoint(base, adapter, tmp_path / "out")


def test_a_tied_output_head_is_refused(tmp_path):
    base = save(tmp_path / "base", {"weight": torch.zeros(8, 64)})
    tensors = {"lm_head.weight": torch.ones(8, 64), "model.embed_tokens.weight": torch.ones(8, 64)}
    save_file(tensors, base / "model.safetensors")
    edit_config(base, tie_word_embeddings=True)
    adapter = write_adapter(tmp_path / "adapter", {"lm_head": (torch.zeros(8, 1), [0], 1)})
    with pytest.raises(ValueError, match=r"'lm_head'.*ties it to the input embedding"):
        merge_checkpoint(base, adapter, tmp_path / "out")
