"""The script for TRL: defaults of scales, and a base whose groups are split first."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import sft
import torch
from peft import AutoPeftModelForCausalLM
from support.bases import NF4, logits
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_sgrq import verify_checkpoint
from peft_sgrq.base.workarounds.bnb_cpu_packing import disable_cpu_packing

pytestmark = pytest.mark.slow


def test_defaults_are_those_of_scales(tmp_path):
    plain = sft.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert (plain.learning_rate, plain.lr_scheduler_type, plain.get_warmup_steps(50)) == (6e-3, "cosine", 5)
    assert (
        sft.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, bf16=False, learning_rate=1e-3).learning_rate
        == 1e-3
    )


def test_zero_points_are_trained_alone_where_that_is_asked_for():
    config = sft.make_config(sft.SGRQArguments(ratio="0", zero_points=True))
    assert config.zero_points and config.ratio == 0 and not sft.make_config(sft.SGRQArguments()).zero_points
    with pytest.raises(SystemExit, match="expected a share of the scales"):
        sft.make_config(sft.SGRQArguments(ratio="0"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"--lora_target_modules": "q_proj"}, "--lora_target_modules is .*use --target_modules"),
        ({"--use_peft": None}, "--use_peft is True"),
        ({"--lora_r": "8"}, "--lora_r is 8"),
        ({"--dataset_name": "DATA/nothing.jsonl"}, "nothing.jsonl' is no file here"),
        ({"--dataset_name": None}, "--dataset_name"),
        ({"--ratio": "kne"}, "'kne', expected a number in .* or one of knee, global, layerwise"),
        ({"--ratio": "2"}, "expected a share of the scales"),
        ({"--dataset_train_split": "training"}, "has the splits train, expected 'training'"),
        ({"--eval_strategy": "steps"}, "has the splits train, expected 'test'; name another by --dataset_test_split"),
        ({"--dataset_text_field": "story"}, "has the columns text, expected 'story' with texts or 'messages'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_mistake_in_an_argument_is_a_sentence_before_anything_is_loaded(
    arguments, message, llama_dir, tmp_path, monkeypatch
):
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n')
    given = {
        "--model_name_or_path": str(llama_dir), "--dataset_name": str(tmp_path / "train.jsonl"),
        "--output_dir": str(tmp_path / "out"), "--report_to": "none",
    } | {key: value and value.replace("DATA", str(tmp_path)) for key, value in arguments.items()}  # fmt: skip
    if arguments == {"--dataset_name": None}:
        del given["--dataset_name"]
    words = [word for item in given.items() for word in item if word is not None]
    monkeypatch.setattr(sys, "argv", ["sft.py", *words])
    monkeypatch.setattr(sft.AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(SystemExit, match=message):
        sft.main()


def test_a_file_of_chats_is_trained_on_some_layers_and_merged_with_its_tokenizer(llama_dir, tmp_path, monkeypatch):
    base, out = tmp_path / "nf4", tmp_path / "out"
    NF4.load(llama_dir).save_pretrained(base)
    AutoTokenizer.from_pretrained(llama_dir).save_pretrained(base)
    chat = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    (tmp_path / "chats.jsonl").write_text("\n".join([json.dumps({"messages": chat})] * 4))
    settings = Path(sft.__file__).with_name("sft.yaml").read_text()
    for line, value in (
        ("model_name_or_path", base), ("dataset_name", tmp_path / "chats.jsonl"), ("output_dir", out),
        ("max_steps", 2), ("load_in_4bit", "false"),
    ):  # fmt: skip
        settings = re.sub(rf"^{line}:.*$", f"{line}: {value}", settings, flags=re.MULTILINE)
    (tmp_path / "sft.yaml").write_text(settings)
    words = ["--config", str(tmp_path / "sft.yaml"), "--target_modules", "q_proj", "v_proj", "--ratio", "knee"]
    monkeypatch.setattr(sys, "argv", ["sft.py", *words])
    sft.main()
    config = json.loads((out / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == {"q_proj", "v_proj"} and config["ratio"] == "knee"
    assert len(config["selection"]) == 4
    assert verify_checkpoint(base, out, out / "merged").ok
    assert AutoTokenizer.from_pretrained(out / "merged").chat_template


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
