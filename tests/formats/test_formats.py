"""What must hold in every quantized format, on a whole model that goes through a file.

The formats are those of `library_formats.py`; one whose library is not installed is skipped by its name.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.asked_for import asked_for
from support.bases import logits, save_small_llama, train_steps
from support.fresh import logits_where_not_installed
from support.library_formats import MODEL_FORMATS, Format
from support.quantized_checkpoints import same_bytes, tensors_of
from torch import nn

from peft_sgrq import SGRQConfig, merge_checkpoint, verify_checkpoint
from peft_sgrq.checkpoint.verify import VerifyReport

pytestmark = pytest.mark.slow

IDS = torch.randint(3, 256, (2, 16), generator=torch.Generator().manual_seed(1))
by_name = functools.partial(pytest.mark.parametrize, "format", ids=lambda format: format.name)

# Tensors that a merge may change: scales, and offsets that are zero point times scale.
SCALES = {"scale", "_scale", "absmax", "scale_and_zero", "_scale_shift", "_shift"}


@dataclass
class Run:
    """What came out of training one format on the small model, merging it and saving it."""

    losses: list[float]
    base: torch.Tensor
    base_at_zero: torch.Tensor
    unmerged: torch.Tensor
    merged: torch.Tensor
    unmerged_again: torch.Tensor
    loaded: torch.Tensor
    merged_and_unloaded: torch.Tensor
    tensors: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    refusal: str = ""
    verified: VerifyReport | None = None


def flat_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all tensors of a state dict, tensor subclasses taken apart."""
    found: dict[str, torch.Tensor] = {}

    def add(name: str, tensor: torch.Tensor) -> None:
        if hasattr(tensor, "__tensor_flatten__"):
            for part in tensor.__tensor_flatten__()[0]:
                add(f"{name}.{part}", getattr(tensor, part))
        else:
            found[name] = tensor.detach().clone()

    for name, value in model.state_dict().items():
        if isinstance(value, torch.Tensor):
            add(name, value)
    return found


def same_state(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(same_bytes(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def small_dir(tmp_path_factory) -> Path:
    return save_small_llama(tmp_path_factory.mktemp("small"))


def run(format: Format, directory: Path, scratch: Path) -> Run:
    model = format.load(directory, format.dtype).eval()
    base, tensors = logits(model, IDS), {"base": flat_state(model)}
    if format.on_files:
        format.save(model, scratch / "base" / format.name)
    model = get_peft_model(model, SGRQConfig(ratio=0.5, task_type="CAUSAL_LM")).eval()
    at_zero = logits(model, IDS)
    losses = train_steps(model, IDS, steps=20)
    unmerged = logits(model.eval(), IDS)
    model.merge_adapter()
    merged = logits(model, IDS)
    model.unmerge_adapter()
    unmerged_again = logits(model, IDS)
    model.save_pretrained(scratch / "adapter" / format.name)
    plain = model.unload()
    tensors["unloaded"] = flat_state(plain)
    model = PeftModel.from_pretrained(plain, scratch / "adapter" / format.name).eval()
    loaded = logits(model, IDS)
    plain = model.merge_and_unload()
    tensors["merged"] = flat_state(plain)
    refusal = ""
    try:  # the adapter on what has it merged already
        PeftModel.from_pretrained(plain, scratch / "adapter" / format.name)
    except ValueError as error:
        refusal = str(error)
    if format.save is not None:
        (scratch / "merged" / format.name).mkdir(parents=True)
        format.save(plain, scratch / "merged" / format.name)
    found = Run(losses, base, at_zero, unmerged, merged, unmerged_again, loaded, logits(plain, IDS), tensors, refusal)
    if format.on_files:
        folders = [scratch / kind / format.name for kind in ("base", "adapter", "files")]
        merge_checkpoint(*folders)
        found.verified = verify_checkpoint(*folders)
        for kind in ("base", "merged", "files"):
            tensors[f"{kind} file"] = tensors_of(scratch / kind / format.name)
    return found


@pytest.fixture(scope="module")
def runs(request, small_dir, tmp_path_factory) -> tuple[dict[str, Run], dict[str, Any]]:
    """For each format that a selected test asks for: the run, and the logits of its saved model loaded elsewhere."""
    wanted = {format.name: format for format in asked_for(request, "format") if find_spec(format.library)}
    scratch = tmp_path_factory.mktemp("formats")
    found = {name: run(format, small_dir, scratch) for name, format in wanted.items()}
    plan = {
        f"{kind}/{name}": (format.reload, scratch / kind / name)
        for name, format in wanted.items()
        for kind, written in (("merged", format.save is not None), ("files", format.on_files))
        if written
    }
    return found, logits_where_not_installed(plan, IDS, scratch)


def run_of(format: Format, runs: tuple[dict[str, Run], dict[str, Any]]) -> Run:
    format.require()
    return runs[0][format.name]


@by_name(MODEL_FORMATS)
def test_training_starts_at_the_base_and_learns(format, runs):
    found = run_of(format, runs)
    assert torch.equal(found.base_at_zero, found.base)
    assert found.losses[-1] < found.losses[0] - 0.1


@by_name(MODEL_FORMATS)
def test_the_merged_model_gives_the_bits_of_the_unmerged_one(format, runs):
    found = run_of(format, runs)
    assert not torch.allclose(found.unmerged, found.base, atol=0.1)
    assert torch.equal(found.merged, found.unmerged)
    assert torch.equal(found.loaded, found.unmerged)
    assert torch.equal(found.merged_and_unloaded, found.unmerged)


@by_name(MODEL_FORMATS)
def test_merging_changes_scales_and_nothing_else(format, runs):
    found = run_of(format, runs)
    base, merged = found.tensors["base"], found.tensors["merged"]
    assert base.keys() == merged.keys()
    changed = {name for name in base if not same_bytes(base[name], merged[name])}
    assert changed and {name.rpartition(".")[2] for name in changed} <= SCALES


@by_name(MODEL_FORMATS)
def test_unmerging_restores_the_model(format, runs):
    found = run_of(format, runs)
    assert torch.equal(found.unmerged_again, found.unmerged)
    assert same_state(found.tensors["unloaded"], found.tensors["base"])


@by_name(MODEL_FORMATS)
def test_an_adapter_is_refused_on_what_has_it_merged(format, runs):
    found = run_of(format, runs)
    assert "has the codes but not the scales" in found.refusal
    assert "from_pretrained(" in found.refusal


@by_name([format for format in MODEL_FORMATS if format.save is not None])
def test_the_merged_file_gives_the_same_bits_where_peft_sgrq_is_not_installed(format, runs):
    found = run_of(format, runs)
    reloaded = runs[1][f"merged/{format.name}"]
    assert isinstance(reloaded, torch.Tensor), reloaded
    assert torch.equal(reloaded, found.unmerged)


ON_FILES = [format for format in MODEL_FORMATS if format.on_files]


@by_name(ON_FILES)
def test_what_is_merged_on_files_gives_the_same_bits_where_peft_sgrq_is_not_installed(format, runs):
    found = run_of(format, runs)
    reloaded = runs[1][f"files/{format.name}"]
    assert isinstance(reloaded, torch.Tensor), reloaded
    assert torch.equal(reloaded, found.unmerged)


@by_name(ON_FILES)
def test_merging_on_files_writes_the_bytes_of_the_merge_in_memory_and_changes_scales_alone(format, runs):
    tensors = run_of(format, runs).tensors
    base, in_memory, on_files = (tensors[f"{kind} file"] for kind in ("base", "merged", "files"))
    assert base.keys() == on_files.keys() == in_memory.keys()
    assert [name for name in base if not same_bytes(on_files[name], in_memory[name])] == []
    changed = {name for name in base if not same_bytes(on_files[name], base[name])}
    assert changed == {name for name in base if name.endswith("._weight_scale")} != set()


@by_name(ON_FILES)
def test_verify_finds_the_merge_on_files_right(format, runs):
    found = run_of(format, runs)
    assert (found.verified.errors, found.verified.notes) == ([], [])
    assert found.verified.merged == sum(name.endswith("._weight_scale") for name in found.tensors["base file"])
    assert found.verified.same + found.verified.merged == len(found.tensors["base file"])
