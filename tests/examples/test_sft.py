"""The script for TRL: defaults of scales, and a base whose groups are split first."""

from __future__ import annotations

import json
import sys

import sft
import torch
from peft import AutoPeftModelForCausalLM
from support.bases import NF4, logits
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_sgrq.base.workarounds.bnb_cpu_packing import disable_cpu_packing


def test_defaults_are_those_of_scales(tmp_path):
    plain = sft.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert (plain.learning_rate, plain.lr_scheduler_type, plain.get_warmup_steps(50)) == (2e-2, "cosine", 5)
    assert (
        sft.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, bf16=False, learning_rate=1e-3).learning_rate
        == 1e-3
    )


def test_an_adapter_of_a_split_base_finds_it(llama_dir, tmp_path, monkeypatch):
    base, data, out = tmp_path / "nf4", tmp_path / "data", tmp_path / "out"
    NF4.load(llama_dir).save_pretrained(base)
    AutoTokenizer.from_pretrained(llama_dir).save_pretrained(base)
    data.mkdir()
    rows = [{"text": f"{i} and {i} are {2 * i}."} for i in range(8)]
    (data / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [
        "sft.py", "--model_name_or_path", str(base), "--dataset_name", str(data), "--output_dir", str(out),
        "--max_steps", "2", "--group_size", "32", "--use_cpu", "--bf16", "False", "--report_to", "none",
        "--per_device_train_batch_size", "2",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    sft.main()
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(out / "base")
    ids = torch.arange(3, 20)[None]
    found = [
        AutoPeftModelForCausalLM.from_pretrained(out),
        *(AutoModelForCausalLM.from_pretrained(folder) for folder in (out / "merged", out / "base", base)),
    ]
    for model in found:
        disable_cpu_packing(model)
    tuned, merged, split, untuned = (logits(model.eval(), ids) for model in found)
    assert torch.equal(tuned, merged) and torch.equal(split, untuned) and not torch.equal(tuned, untuned)
    assert (out / "merged" / "tokenizer.json").exists()
