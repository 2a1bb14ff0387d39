"""Two processes that share a batch train what one process does with all of it, by DistributedDataParallel."""

from __future__ import annotations

import json
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
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
    load_gptq,
    logits,
    run,
    train_and_merge,
)
from transformers import AutoModelForCausalLM

from peft_sgrq.base.workarounds.bnb_cpu_packing import disable_cpu_packing

pytestmark = pytest.mark.slow
CASES = {
    "nf4": Case("ddp", "nf4"),
    "nf4 nested, stopped and resumed": Case("ddp", "nf4-nested", arguments=ADAMW, resume_at=2),
    "int8": Case("ddp", "int8"),
    "dense": Case("ddp", "dense", config={"ratio": 0.5}),
    "bf16, as TRL does by default": Case("ddp", "nf4", arguments={"bf16": True}),
    "checkpointing": Case("ddp", "nf4", arguments=NON_REENTRANT),
    "reentrant checkpointing": Case(
        "ddp", "dense", arguments=REENTRANT, engine_arguments={"ddp_find_unused_parameters": False}
    ),
    "accumulated": Case("ddp", "int8", arguments={"gradient_accumulation_steps": 2, "max_grad_norm": 0.5}),
    "preferences": Case("ddp", "nf4", trainer="dpo"),
}
if find_spec("gptqmodel"):
    CASES["gptq"] = Case("ddp", "gptq", load=load_gptq, engine_arguments={"ddp_broadcast_buffers": False})
SCRIPT = {"the example": Case("ddp", "nf4", trainer="script")}


def job(case: Case, directory: Path, out: Path, processes: int) -> dict[str, Any]:
    return (run_example if case.trainer == "script" else train_and_merge)(case, directory, out, processes)


def run_example(case: Case, directory: Path, out: Path, processes: int) -> dict[str, Any]:
    """`examples/sft.py`, as `accelerate launch` runs it."""
    example = Path(__file__).resolve().parents[2] / "examples" / "sft.py"
    options = [
        "--dataset_name",
        str(out.parent / "texts"),
        "--load_in_4bit",
        "--use_bnb_nested_quant",
        "--output_dir",
        str(out),
    ]
    training = ["--max_steps", "1", "--use_cpu", "--report_to", "none", "--bf16", "False", "--max_length", "32"]
    sys.argv = [str(example), "--model_name_or_path", str(directory), "--dtype", "float32", *options, *training]
    runpy.run_path(str(example), run_name="__main__")
    return {}


@pytest.fixture(scope="module")
def found(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    results = tmp_path_factory.mktemp("two")
    (results / "texts").mkdir()
    rows = [json.dumps({"text": f"The sum of {i} and {i + 3} is {2 * i + 3}."}) for i in range(8)]
    (results / "texts" / "train.jsonl").write_text("\n".join(rows))
    return results, run({**CASES, **SCRIPT}, llama_dir, results, job)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_what_one_does(name, found: Found, llama_dir: Path, tmp_path: Path):
    check_trained(name, CASES[name], found, llama_dir, tmp_path, wrapped="DistributedDataParallel")


def test_resumed_is_never_stopped(found: Found):
    check_resumed("nf4 nested, stopped and resumed", found)


@pytest.mark.parametrize("name", ["nf4", "int8", "dense"])
def test_what_is_saved_and_merged_is_what_was_trained(name, found: Found, llama_dir: Path, tmp_path: Path):
    check_saved(name, CASES[name], found, llama_dir, tmp_path)
    for results in found[1]:
        assert torch.equal(results[name]["merge"], results[name]["logits"])


def test_the_example_merges_once_what_it_saved(found: Found, llama_dir: Path):
    folder, (first, second) = found
    assert first["the example"] == second["the example"] == {}, first["the example"]
    assert load_file(folder / "the example" / FILE)
    merged = AutoModelForCausalLM.from_pretrained(folder / "the example" / "merged")
    disable_cpu_packing(merged)
    assert (folder / "the example" / "merged" / "tokenizer.json").exists()
    nested = CASES["nf4 nested, stopped and resumed"]  # TRL's arguments quantize in this way
    model = PeftModel.from_pretrained(load_base(nested, llama_dir), folder / "the example")
    assert torch.equal(logits(merged), logits(model))
