"""Two processes train by DeepSpeed ZeRO what one process does without it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.engines import (
    ADAMW,
    NON_REENTRANT,
    REENTRANT,
    Case,
    Found,
    check_resumed,
    check_saved,
    check_trained,
    run,
    train_and_merge,
)

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (`make engines`)")
pytestmark = pytest.mark.slow

CASES = {
    "zero2 nf4, stopped and resumed": Case("zero2", "nf4", arguments={**ADAMW, **NON_REENTRANT}, resume_at=2),
    "zero2 int8": Case("zero2", "int8", arguments={"gradient_accumulation_steps": 2, "max_grad_norm": 0.5}),
    "zero2, bf16 as TRL does by default": Case("zero2", "nf4", dtype="bfloat16", arguments={"bf16": True}),
    "zero3 nf4, stopped and resumed": Case("zero3", "nf4-nested", arguments={**ADAMW, **REENTRANT}, resume_at=2),
    "zero3 dense": Case("zero3", "dense", config={"ratio": 0.5}),
}


@pytest.fixture(scope="module")
def found(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    results = tmp_path_factory.mktemp("two")
    return results, run(CASES, llama_dir, results, train_and_merge)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_what_one_does(name, found: Found, llama_dir: Path, tmp_path: Path):
    check_trained(name, CASES[name], found, llama_dir, tmp_path, wrapped="DeepSpeedEngine")


@pytest.mark.parametrize("name", [name for name in CASES if "resumed" in name])
def test_resumed_is_never_stopped(name, found: Found):
    check_resumed(name, found)


@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_and_merged_is_what_was_trained(name, found: Found, llama_dir: Path, tmp_path: Path):
    check_saved(name, CASES[name], found, llama_dir, tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_merging_in_place_is_exact_or_refused_in_a_sentence(name, found: Found):
    for results in found[1]:
        merged = results[name]["merge"]
        if name.startswith("zero2"):
            assert torch.equal(merged, results[name]["logits"])
        else:
            assert "DeepSpeed ZeRO-3 has" in merged and "merge it on files" in merged
