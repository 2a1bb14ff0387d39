"""Merging on files: adapters and bases that do not fit, what else an adapter may bring, and names that differ."""

from __future__ import annotations

import json
import shutil

import huggingface_hub
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.bases import NF4, adapted, train_steps
from support.quantized_checkpoints import (
    DENSE_FILES,
    NF4_NESTED_FILES,
    base_and_adapter,
    edited,
    same_bytes,
    tensors_of,
    write_adapter,
)

from peft_sgrq import merge_checkpoint, verify_checkpoint

# adapters and bases that do not fit


def test_another_base_is_refused(nested, tmp_path):
    base, adapter = nested
    other = tmp_path / "other"
    shutil.copytree(base, other)
    tensors = load_file(other / "model.safetensors")
    name = next(key for key in tensors if key.endswith("q_proj.weight"))
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has other weights than the one the adapter was trained on"):
        merge_checkpoint(other, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge_checkpoint(other, adapter, tmp_path / "out", check_base=False)


def test_a_base_that_is_merged_already_is_refused(nested, tmp_path):
    base, adapter = nested
    merge_checkpoint(base, adapter, tmp_path / "once")
    with pytest.raises(ValueError, match=r"has the codes but not the scales"):
        merge_checkpoint(tmp_path / "once", adapter, tmp_path / "twice")


def test_an_adapter_of_a_base_quantized_while_loading_is_told_what_to_do(llama_dir, tmp_path):
    adapted(NF4, llama_dir).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"is not quantized in the checkpoint.*Save that base with `save_pretrained`"):
        merge_checkpoint(None, tmp_path / "adapter", tmp_path / "out")  # the base the adapter names
    NF4.load(llama_dir).save_pretrained(tmp_path / "base")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize("keep", [10, -1])
def test_a_truncated_adapter_is_refused(keep, nested, tmp_path):
    base, adapter = nested
    broken = edited(adapter, tmp_path / "broken")
    file = broken / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="truncated or corrupt"):
        merge_checkpoint(base, broken, tmp_path / "out")


def test_nan_deltas_are_refused(nested, tmp_path):
    base, adapter = nested
    broken = edited(adapter, tmp_path / "broken")
    tensors = load_file(broken / "adapter_model.safetensors")
    next(value for key, value in tensors.items() if key.endswith("weight"))[0, 0] = float("nan")
    save_file(tensors, broken / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"NaN or infinite deltas for layer"):
        merge_checkpoint(base, broken, tmp_path / "out")


def test_deltas_of_another_shape_are_refused(nested, tmp_path):
    base, _ = nested
    adapter = write_adapter(tmp_path / "adapter", {"model.layers.0.mlp.down_proj": (torch.zeros(64, 3), [0, 1, 2], 3)})
    with pytest.raises(ValueError, match=r"have shape \(64, 3\) for 3 selected groups, expected"):
        merge_checkpoint(base, adapter, tmp_path / "out")


def test_a_layer_the_base_does_not_have_is_named(nested, tmp_path):
    base, _ = nested
    adapter = write_adapter(tmp_path / "adapter", {"model.layers.9.mlp.down_proj": (torch.zeros(64, 1), [0], 2)})
    with pytest.raises(ValueError, match=r"Layer 'model\.layers\.9\.mlp\.down_proj' cannot be merged"):
        merge_checkpoint(base, adapter, tmp_path / "out")


def test_adapters_of_other_tuners_are_refused(llama_dir, nested, tmp_path):
    lora = get_peft_model(NF4.load(llama_dir), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match=r"type .*LORA, expected SGRQ"):
        merge_checkpoint(nested[0], tmp_path / "lora", tmp_path / "out")


def test_folders_without_an_adapter_or_a_checkpoint_are_named(nested, tmp_path):
    base, adapter = nested
    with pytest.raises(ValueError, match=r"holds no adapter"):
        merge_checkpoint(base, base, tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds no checkpoint in safetensors"):
        merge_checkpoint(adapter, adapter, tmp_path / "out")
    with pytest.raises(ValueError, match=r"base model .*no folder here and could not be had from the Hub"):
        merge_checkpoint("nobody/nothing", adapter, tmp_path / "out")
    with pytest.raises(ValueError, match=r"does not name its base"):
        nameless = edited(adapter, tmp_path / "nameless", base_model_name_or_path=None)
        merge_checkpoint(None, nameless, tmp_path / "out")


def test_the_base_is_found_in_the_cache_of_the_hub(nested, tmp_path, monkeypatch):
    base, adapter = nested
    cached = tmp_path / "cache" / "models--org--base"
    (cached / "snapshots").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    blobs = cached / "blobs"
    shutil.copytree(base, blobs)
    (cached / "snapshots" / ("0" * 40)).mkdir()
    for blob in blobs.iterdir():  # the cache has links to blobs
        (cached / "snapshots" / ("0" * 40) / blob.name).symlink_to(blob)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    merge_checkpoint("org/base", adapter, tmp_path / "out")
    assert verify_checkpoint("org/base", adapter, tmp_path / "out").ok
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    with pytest.raises(ValueError, match=r"'org/base' is no folder here and could not be had from the Hub"):
        merge_checkpoint("org/base", adapter, tmp_path / "other", revision="v2")


# the config, names, and what else an adapter may bring


def test_the_config_says_nested_only_while_a_layer_is(nested, tmp_path):
    base, adapter = nested
    report = merge_checkpoint(base, adapter, tmp_path / "all")
    assert report.layers == 14
    assert not json.loads((tmp_path / "all" / "config.json").read_text())["quantization_config"][
        "bnb_4bit_use_double_quant"
    ]
    model = NF4_NESTED_FILES.adapted(base, init_weights=False, target_modules=["q_proj"])
    model.save_pretrained(tmp_path / "few")
    merge_checkpoint(base, tmp_path / "few", tmp_path / "some")
    assert (tmp_path / "some" / "config.json").read_bytes() == (base / "config.json").read_bytes()


@pytest.mark.parametrize("form", [NF4_NESTED_FILES, DENSE_FILES], ids=lambda form: form.name)
def test_a_checkpoint_of_the_bare_model_is_found_under_its_own_names(form, tmp_path):
    base, adapter = base_and_adapter(form, tmp_path)
    bare = tmp_path / "bare"
    shutil.copytree(base, bare)
    tensors = load_file(bare / "model.safetensors")
    save_file({key.removeprefix("model."): value for key, value in tensors.items()}, bare / "model.safetensors")
    merge_checkpoint(bare, adapter, tmp_path / "out")
    merge_checkpoint(base, adapter, tmp_path / "named")
    out, named = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "named")
    assert all(same_bytes(value, out[key.removeprefix("model.")]) for key, value in named.items())


@pytest.mark.parametrize("form", [NF4_NESTED_FILES, DENSE_FILES], ids=lambda form: form.name)
def test_modules_to_save_and_token_rows_are_merged_as_in_memory(form, tmp_path, ids):
    base = form.make(tmp_path)
    ids[0, :2] = torch.tensor([3, 7])
    model = form.adapted(base, modules_to_save=["lm_head"], trainable_token_indices=[3, 7])
    train_steps(model, ids)
    model.eval().save_pretrained(tmp_path / "adapter")
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    model.merge_and_unload().save_pretrained(tmp_path / "memory")
    before, out, memory = (tensors_of(path) for path in (base, tmp_path / "out", tmp_path / "memory"))
    assert not torch.equal(out["lm_head.weight"], before["lm_head.weight"])
    differing = (out["model.embed_tokens.weight"] != before["model.embed_tokens.weight"]).any(1).nonzero().flatten()
    assert differing.tolist() == [3, 7]
    assert out.keys() == memory.keys()
    assert [key for key in out if not same_bytes(out[key], memory[key])] == []
    assert verify_checkpoint(base, tmp_path / "adapter", tmp_path / "out").ok


def test_modules_the_checkpoint_does_not_have_are_refused(nested, tmp_path):
    base, adapter = nested
    broken = edited(adapter, tmp_path / "broken")
    tensors = load_file(broken / "adapter_model.safetensors")
    save_file({**tensors, "base_model.model.score.weight": torch.ones(2, 64)}, broken / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"'score\.weight' \(`modules_to_save`\), which the checkpoint does not have"):
        merge_checkpoint(base, broken, tmp_path / "out")


def test_a_resized_vocabulary_is_refused(nested, tmp_path):
    base, adapter = nested
    broken = edited(adapter, tmp_path / "broken")
    tensors = load_file(broken / "adapter_model.safetensors")
    save_file(
        {**tensors, "base_model.model.lm_head.weight": torch.ones(300, 64)}, broken / "adapter_model.safetensors"
    )
    with pytest.raises(ValueError, match=r"of shape \(300, 64\), the checkpoint has \(259, 64\)"):
        merge_checkpoint(base, broken, tmp_path / "out")


def test_an_adapter_in_bfloat16_is_merged_as_in_memory(tmp_path):
    base, adapter = base_and_adapter(NF4_NESTED_FILES, tmp_path, adapter_dtype="bfloat16")
    merge_checkpoint(base, adapter, tmp_path / "out")
    model = PeftModel.from_pretrained(NF4_NESTED_FILES.load(base), adapter)
    model.merge_and_unload().save_pretrained(tmp_path / "memory")
    out, memory = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "memory")
    assert all(same_bytes(out[key], memory[key]) for key in memory)
