"""Merging on files: shards, interruptions, folders that exist; nothing is half-written and nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.quantized_checkpoints import (
    in_shards,
    same_bytes,
    snapshot,
    tensors_of,
)
from transformers import AutoModelForCausalLM

from peft_sgrq import merge_checkpoint, verify_checkpoint
from peft_sgrq.files.folder import CheckpointFolder

INDEX = "model.safetensors.index.json"


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


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk full")], ids=["interrupt", "disk-full"])
def test_an_interrupted_merge_leaves_nothing_and_loses_nothing(error, nested, tmp_path, monkeypatch):
    base, adapter = nested
    shards = in_shards(base, tmp_path / "shards")
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("kept")
    before, written = snapshot(tmp_path), []
    original = CheckpointFolder._write_shard

    def interrupted(self: CheckpointFolder, name: str, target: Path, changes: Any) -> int:
        if len(written) == 2:
            raise error
        written.append(target)
        return original(self, name, target, changes)

    monkeypatch.setattr(CheckpointFolder, "_write_shard", interrupted)
    with pytest.raises(type(error)):
        merge_checkpoint(shards, adapter, out, overwrite=True)
    assert len(written) == 2
    assert snapshot(tmp_path) == before


def test_a_failed_rename_brings_the_old_folder_back(nested, tmp_path, monkeypatch):
    base, adapter = nested
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("kept")
    rename = os.rename

    def failing(source: Any, target: Any) -> None:
        if ".sgrq-" in str(source):
            raise OSError("no rename")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="no rename"):
        merge_checkpoint(base, adapter, out, overwrite=True)
    assert snapshot(tmp_path) == {"out/precious.txt": b"kept"}


def test_an_existing_folder_is_not_touched_unless_told(nested, tmp_path):
    base, adapter = nested
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("kept")
    with pytest.raises(ValueError, match=r"out exists already.*`overwrite=True`"):
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
