"""`verify` names every byte that is not as it should be; the commands `merge` and `verify`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.quantized_checkpoints import (
    edit_config,
    tensors_of,
)

from peft_sgrq import SGRQConfig, merge_checkpoint, verify_checkpoint
from peft_sgrq.cli import main

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
