"""`peft-sgrq calibrate` writes the file that calibrating in Python gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.bases import DENSE, INT8, Base, byte_tokenizer
from support.calibration import TEXTS

from peft_sgrq import Saliency, SGRQConfig, calibrate
from peft_sgrq.cli import main

NESTED = Base("nf4", True, torch.bfloat16)


def calibrated(llama_dir: Path, data: Path, output: Path, *arguments: str) -> Saliency:
    assert main(["calibrate", str(llama_dir), str(data), "-o", str(output), "--quiet", *arguments]) == 0
    return Saliency.load(output)


def same(first: Saliency, second: Saliency) -> None:
    assert (first.criterion, first.tokens) == (second.criterion, second.tokens)
    assert list(first.layers) == list(second.layers)
    for name, layer in first.layers.items():
        assert torch.equal(layer.scores, second.scores[name])
        assert layer.fingerprint == second.layers[name].fingerprint


@pytest.mark.parametrize(
    ("base", "arguments"),
    [
        (DENSE, []),
        (NESTED, ["--quantize", "nf4", "--double-quant", "--dtype", "bfloat16", "--criterion", "diag"]),
        (INT8, ["--quantize", "int8", "--criterion", "gradient", "--samples", "4"]),
    ],
    ids=["dense", "nf4", "int8"],
)
def test_the_command_writes_what_python_finds(base, arguments, llama_dir: Path, tmp_path: Path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    found = calibrated(llama_dir, data, tmp_path / "s.safetensors", *arguments)
    assert "s.safetensors: " in capsys.readouterr().out
    config = SGRQConfig(criterion=found.criterion)
    samples = 4 if "--samples" in arguments else 128
    same(found, calibrate(base.load(llama_dir), config, TEXTS, byte_tokenizer(), samples=samples, progress=False))


def test_a_text_file_is_used_whole_in_pieces(llama_dir: Path, tmp_path: Path):
    data = tmp_path / "data.txt"
    data.write_text("\n".join(TEXTS))
    found = calibrated(llama_dir, data, tmp_path / "s.safetensors", "--max-length", "32", "--target-modules", "q_proj")
    assert found.tokens == len(byte_tokenizer()("\n".join(TEXTS)).input_ids)
    assert [name.rpartition(".")[2] for name in found.layers] == ["q_proj", "q_proj"]


def test_other_columns_and_files_of_datasets_are_read(llama_dir: Path, tmp_path: Path):
    from datasets import Dataset

    Dataset.from_dict({"prose": TEXTS}).to_parquet(tmp_path / "data.parquet")
    arguments = ("--column", "prose", "--criterion", "diag")
    first = calibrated(llama_dir, tmp_path / "data.parquet", tmp_path / "1", *arguments)
    Dataset.from_dict({"prose": TEXTS}).to_csv(tmp_path / "data.csv")
    same(first, calibrated(llama_dir, tmp_path / "data.csv", tmp_path / "2", *arguments))


@pytest.mark.parametrize(
    ("name", "text", "arguments", "message"),
    [
        ("data.jsonl", '{"prose": "a"}\n', [], "no column"),
        ("data.jsonl", '{"text": ""}\n', [], "calibration data is empty"),
        ("data.pdf", "%", [], "ends in '.pdf', expected a text file"),
        ("data.txt", "Some text.", ["--criterion", "salience"], "'salience', expected one of obs, billm"),
    ],
)
def test_mistakes_end_with_a_sentence_and_no_file(name, text, arguments, message, llama_dir, tmp_path, capsys):
    (tmp_path / name).write_text(text)
    output = tmp_path / "s.safetensors"
    assert main(["calibrate", str(llama_dir), str(tmp_path / name), "-o", str(output), "--quiet", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()
