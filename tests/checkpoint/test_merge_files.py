"""Merged on files, reloaded without peft_sgrq: the bits of the unmerged model, the bytes of the merge in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.asked_for import asked_for
from support.bases import logits, train_steps
from support.format_base import AUTO, NO_PACKING
from support.fresh import logits_where_not_installed
from support.quantized_checkpoints import FORMATS, Format, same_bytes, tensors_of
from transformers import AutoModelForCausalLM

from peft_sgrq import SGRQConfig, merge_checkpoint, verify_checkpoint

pytestmark = pytest.mark.slow


@dataclass
class Merged:
    base: Path
    adapter: Path
    on_files: Path
    in_memory: Path
    plain: torch.Tensor
    zero_delta: torch.Tensor
    unmerged: torch.Tensor
    merged_in_memory: torch.Tensor
    reloaded: torch.Tensor | None = None
    reloaded_from_memory: torch.Tensor | None = None


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 256, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def merged_formats(request, tmp_path_factory, ids) -> dict[str, Merged]:
    """Each format asked for, trained for 20 steps, merged both ways, and reloaded where peft_sgrq is not installed."""
    found: dict[str, Merged] = {}
    for form in asked_for(request, "form"):
        root = tmp_path_factory.mktemp(form.name)
        try:
            found[form.name] = train_and_merge(form, root, ids)
        except pytest.skip.Exception:
            continue
    directories = [path for merged in found.values() for path in (merged.on_files, merged.in_memory)]
    plan = {str(path): (AUTO + NO_PACKING, path) for path in directories}
    reloaded = logits_where_not_installed(plan, ids, tmp_path_factory.mktemp("fresh"))
    assert all(isinstance(value, torch.Tensor) for value in reloaded.values()), reloaded
    for merged in found.values():
        merged.reloaded = reloaded[str(merged.on_files)]
        merged.reloaded_from_memory = reloaded[str(merged.in_memory)]
    return found


def train_and_merge(form: Format, root: Path, ids: torch.Tensor) -> Merged:
    base = form.make(root)
    plain = logits(form.load(base), ids)
    model = form.adapted(base)
    zero_delta = logits(model, ids)
    train_steps(model, ids, steps=20)
    unmerged = logits(model.eval(), ids)
    model.save_pretrained(root / "adapter")
    merge_checkpoint(base, root / "adapter", root / "files")
    whole = model.merge_and_unload()
    whole.save_pretrained(root / "memory")
    return Merged(
        base, root / "adapter", root / "files", root / "memory", plain, zero_delta, unmerged, logits(whole, ids)
    )


@pytest.fixture(params=FORMATS, ids=lambda form: form.name)
def form(request) -> Format:
    if request.param.needs:
        pytest.importorskip(request.param.needs)
    return request.param


@pytest.fixture
def merged(merged_formats, form) -> Merged:
    return merged_formats[form.name]


def test_zero_delta_gives_the_bits_of_the_base(merged):
    assert torch.equal(merged.zero_delta, merged.plain)


def test_merged_on_files_gives_the_bits_of_the_trained_model_where_peft_sgrq_is_not_installed(merged):
    assert not torch.equal(merged.unmerged, merged.plain)
    assert torch.equal(merged.reloaded, merged.unmerged)


def test_merged_in_memory_gives_the_bits_of_the_trained_model(merged):
    assert torch.equal(merged.merged_in_memory, merged.unmerged)
    assert torch.equal(merged.reloaded_from_memory, merged.unmerged)


def test_both_merges_write_the_same_bytes(merged):
    on_files, in_memory = tensors_of(merged.on_files), tensors_of(merged.in_memory)
    assert on_files.keys() == in_memory.keys()
    assert [name for name in on_files if not same_bytes(on_files[name], in_memory[name])] == []


def test_only_scales_differ_from_the_base(merged, form):
    base, after = tensors_of(merged.base), tensors_of(merged.on_files)
    changed = {name for name in base if name not in after or not same_bytes(base[name], after[name])}
    assert changed
    ends = (".absmax", ".SCB", "weight_scale", "weight_scale_inv", "nested_absmax", "nested_quant_map")
    if "dense" in form.name or form.name == "gpt2":
        assert all(name.endswith(".weight") for name in changed)
    else:
        assert all(name.endswith(ends) or "quant_state" in name for name in changed)
    assert not set(after) - set(base)


def test_every_other_file_is_carried_over(merged):
    files = {path.name for path in merged.base.iterdir()}
    assert {path.name for path in merged.on_files.iterdir()} == files
    same = files - {"model.safetensors", "config.json"}
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json"} <= same
    for name in same:
        assert (merged.base / name).read_bytes() == (merged.on_files / name).read_bytes()


def test_verify_finds_both_merges_right(merged):
    on_files = verify_checkpoint(merged.base, merged.adapter, merged.on_files)
    assert (on_files.errors, on_files.notes) == ([], [])
    assert on_files.same and on_files.merged
    assert verify_checkpoint(merged.base, merged.adapter, merged.in_memory).errors == []


def test_an_adapter_loads_on_its_base_with_the_bits_it_was_saved_with(merged, form, ids):
    model = PeftModel.from_pretrained(form.load(merged.base), merged.adapter)
    assert torch.equal(logits(model, ids), merged.unmerged)


def test_disabling_and_unmerging_give_the_base_back(merged, form, ids):
    model = PeftModel.from_pretrained(form.load(merged.base), merged.adapter)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), merged.plain)
    for _ in range(2):
        model.merge_adapter()
        assert torch.equal(logits(model, ids), merged.unmerged)
        model.unmerge_adapter()
        with model.disable_adapter():
            assert torch.equal(logits(model, ids), merged.plain)
    assert torch.equal(logits(model, ids), merged.unmerged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["compressed-tensors-W4A16", "compressed-tensors-FP8_DYNAMIC"])
def test_scales_are_written_in_the_dtype_they_were_trained_in(name, dtype, merged_formats, tmp_path, ids):
    pytest.importorskip("compressed_tensors")
    base = merged_formats[name].base  # its scales are bfloat16; transformers casts them to the dtype of the model
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), SGRQConfig(init_weights=False))
    expected = logits(model.eval(), ids)
    model.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    assert verify_checkpoint(base, tmp_path / "adapter", tmp_path / "out").ok
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype), ids), expected)
