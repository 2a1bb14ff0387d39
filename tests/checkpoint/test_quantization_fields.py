"""`verify` compares what says how codes are read, and not what says how they were made."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.quantized_checkpoints import write_adapter
from transformers import GPTQConfig

from peft_sgrq import merge_checkpoint, verify_checkpoint
from peft_sgrq.checkpoint.quantization_fields import reading_fields

# As the libraries write them, and as transformers writes them anew.
BY_GPTQMODEL = {
    "bits": 4,
    "checkpoint_format": "gptq",
    "desc_act": False,
    "format": "gptq",
    "group_size": 128,
    "lm_head": False,
    "meta": {"quantizer": ["gptqmodel:7.7.0"], "damp_percent": 0.05},
    "method": "gptq",
    "pack_dtype": "int32",
    "quant_method": "gptq",
    "sym": True,
}
BY_AUTOGPTQ = {
    "bits": 4,
    "damp_percent": 0.1,
    "desc_act": False,
    "group_size": 128,
    "is_marlin_format": False,
    "model_file_base_name": "model",
    "model_name_or_path": None,
    "quant_method": "gptq",
    "static_groups": False,
    "sym": True,
    "true_sequential": True,
}
BY_AUTOAWQ = {
    "bits": 4,
    "group_size": 128,
    "modules_to_not_convert": None,
    "quant_method": "awq",
    "version": "GEMM",
    "zero_point": True,
}
BY_AUTOROUND = {
    "bits": 4,
    "group_size": 128,
    "iters": 200,
    "packing_format": "auto_round:auto_gptq",
    "quant_method": "auto-round",
    "sym": True,
}


def by_transformers(method: str, **fields: Any) -> dict[str, Any]:
    """What transformers writes of a model on its torch kernel."""
    pytest.importorskip("optimum")
    written = GPTQConfig(bits=4, group_size=128, sym=True, backend="torch").to_dict()
    return {**written, "quant_method": method, **fields}


@pytest.mark.parametrize("base", [BY_GPTQMODEL, BY_AUTOGPTQ], ids=["gptqmodel", "autogptq"])
def test_a_gptq_config_that_transformers_wrote_anew_is_read_alike(base):
    found = by_transformers("gptq", checkpoint_format="gptq", format="gptq", meta={"quantizer": ["other"]})
    assert reading_fields(found) == reading_fields(base)


def test_an_awq_config_that_transformers_wrote_anew_is_read_alike():
    found = by_transformers("awq", format="gemm", version="gemm", zero_point=True)
    found.pop("checkpoint_format", None)
    assert reading_fields(found) == reading_fields(BY_AUTOAWQ)


def test_an_autoround_config_that_names_its_kernel_is_read_alike():
    assert reading_fields({**BY_AUTOROUND, "backend": "torch", "iters": 0}) == reading_fields(BY_AUTOROUND)


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        (BY_GPTQMODEL, {"bits": 8}),
        (BY_GPTQMODEL, {"group_size": 64}),
        (BY_GPTQMODEL, {"desc_act": True}),
        (BY_GPTQMODEL, {"sym": False}),
        (BY_GPTQMODEL, {"lm_head": True}),
        (BY_GPTQMODEL, {"pack_dtype": "int8"}),
        (BY_GPTQMODEL, {"quant_method": "awq"}),
        (BY_GPTQMODEL, {"checkpoint_format": "gptq_v2"}),  # the two names contradict each other
        (BY_GPTQMODEL, {"checkpoint_format": "gptq_v2", "format": "gptq_v2"}),
        (BY_GPTQMODEL, {"dynamic": {"-:.*down_proj": {}}}),
        (BY_GPTQMODEL, {"a_field_of_tomorrow": 1}),
        (BY_AUTOGPTQ, {"checkpoint_format": "gptq_v2"}),
        (BY_AUTOGPTQ, {"is_marlin_format": True}),
        (BY_AUTOAWQ, {"zero_point": False}),
        (BY_AUTOAWQ, {"version": "gemv"}),
        (BY_AUTOAWQ, {"modules_to_not_convert": ["lm_head", "down_proj"]}),
        (BY_AUTOROUND, {"packing_format": "auto_round:auto_awq"}),
        (BY_AUTOROUND, {"packing_format": None, "backend": "torch"}),
        (BY_AUTOROUND, {"extra_config": {"model.layers.0.mlp.up_proj": {"bits": 8}}}),
    ],
    ids=lambda fields: "-".join(fields) if len(fields) < 3 else fields["quant_method"],
)
def test_a_field_that_changes_how_codes_are_read_counts(base, changes):
    assert reading_fields({**base, **changes}) != reading_fields(base)


@pytest.fixture
def packed(tmp_path):
    """A GPTQ folder of one layer, an adapter, and the two merged."""
    torch.manual_seed(0)
    base = tmp_path / "base"
    base.mkdir()
    tensors = {
        "qweight": torch.randint(-(2**31), 2**31 - 1, (128 * 4 // 32, 64), dtype=torch.int32),
        "qzeros": torch.randint(-(2**31), 2**31 - 1, (2, 64 * 4 // 32), dtype=torch.int32),
        "scales": torch.rand(2, 64).half() + 0.1,
        "g_idx": torch.arange(128, dtype=torch.int32) // 64,
    }
    save_file({f"fc.{name}": tensor for name, tensor in tensors.items()}, base / "model.safetensors")
    config = {"dtype": "float16", "quantization_config": {**BY_GPTQMODEL, "group_size": 64}}
    (base / "config.json").write_text(json.dumps(config))
    adapter = write_adapter(tmp_path / "adapter", {"fc": (torch.full((64, 1), 0.1), [1], 2)})
    merge_checkpoint(base, adapter, tmp_path / "merged", check_base=False)
    return base, adapter, tmp_path / "merged"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"backend": "torch", "meta": None, "damp_percent": 0.1, "method": None}, None),
        ({"desc_act": True}, "config.json has quantization_config.desc_act = True, expected False."),
        ({"bits": 8}, "config.json has quantization_config.bits = 8, expected 4."),
    ],
    ids=["of-the-quantizer", "activation-order", "bits"],
)
def test_verify_names_the_field_that_reads_codes_otherwise(changes, complaint, packed, tmp_path):
    base, adapter, merged = packed
    spoiled = shutil.copytree(merged, tmp_path / "spoiled")
    config = json.loads((merged / "config.json").read_text())
    config["quantization_config"] |= changes
    # transformers 4 called it otherwise
    config["torch_dtype"] = config.pop("dtype")
    (spoiled / "config.json").write_text(json.dumps(config))
    report = verify_checkpoint(base, adapter, spoiled, check_base=False)
    assert report.errors == ([] if complaint is None else [complaint])
    assert report.merged == 1


def test_verify_says_that_a_tensor_was_saved_in_another_dtype(packed, tmp_path):
    base, adapter, merged = packed
    other = shutil.copytree(merged, tmp_path / "other")
    tensors = load_file(merged / "model.safetensors")
    save_file({**tensors, "fc.qzeros": tensors["fc.qzeros"].float()}, other / "model.safetensors")
    (error,) = verify_checkpoint(base, adapter, other, check_base=False).errors
    assert "Its dtype is F32, expected I32" in error
