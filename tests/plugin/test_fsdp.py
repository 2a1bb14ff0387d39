"""Two processes that have a model in shards (FSDP2) train what one process does with all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model
from safetensors.torch import load_file
from support.engines import (
    ADAMW,
    FILE,
    NON_REENTRANT,
    REENTRANT,
    Case,
    Found,
    check_resumed,
    check_saved,
    check_trained,
    load_base,
    run,
    train_and_merge,
)
from torch import nn

from peft_sgrq import SGRQConfig

pytestmark = pytest.mark.slow
PACKED = "float32"  # of the dtype the model computes in, so that FSDP shards the packed weights
SHARDS = {"state_dict_type": "SHARDED_STATE_DICT"}
ACTIVATIONS = {"activation_checkpointing": True}
BFLOAT16 = {"dtype": "bfloat16", "storage": "bfloat16"}
CASES = {
    "nf4, stopped and resumed": Case(
        "fsdp2", "nf4", storage=PACKED, arguments={**ADAMW, **NON_REENTRANT}, config={"ratio": 0.4}, resume_at=2
    ),
    "nf4 nested, not resharded": Case(
        "fsdp2", "nf4-nested", storage=PACKED, arguments=REENTRANT, engine_arguments={"reshard_after_forward": False}
    ),
    "nf4, stored in bytes": Case("fsdp2", "nf4", arguments={"gradient_accumulation_steps": 2, "max_grad_norm": 0.5}),
    "dense": Case("fsdp2", "dense", config={"ratio": 0.5}),
    "activation checkpointing": Case("fsdp2", "nf4", storage=PACKED, engine_arguments=ACTIVATIONS),
    "mixed precision, as TRL does by default": Case(
        "fsdp2",
        "nf4",
        dtype="bfloat16",
        storage="bfloat16",
        arguments={"bf16": True},
        config={"adapter_dtype": "bfloat16"},
    ),
}
OTHERS = {
    "mixed precision": Case("fsdp2", "nf4", **BFLOAT16, arguments={"bf16": True, "max_steps": 1}),
    "shards saved": Case(
        "fsdp2",
        "nf4",
        storage=PACKED,
        arguments=ADAMW,
        engine_arguments={"state_dict_type": "SHARDED_STATE_DICT"},
        resume_at=2,
    ),
    "int8": Case("fsdp2", "int8", arguments={"max_steps": 1}),
    "lora": Case("fsdp2", "nf4", "lora", storage=PACKED, engine_arguments=ACTIVATIONS, arguments={"max_steps": 1}),
    "tensor parallel": Case("fsdp2", "dense", trainer="tensor parallel"),
}


def job(case: Case, directory: Path, out: Path, processes: int) -> dict[str, Any]:
    if case.trainer != "tensor parallel":
        return train_and_merge(case, directory, out, processes)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    model = load_base(case, directory)
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(
        distribute_tensor(layer.weight.detach(), init_device_mesh("cpu", (processes,)), [Shard(0)])
    )
    try:
        get_peft_model(model, SGRQConfig(task_type="CAUSAL_LM"))
    except ValueError as error:
        return {
            "refused": str(error),
            "unchanged": type(layer) is nn.Linear and model.model.layers[1].mlp.up_proj is layer,
        }
    return {}


@pytest.fixture(scope="module")
def found(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    results = tmp_path_factory.mktemp("two")
    return results, run({**CASES, **OTHERS}, llama_dir, results, job)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_what_one_does(name, found: Found, llama_dir: Path, tmp_path: Path):
    check_trained(name, CASES[name], found, llama_dir, tmp_path, wrapped="FSDPPeftModelForCausalLM")


@pytest.mark.parametrize("name", ["nf4, stopped and resumed", "shards saved"])
def test_resumed_is_never_stopped(name, found: Found):
    check_resumed(name, found)


@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_and_merged_is_what_was_trained(name, found: Found, llama_dir: Path, tmp_path: Path):
    check_saved(name, CASES[name], found, llama_dir, tmp_path)
    assert not found[1][0][name]["warnings"]


@pytest.mark.parametrize("name", ["nf4, stopped and resumed", "dense"])
def test_merging_in_place_is_refused_in_a_sentence(name, found: Found):
    for results in found[1]:
        assert "FSDP has" in results[name]["merge"] and "merge it on files" in results[name]["merge"]


def test_rounding_by_mixed_precision_is_said(found: Found):
    result = found[1][0]["mixed precision"]
    assert "error" not in result, result["trace"]
    assert any("rounded to torch.bfloat16" in text and "adapter_dtype" in text for text in result["warnings"])


def test_an_int8_base_is_refused_in_a_sentence(found: Found, llama_dir: Path, monkeypatch):
    for results in found[1]:
        assert "has lost its scales, as FSDP makes it lose them" in results["int8"]["error"]
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as `accelerate launch` does
    model = load_base(OTHERS["int8"], llama_dir)
    with pytest.raises(ValueError, match=r"q_proj' is bitsandbytes int8, and FSDP.*DDP.*not changed"):
        get_peft_model(model, SGRQConfig())
    assert not any("sgrq" in name for name, _ in model.named_parameters())


def test_a_dense_base_that_only_one_process_has_loaded_is_refused(llama_dir: Path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(ValueError, match=r"fsdp_cpu_ram_efficient_loading: false"):
        get_peft_model(load_base(CASES["dense"], llama_dir), SGRQConfig())
    get_peft_model(load_base(CASES["nf4, stored in bytes"], llama_dir), SGRQConfig())


def test_a_model_in_shards_is_refused_before_it_is_changed(found: Found):
    for results in found[1]:
        assert "up_proj.weight' is sharded over 2 devices" in results["tensor parallel"]["refused"]
        assert "tp_plan" in results["tensor parallel"]["refused"] and results["tensor parallel"]["unchanged"]


def test_peft_still_saves_empty_files_under_activation_checkpointing(found: Found):
    """Once this fails, `adapter_tensors` need not look for the names itself."""
    assert not load_file(found[0] / "lora" / FILE)


def test_a_model_can_be_saved_in_shards_but_not_its_adapter(found: Found):
    """transformers saves no model then; `accelerate` resumes from the shards."""
    assert not (found[0] / "shards saved" / FILE).exists()
