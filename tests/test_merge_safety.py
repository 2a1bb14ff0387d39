"""Merging on files refuses what is broken, leaves nothing half-written, and loses nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from bases import NF4, adapted, train_steps
from checkpoints import (
    DENSE_FILES,
    NF4_NESTED_FILES,
    edit_config,
    in_shards,
    replaced,
    same_bytes,
    tensors_of,
    write_adapter,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_sgrq import SGRQConfig, merge_checkpoint, verify_checkpoint
from peft_sgrq.checkpoint.folder import CheckpointFolder
from peft_sgrq.cli import main

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def nested(tmp_path_factory) -> tuple[Path, Path]:
    """A nested nf4 base and an adapter with random deltas."""
    return base_and_adapter(NF4_NESTED_FILES, tmp_path_factory.mktemp("nested"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> tuple[Path, Path]:
    return base_and_adapter(DENSE_FILES, tmp_path_factory.mktemp("dense"))


def base_and_adapter(form: Any, root: Path, **config: Any) -> tuple[Path, Path]:
    torch.manual_seed(0)
    base = form.make(root)
    form.adapted(base, init_weights=False, **config).save_pretrained(root / "adapter")
    return base, root / "adapter"


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def edited(adapter: Path, out: Path, **fields: Any) -> Path:
    """A copy of an adapter with fields of its config changed."""
    shutil.copytree(adapter, out)
    path = out / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return out


# shards


def test_shards_are_merged_like_one_file(nested, tmp_path):
    base, adapter = nested
    merge_checkpoint(base, adapter, tmp_path / "whole")
    shards = in_shards(base, tmp_path / "shards")
    merge_checkpoint(shards, adapter, tmp_path / "out")
    whole, out = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "out")
    assert whole.keys() == out.keys()
    assert all(same_bytes(whole[name], out[name]) for name in whole)
    assert verify_checkpoint(shards, adapter, tmp_path / "out").ok
    assert verify_checkpoint(shards, adapter, tmp_path / "whole").errors == []  # it does not matter in which files
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_index_names_what_is_there_and_its_size(nested, tmp_path):
    base, adapter = nested
    merge_checkpoint(in_shards(base, tmp_path / "shards"), adapter, tmp_path / "out")
    index, tensors = json.loads((tmp_path / "out" / INDEX).read_text()), tensors_of(tmp_path / "out")
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "out" / file)


def test_every_tensor_is_aligned_to_its_dtype(nested, tmp_path):
    base, adapter = nested
    merge_checkpoint(in_shards(base, tmp_path / "shards"), adapter, tmp_path / "out")
    folder = CheckpointFolder(tmp_path / "out")
    for name in folder:
        assert folder.entry(name).start % folder.tensor(name).element_size() == 0


def test_a_missing_shard_is_named(nested, tmp_path):
    base, adapter = nested
    shards = in_shards(base, tmp_path / "shards")
    (shards / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of the 3 files .*model-00002-of-00003\.safetensors"):
        merge_checkpoint(shards, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("keep", [4, 200, -1], ids=["no-header", "in-the-header", "last-byte"])
def test_a_truncated_shard_is_named(keep, nested, tmp_path):
    base, adapter = nested
    shards = in_shards(base, tmp_path / "shards")
    file = shards / "model-00003-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model-00003-of-00003\.safetensors is truncated or corrupt"):
        merge_checkpoint(shards, adapter, tmp_path / "out")


def test_an_index_that_names_absent_tensors_is_refused(nested, tmp_path):
    base, adapter = nested
    shards = in_shards(base, tmp_path / "shards")
    index = json.loads((shards / INDEX).read_text())
    index["weight_map"]["model.ghost.weight"] = "model-00001-of-00003.safetensors"
    (shards / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names 1 tensors that no file holds \(the first: model\.ghost\.weight\)"):
        merge_checkpoint(shards, adapter, tmp_path / "out")


# interruptions and existing folders


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")], ids=["interrupt", "disk-full"])
def test_an_interrupted_merge_leaves_nothing_and_loses_nothing(error, nested, tmp_path):
    base, adapter = nested
    shards = in_shards(base, tmp_path / "shards")
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("kept")
    before, written = snapshot(tmp_path), []
    original = CheckpointFolder._write_shard

    def interrupted(self: CheckpointFolder, name: str, target: Path, changes: Any) -> int:
        if written:
            raise error
        written.append(target)
        return original(self, name, target, changes)

    with (
        replaced(CheckpointFolder, "_write_shard", interrupted),
        pytest.raises(type(error) if written else BaseException),
    ):
        merge_checkpoint(shards, adapter, out, overwrite=True)
    assert written
    assert snapshot(tmp_path) == before


def test_a_failed_rename_brings_the_old_folder_back(nested, tmp_path):
    base, adapter = nested
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("kept")
    rename = os.rename

    def failing(source: Any, target: Any) -> None:
        if ".tmp-" in str(source):
            raise OSError("no rename")
        rename(source, target)

    with replaced(os, "rename", failing), pytest.raises(OSError, match="no rename"):
        merge_checkpoint(base, adapter, out, overwrite=True)
    assert snapshot(tmp_path) == {"out/precious.txt": b"kept"}


def test_an_existing_folder_is_not_touched_unless_told(nested, tmp_path):
    base, adapter = nested
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("kept")
    with pytest.raises(ValueError, match=r"out exists already.*`overwrite`"):
        merge_checkpoint(base, adapter, out)
    assert snapshot(out) == {"precious.txt": b"kept"}
    merge_checkpoint(base, adapter, out, overwrite=True)
    assert not (out / "precious.txt").exists()
    assert verify_checkpoint(base, adapter, out).ok
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_holds_the_base_or_the_adapter_is_not_replaced(nested):
    base, adapter = nested
    before = snapshot(base.parent)
    for out, what in ((base, "base"), (base.parent, "base"), (adapter, "adapter")):
        with pytest.raises(ValueError, match=f"holds the {what}.*would be lost"):
            merge_checkpoint(base, adapter, out, overwrite=True)
    assert snapshot(base.parent) == before


def test_the_base_and_the_adapter_stay_as_they_are(nested, tmp_path):
    base, adapter = nested
    before = snapshot(base.parent)
    merge_checkpoint(base, adapter, tmp_path / "out")
    assert snapshot(base.parent) == before


def test_weights_in_other_forms_and_hidden_files_are_left(nested, tmp_path):
    base, adapter = nested
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    for name in (
        "pytorch_model.bin",
        "consolidated.safetensors",
        ".gitattributes",
        "notes/read.txt",
        "gguf/model.gguf",
    ):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes(b"x")
    report = merge_checkpoint(copy, adapter, tmp_path / "out")
    assert sorted(report.left_out) == ["consolidated.safetensors", "gguf/model.gguf", "pytorch_model.bin"]
    names = set(snapshot(tmp_path / "out"))
    assert names == set(snapshot(base)) | {"notes/read.txt"}


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


# verify and the command line


def spoiled(source: Path, out: Path, name: str, change: Any) -> Path:
    """A copy of a checkpoint with one tensor changed, or dropped."""
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    made = change(tensors.pop(name))
    save_file(tensors if made is None else {**tensors, name: made}, out / "model.safetensors")
    return out


@pytest.mark.parametrize(
    ("end", "change", "complaint"),
    [
        ("q_proj.weight", lambda tensor: tensor ^ 1, "differs from the base, which the adapter does not change"),
        ("norm.weight", lambda tensor: tensor.double(), "differs from the base"),
        ("q_proj.weight.absmax", lambda tensor: tensor * 1.0000002, "holds other values than"),
        ("q_proj.weight.quant_map", lambda tensor: None, "is missing"),
    ],
    ids=["a-code", "a-dtype", "a-scale", "a-missing-tensor"],
)
def test_verify_names_what_is_wrong(end, change, complaint, nested, tmp_path):
    base, adapter = nested
    merge_checkpoint(base, adapter, tmp_path / "out")
    name = next(key for key in tensors_of(tmp_path / "out") if key.endswith(end))
    report = verify_checkpoint(base, adapter, spoiled(tmp_path / "out", tmp_path / "spoiled", name, change))
    assert len(report.errors) == 1
    assert report.errors[0].startswith(name)
    assert complaint in report.errors[0]


def test_verify_tells_a_base_without_the_adapter(dense, tmp_path):
    base, adapter = dense
    report = verify_checkpoint(base, adapter, base)
    assert len(report.errors) == 14
    assert all("is that of the base, expected the adapter merged" in error for error in report.errors)


def test_verify_sees_other_files(nested, tmp_path):
    base, adapter = nested
    merge_checkpoint(base, adapter, tmp_path / "out")
    (tmp_path / "out" / "chat_template.jinja").write_text("{{ messages }}")
    edit_config(tmp_path / "out", rms_norm_eps=1.0)
    (tmp_path / "out" / "generation_config.json").unlink()
    report = verify_checkpoint(base, adapter, tmp_path / "out")
    assert [error.split(" ")[0] for error in report.errors] == ["chat_template.jinja", "config.json"]
    assert "generation_config.json" in report.notes[0]


def test_the_commands_merge_and_verify(nested, tmp_path, capsys):
    base, adapter = map(str, nested)
    out = str(tmp_path / "out")
    assert main(["merge", adapter, out]) == 0  # the base is the one the adapter names
    assert "14 layers merged" in capsys.readouterr().out
    assert main(["verify", base, adapter, out]) == 0
    assert capsys.readouterr().out.startswith("right: ")
    assert main(["merge", adapter, out, "--base", base]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["merge", adapter, out, "--base", base, "--overwrite"]) == 0
    assert main(["verify", base, adapter, base, "--json"]) == 1
    report = json.loads(capsys.readouterr().out.partition("\n")[2])
    assert not report["ok"]
    assert len(report["errors"]) == 14 * 4 + 1  # absmax, the two nested tensors, the state; and the config
    assert main(["verify", base, adapter, base]) == 1
    text = capsys.readouterr().out
    assert "and 37 more" in text
    assert "WRONG" in text
    assert main(["verify", base, adapter, str(tmp_path / "nothing")]) == 2


def test_every_field_of_the_scales_config_survives(dense, tmp_path):
    base, adapter = dense
    merge_checkpoint(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert SGRQConfig.from_pretrained(str(adapter)).base_model_name_or_path == str(base)
