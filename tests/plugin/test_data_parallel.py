"""Two processes that share a batch train what one process does with all of it, by DistributedDataParallel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.ranks import NON_REENTRANT, REENTRANT, Case, run, train

pytestmark = pytest.mark.slow

ADAMW = {"optim": "adamw_torch", "max_steps": 4, "max_grad_norm": 1.0}
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


@pytest.fixture(scope="module")
def found(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    results = tmp_path_factory.mktemp("two")
    return results, run(CASES, llama_dir, results)


def difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of a tensor, by norms."""
    assert list(first) == list(second) and first
    return max(float((first[name] - value).norm() / value.norm()) for name, value in second.items())


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_what_one_does(name, found, llama_dir: Path, tmp_path: Path):
    _, (first, second) = found
    assert "error" not in first[name], first[name]["trace"]
    one = train(CASES[name], llama_dir, tmp_path)
    # In bfloat16 two halves of a batch round otherwise than the whole does.
    bound = 3e-2 if CASES[name].arguments.get("bf16") else 5e-6
    assert difference(first[name]["parameters"], one["parameters"]) < bound
    assert first[name]["losses"] == pytest.approx(one["losses"], rel=bound)
    assert all(torch.equal(first[name]["parameters"][key], value) for key, value in second[name]["parameters"].items())


def test_what_is_trained_is_float32(found):
    _, processes = found
    for results in processes:
        for result in results.values():
            assert {value.dtype for value in result["parameters"].values()} == {torch.float32}
            assert set(result["dtypes"]) <= {"torch.float32"}


def test_resumed_is_never_stopped(found):
    _, processes = found
    for results in processes:
        whole = results["nf4 nested, stopped and resumed"]
        resumed = whole["resumed"]
        assert whole["dtypes"] == ["torch.float32"] and len(resumed["losses"]) == 4
        assert resumed["losses"] == whole["losses"]
        assert all(torch.equal(resumed["parameters"][key], value) for key, value in whole["parameters"].items())
