"""GPTQ, AWQ and AutoRound on a whole model: trained, merged, saved, and read by the format's own loader elsewhere."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from support.bases import logits, train_steps
from support.fresh import logits_where_not_installed
from support.packed_checkpoints import CHECKPOINTS, Checkpoint, in_dtype
from support.printed_code import run_card
from support.quantized_checkpoints import same_bytes
from torch import nn
from transformers import AutoModelForCausalLM

from peft_sgrq import SGRQConfig, merge_checkpoint, verify_checkpoint
from peft_sgrq.base.loading import loading_code
from peft_sgrq.checkpoint.verify import VerifyReport

pytestmark = pytest.mark.slow

IDS = torch.randint(3, 256, (2, 16), generator=torch.Generator().manual_seed(1))
by_name = functools.partial(pytest.mark.parametrize, "checkpoint", CHECKPOINTS, ids=lambda checkpoint: checkpoint.name)


@dataclass
class Run:
    """What came out of training one checkpoint, merging the adapter and saving the model."""

    losses: list[float]
    logits: dict[str, torch.Tensor]
    states: dict[str, dict[str, torch.Tensor]]
    code: str
    refusal: str
    verified: VerifyReport
    verified_in_memory: VerifyReport
    quantization: dict[str, dict[str, Any]]


def copied_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == value.dtype and torch.equal(one[name], value) for name, value in other.items()
    )


def run(checkpoint: Checkpoint, directory: Path, scratch: Path) -> Run:
    found: dict[str, torch.Tensor] = {}
    found["base"] = logits(checkpoint.load(directory), IDS)
    # Not the model that has run: GPTQModel rounds AWQ's scales when it does (see base/workarounds/awq_scale_dtype.py).
    model = checkpoint.load(directory)
    states = {"base": copied_state(model)}
    model = get_peft_model(model, SGRQConfig(ratio=0.5, task_type="CAUSAL_LM")).eval()
    found["zero"] = logits(model, IDS)
    losses = train_steps(model, IDS, steps=20)
    found["unmerged"] = logits(model.eval(), IDS)
    model.merge_adapter()
    found["merged"] = logits(model, IDS)
    model.unmerge_adapter()
    found["again"] = logits(model, IDS)
    with model.disable_adapter():
        found["disabled"] = logits(model, IDS)
    model.save_pretrained(scratch / "adapter")
    merge_checkpoint(directory, scratch / "adapter", scratch / "files")
    verified = verify_checkpoint(directory, scratch / "adapter", scratch / "files")
    code = loading_code(model.peft_config["default"]).clause()
    plain = model.unload()
    states["unloaded"] = copied_state(plain)
    found["unloaded"] = logits(plain, IDS)
    found["as printed"] = logits(run_card(scratch / "adapter", scratch / "printed")["merged"].eval(), IDS)
    model = PeftModel.from_pretrained(checkpoint.load(directory), scratch / "adapter").eval()
    found["loaded"] = logits(model, IDS)
    plain = model.merge_and_unload()
    found["plain"] = logits(plain, IDS)
    plain.save_pretrained(scratch / "merged")
    found["after saving"] = logits(plain, IDS)
    plain.load_state_dict(plain.state_dict())
    found["after loading its state"] = logits(plain, IDS)
    refusal = ""
    try:  # the adapter on what has it merged already
        PeftModel.from_pretrained(checkpoint.load(scratch / "merged"), scratch / "adapter")
    except ValueError as error:
        refusal = str(error)
    published = in_dtype(directory, checkpoint.dtype, scratch / "published")
    verified_in_memory = verify_checkpoint(published, scratch / "adapter", scratch / "merged")
    quantization = {
        "checkpoint": json.loads((directory / "config.json").read_text())["quantization_config"],
        "merged": json.loads((scratch / "merged" / "config.json").read_text())["quantization_config"],
        "adapter": json.loads((scratch / "adapter" / "adapter_config.json").read_text())["base_quantization"],
    }
    return Run(losses, found, states, code, refusal, verified, verified_in_memory, quantization)


def stance(name: str) -> str:
    """GPTQModel compiles its dequantization, which takes seconds a model: one of each way to unpack does."""
    return "default" if name in ("gptq-4bit", "gptq-3bit") else "force_eager"


@pytest.fixture(scope="session")
def runs(packed_checkpoints, tmp_path_factory) -> dict[str, Run]:
    """The run of each checkpoint, with the logits of its merged file where peft_sgrq is not installed."""
    scratch = tmp_path_factory.mktemp("runs")
    wanted = {checkpoint.name: checkpoint for checkpoint in CHECKPOINTS if checkpoint.name in packed_checkpoints}
    found = {}
    for name, checkpoint in wanted.items():
        with torch.compiler.set_stance(stance(name)):
            found[name] = run(checkpoint, packed_checkpoints[name], scratch / name)
    plan = {
        f"{name}/{merge}": (
            f"torch.compiler.set_stance({stance(name)!r})\n{checkpoint.reload}",
            scratch / name / merge,
        )
        for name, checkpoint in wanted.items()
        for merge in ("merged", "files")
    }
    for key, value in logits_where_not_installed(plan, IDS, scratch).items():
        assert isinstance(value, torch.Tensor), value
        name, merge = key.split("/")
        found[name].logits[f"reloaded {merge}"] = value
        found[name].states[merge] = load_file(scratch / name / merge / "model.safetensors")
        found[name].states["file"] = load_file(packed_checkpoints[name] / "model.safetensors")
    return found


@pytest.fixture
def found(checkpoint: Checkpoint, packed_checkpoints: dict[str, Path], request: pytest.FixtureRequest) -> Run:
    checkpoint.require()
    return request.getfixturevalue("runs")[checkpoint.name]


def check_equal(found: Run, *names: str) -> None:
    first, *rest = (found.logits[name] for name in names)
    assert all(other.dtype == first.dtype and torch.equal(other, first) for other in rest)


@by_name()
def test_training_starts_at_the_base_and_learns(checkpoint, found):
    check_equal(found, "base", "zero")
    assert found.losses[-1] < found.losses[0] - 0.1


@by_name()
def test_the_merged_model_gives_the_bits_of_the_unmerged_one(checkpoint, found):
    assert not torch.allclose(found.logits["unmerged"], found.logits["base"], atol=0.1)
    check_equal(
        found,
        "unmerged",
        "merged",
        "again",
        "as printed",
        "loaded",
        "plain",
        "after saving",
        "after loading its state",
    )


@by_name()
def test_the_merged_file_gives_the_same_bits_where_peft_sgrq_is_not_installed(checkpoint, found):
    check_equal(found, "unmerged", "reloaded merged")


@by_name()
def test_what_is_merged_on_files_gives_the_same_bits_where_peft_sgrq_is_not_installed(checkpoint, found):
    check_equal(found, "unmerged", "reloaded files")


@by_name()
def test_merging_on_files_writes_the_scales_of_the_merge_in_memory_and_nothing_else(checkpoint, found):
    base, in_memory, on_files = (found.states[name] for name in ("file", "merged", "files"))
    assert on_files.keys() == base.keys()
    scales = {name for name in base if name.endswith(".scales")}
    assert scales and same({name: on_files[name] for name in scales}, {name: in_memory[name] for name in scales})
    others = base.keys() - scales
    assert all(same_bytes(on_files[name], base[name]) for name in others)
    changed = {name for name in scales if not same_bytes(on_files[name], base[name].to(on_files[name].dtype))}
    assert changed == scales


@by_name()
def test_verify_finds_the_merge_on_files_right(checkpoint, found):
    assert (found.verified.errors, found.verified.notes) == ([], [])
    assert found.verified.merged == sum(name.endswith(".scales") for name in found.states["file"])
    assert found.verified.same + found.verified.merged == len(found.states["file"])


@by_name()
def test_verify_finds_the_merge_in_memory_right(checkpoint, found):
    assert found.verified_in_memory.errors == []
    assert found.verified_in_memory.merged == found.verified.merged


@by_name()
def test_the_kernel_of_the_training_is_not_saved(checkpoint, found):
    before, after = (found.quantization[name] for name in ("checkpoint", "merged"))
    assert after.get("backend") in (None, "auto", before.get("backend"))
    assert "backend" not in found.quantization["adapter"]


@by_name()
def test_undoing_gives_the_base_back(checkpoint, found):
    check_equal(found, "base", "disabled", "unloaded")
    # But for the zero points of an unloaded model, those of the file (see base/workarounds/gptq_zero_points.py).
    names = [name for name in found.states["base"] if not name.endswith("qzeros")]
    base, unloaded = (
        {name: state[name] for name in names} for state in (found.states["base"], found.states["unloaded"])
    )
    assert same(unloaded, base)


@by_name()
def test_the_merged_file_differs_from_the_checkpoint_in_scales_alone(checkpoint, found):
    before, after = found.states["file"], found.states["merged"]
    assert before.keys() == after.keys()
    half = (torch.float16, torch.bfloat16)
    for name, value in before.items():
        field = name.rpartition(".")[2]
        if field == "scales":
            # AWQ's file holds bfloat16 or float16; in memory it is float16, and that is saved.
            assert value.dtype in half and after[name].dtype == torch.float16
            assert not torch.equal(after[name], value.half())
        elif field in ("qweight", "qzeros", "g_idx"):
            assert after[name].dtype == value.dtype and torch.equal(after[name], value), name
        else:  # embeddings, norms and the head, in the dtype the model was loaded in
            assert torch.equal(after[name], value.to(after[name].dtype)), name


@by_name()
def test_an_adapter_is_refused_on_what_has_it_merged_and_told_how_to_load_its_base(checkpoint, found):
    assert "has the codes but not the scales" in found.refusal
    assert found.code in found.refusal
    kernel = checkpoint.config.partition("backend=")[2].rstrip(")")
    assert f"backend={kernel}" in found.code and checkpoint.config.partition("(")[0] in found.code


@by_name()
def test_that_code_loads_the_base(checkpoint, packed_checkpoints, found):
    import transformers

    names = {name: getattr(transformers, name) for name in ("AutoRoundConfig", "AwqConfig", "GPTQConfig")}
    model = eval(found.code, {"AutoModelForCausalLM": AutoModelForCausalLM, **names})
    assert torch.equal(logits(model.eval(), IDS), found.logits["base"])


# kernels

_DEFAULTS: list[tuple[Checkpoint, str]] = [
    (checkpoint, '"auto"') for checkpoint in CHECKPOINTS if checkpoint.name in ("gptq-4bit", "awq-4bit")
] + [(checkpoint, '"auto_trainable"') for checkpoint in CHECKPOINTS if checkpoint.name in ("gptq-4bit", "awq-4bit")]


_NATIVE: dict[str, Callable[[Any], Any]] = {
    "gptq-4bit": lambda kernels: kernels.GPTQ_TORCH,
    "gptq-4bit-asym-v2": lambda kernels: kernels.TORCH,
    "awq-4bit": lambda kernels: kernels.AWQ_TORCH,
}


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    "checkpoint",
    [checkpoint for checkpoint in CHECKPOINTS if checkpoint.name in _NATIVE],
    ids=lambda checkpoint: checkpoint.name,
)
def test_a_model_of_gptqmodels_own_loader_is_trained_merged_and_saved(checkpoint, packed_checkpoints, tmp_path):
    checkpoint.require()
    from gptqmodel import BACKEND, GPTQModel

    options = {"backend": _NATIVE[checkpoint.name](BACKEND), "device": "cpu", "dtype": torch.bfloat16}
    loaded = GPTQModel.load(str(packed_checkpoints[checkpoint.name]), **options)
    model = get_peft_model(loaded.model, SGRQConfig(ratio=0.5, task_type="CAUSAL_LM"))
    train_steps(model, IDS, steps=3)
    unmerged = logits(model.eval(), IDS)
    plain = model.merge_and_unload()
    assert torch.equal(logits(plain, IDS), unmerged)
    plain.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    again = GPTQModel.load(str(tmp_path), **options)
    assert torch.equal(logits(again.model.eval(), IDS), unmerged)
