"""What holds for every engine that trains by several processes, and the training they are tested on."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from benchmarks.rank_processes import run as run
from benchmarks.ranks import NON_REENTRANT as NON_REENTRANT
from benchmarks.ranks import REENTRANT as REENTRANT
from benchmarks.ranks import Case, load_base, logits, train
from peft import PeftModel
from safetensors.torch import load_file
from support.packed_layers import packed_layer
from transformers import AutoModelForCausalLM

from peft_sgrq.base.workarounds.bnb_cpu_packing import disable_cpu_packing
from peft_sgrq.checkpoint.merge import merge_checkpoint

ADAMW = {"optim": "adamw_torch", "max_steps": 4, "max_grad_norm": 1.0}
FILE = "adapter_model.safetensors"
Found = tuple[Path, list[dict[str, dict[str, Any]]]]  # where adapters are saved, and what each process returned


def load_gptq(directory: Path | str) -> Any:
    """The model with random layers of GPTQ in place of its own."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    for name, layer in list(model.named_modules()):
        if name.endswith("_proj"):
            packed = packed_layer("gptq", layer.out_features, layer.in_features).layer
            packed.scales.mul_(0.2)
            model.set_submodule(name, packed)
    return model.requires_grad_(False)


def train_and_merge(case: Case, directory: Path, out: Path, processes: int) -> dict[str, Any]:
    """`train`, the warnings it gave, and what comes of merging in place."""
    trainers: list[Any] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = train(case, directory, out, processes, trainers.append)
    found["warnings"] = [str(warning.message) for warning in caught if "the engine" in str(warning.message).lower()]
    if case.method == "sgrq":
        try:
            trainers[0].model.merge_adapter()
            found["merge"] = logits(trainers[0].model_wrapped)
        except ValueError as error:
            found["merge"] = str(error)
    return found


def difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of a tensor, by norms."""
    assert list(first) == list(second) and first
    return max(float((first[name] - value).norm() / value.norm()) for name, value in second.items())


def check_trained(name: str, case: Case, found: Found, llama_dir: Path, tmp_path: Path, wrapped: str) -> None:
    """Two processes train what one does, alike, and in float32."""
    _, (first, second) = found
    assert "error" not in first[name], first[name]["trace"]
    assert first[name]["wrapped"] == wrapped
    one = train(case, llama_dir, tmp_path)
    # In bfloat16 two halves of a batch round otherwise than the whole does.
    bound = 5e-6 if case.dtype == "float32" and not case.arguments.get("bf16") else 3e-2
    assert difference(first[name]["parameters"], one["parameters"]) < bound
    torch.testing.assert_close(first[name]["losses"], one["losses"], rtol=bound, atol=0)
    assert same(first[name]["parameters"], second[name]["parameters"])
    assert {value.dtype for value in first[name]["parameters"].values()} == {torch.float32}
    assert set(first[name]["dtypes"]) <= {"torch.float32"}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return list(first) == list(second) and all(torch.equal(second[key], value) for key, value in first.items())


def check_resumed(name: str, found: Found) -> None:
    """Training that was stopped has the bits of training that was not."""
    for results in found[1]:
        whole, resumed = results[name], results[name]["resumed"]
        assert whole["dtypes"] == ["torch.float32"] and len(resumed["losses"]) == 4
        assert resumed["losses"] == whole["losses"] and same(resumed["parameters"], whole["parameters"])


def check_saved(name: str, case: Case, found: Found, llama_dir: Path, tmp_path: Path) -> None:
    """The saved adapter, in one process, computes what the engine did, and so do both ways of merging it."""
    folder, (first, _) = found
    expected, adapter = first[name]["logits"], folder / name
    stored = load_file(adapter / FILE)
    assert len(stored) == 2 * len(first[name]["parameters"])
    model = PeftModel.from_pretrained(load_base(case, llama_dir), adapter)
    with torch.autocast("cpu", torch.bfloat16, enabled=bool(case.arguments.get("bf16"))):
        assert torch.equal(logits(model), expected)
        base = load_base(case, llama_dir)
        base.save_pretrained(tmp_path / "base")
        merge_checkpoint(tmp_path / "base", adapter, tmp_path / "on files")
        model.merge_and_unload().save_pretrained(tmp_path / "in memory")
        for merged in ("on files", "in memory"):
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path / merged, dtype=getattr(torch, case.dtype))
            disable_cpu_packing(loaded)
            assert torch.equal(logits(loaded), expected)
