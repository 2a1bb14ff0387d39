"""`verify` names every byte that is not as it should be; the commands `merge` and `verify`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from support.quantized_checkpoints import (
    edit_config,
    tensors_of,
)
from support.small_models import TIED, load

from peft_sgrq import SGRQConfig, merge_checkpoint, verify_checkpoint
from peft_sgrq.cli import main
from peft_sgrq.files.folder import INDEX

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
    assert main(["verify", adapter, out, "--base", base]) == 0
    assert capsys.readouterr().out.startswith("right: ")
    assert main(["merge", adapter, out, "--base", base]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["merge", adapter, out, "--base", base, "--overwrite"]) == 0
    assert main(["verify", adapter, base, "--base", base, "--json"]) == 1
    report = json.loads(capsys.readouterr().out.partition("\n")[2])
    assert not report["ok"]
    assert len(report["errors"]) == 14 * 4 + 1  # absmax, the two nested tensors, the state; and the config
    assert main(["verify", adapter, base, "--base", base]) == 1
    text = capsys.readouterr().out
    assert "and 37 more" in text
    assert "WRONG" in text
    assert main(["verify", adapter, str(tmp_path / "nothing"), "--base", base]) == 2


def test_every_field_of_the_scales_config_survives(dense, tmp_path):
    base, adapter = dense
    merge_checkpoint(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert SGRQConfig.from_pretrained(str(adapter)).base_model_name_or_path == str(base)


def _in_shards(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A base in several files, an adapter, and the merged base."""
    model = TIED["llama"]()
    model.save_pretrained(tmp_path / "base", max_shard_size="30KB")
    get_peft_model(load(tmp_path / "base"), SGRQConfig(init_weights=False)).save_pretrained(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    return tmp_path / "base", tmp_path / "adapter", tmp_path / "out"


def _exchange(folder: Path) -> None:
    one, other = sorted(folder.glob("*.safetensors"))[:2]
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def _misname(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    names = list(index["weight_map"])
    places = index["weight_map"]
    places[names[0]], places[names[-1]] = places[names[-1]], places[names[0]]
    (folder / INDEX).write_text(json.dumps(index))


def _twice(folder: Path) -> None:
    one, other = sorted(folder.glob("*.safetensors"))[:2]
    spare = {name: tensor * 0 for name, tensor in load_file(other).items()}
    save_file({**spare, **load_file(one)}, one, metadata={"format": "pt"})


def _old_single_file(folder: Path) -> None:
    shutil.copy(sorted(folder.glob("*.safetensors"))[0], folder / "model.safetensors")


def _adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def _other_rope(folder: Path) -> None:
    edit_config(folder, rope_theta=5.0)


@pytest.mark.parametrize("change", [_exchange, _misname, _twice, _old_single_file, _adapter, _other_rope])
def test_verify_sees_what_readers_would_read_otherwise(change, tmp_path):
    base, adapter, out = _in_shards(tmp_path)
    assert verify_checkpoint(base, adapter, out).ok
    change(out)
    assert not verify_checkpoint(base, adapter, out).ok


def test_a_base_whose_index_is_stale_is_merged_with_a_right_one(tmp_path):
    base, adapter, _ = _in_shards(tmp_path)
    _misname(base)
    merge_checkpoint(base, adapter, tmp_path / "again")
    assert verify_checkpoint(base, adapter, tmp_path / "again").ok
