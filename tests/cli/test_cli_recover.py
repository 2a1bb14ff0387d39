"""`peft-sgrq recover` writes the adapter that recovering in Python gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.bases import Base, byte_tokenizer, logits
from support.calibration import TEXTS

from peft_sgrq import SGRQConfig, recover
from peft_sgrq.cli import main
from peft_sgrq.recovery import block_by_block

BASE = Base("nf4", False, torch.bfloat16)
_OPTIONS = ["--quantize", "nf4", "--dtype", "bfloat16", "--epochs", "2", "--batch-size", "4", "--quiet"]


def command(llama_dir: Path, data: Path, output: Path, *arguments: str) -> int:
    model = str(llama_dir)
    named = ["--reference", model, "--data", str(data), "-o", str(output)]
    return main(["recover", model, *named, *_OPTIONS, *arguments])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.mark.slow
def test_the_command_writes_what_python_finds(llama_dir: Path, data: Path, tmp_path: Path, capsys, ids):
    output = tmp_path / "adapter"
    assert (
        command(llama_dir, data, output, "--preservation", "0.1", "--importance", "magnitude", "--no-augmented") == 0
    )
    printed = capsys.readouterr().out
    assert "model.layers.1: error " in printed
    expected = recover(
        BASE.load(llama_dir),
        llama_dir,
        TEXTS,
        SGRQConfig(ratio=1.0, task_type="CAUSAL_LM"),
        byte_tokenizer(),
        epochs=2,
        batch_size=4,
        preservation=0.1,
        importance="magnitude",
        augmented=False,
        progress=False,
    )
    loaded = PeftModel.from_pretrained(BASE.load(llama_dir), str(output))
    assert torch.equal(logits(loaded, ids), logits(expected.model.eval(), ids))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "data.jsonl"]


def test_an_interrupted_command_goes_on(llama_dir: Path, data: Path, tmp_path: Path, monkeypatch):
    output = tmp_path / "adapter"
    train, trained = block_by_block.train_block, []

    def interrupted(*args):
        trained.append(args)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train(*args)

    monkeypatch.setattr(block_by_block, "train_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command(llama_dir, data, output)
    assert not output.exists()
    assert (tmp_path / "adapter.progress").exists()
    assert command(llama_dir, data, output) == 0
    assert len(trained) == 3
    assert not (tmp_path / "adapter.progress").exists()


def test_an_output_that_cannot_be_written_is_found_before_the_work(llama_dir: Path, data: Path, monkeypatch, capsys):
    monkeypatch.setattr(block_by_block, "train_block", None)
    assert command(llama_dir, data, data / "adapter") == 2
    assert "Not a directory" in capsys.readouterr().err


def test_what_was_recovered_is_kept_when_it_cannot_be_saved(llama_dir: Path, data: Path, tmp_path: Path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(PeftModel, "save_pretrained", fail)
    assert command(llama_dir, data, tmp_path / "adapter") == 2
    assert (tmp_path / "adapter.progress").exists()


def test_an_output_that_exists_is_not_overwritten(llama_dir: Path, data: Path, tmp_path: Path, capsys):
    output = tmp_path / "adapter"
    output.mkdir()
    (output / "notes").write_text("mine")
    assert command(llama_dir, data, output) == 2
    assert "exists already" in capsys.readouterr().err
    assert (output / "notes").read_text() == "mine"
