"""The configuration of PEFT's MetaMathQA comparison: it trains, merges, generates and counts answers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import compare_metamathqa
import pytest
from comparison.generation import Task, is_same, parse_answer
from comparison.methods import parse_method
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

pytestmark = pytest.mark.slow


@pytest.fixture
def config(llama_dir: Path, tmp_path: Path) -> dict:
    rows = tmp_path / "rows.jsonl"
    lines = [{"question": f"What is {i} and {i}?", "answer": f"They are {2 * i}.\n#### {2 * i}"} for i in range(12)]
    rows.write_text("\n".join(map(json.dumps, lines)))
    given_config = json.loads(compare_metamathqa.CONFIG.read_text())
    part = {"dataset": str(rows), "split": "train", "columns": ["question", "answer"]}
    return given_config | {
        "model": str(llama_dir), "dtype": "float32", "train": part | {"characters": 36},
        "validation": part | {"rows": 2}, "test": part | {"rows": 3},
        "other": part, "max_length": 100, "max_new_tokens": 4, "max_total": 90, "steps": 2,
        "batch_size": 2, "batch_size_eval": 2, "calibration_rows": 4,
        "methods": {"lora-2": [1e-3], "sgrq-0.5": [1e-2], "qalora-2": [1e-3]},
    }  # fmt: skip


def test_it_runs_from_training_to_merged_answers_and_resumes(config, tmp_path, monkeypatch, capsys):
    path, results = tmp_path / "config.json", tmp_path / "results.json"
    path.write_text(json.dumps(config))
    monkeypatch.setattr(sys, "argv", ["compare", "--config", str(path), "--results", str(results)])
    compare_metamathqa.main()
    assert "qalora-2: PEFT has QA-LoRA for GPTQ layers alone" in capsys.readouterr().out
    lora, sgrq = json.loads(results.read_text())
    assert (lora["method"], sgrq["method"]) == ("lora-2", "sgrq-0.5")
    assert sgrq["tuned"] == sgrq["merged"] != sgrq["untrained"] == lora["untrained"]
    assert lora["tuned"]["other"] != lora["merged"]["other"]
    before = results.read_bytes()
    compare_metamathqa.main()
    assert results.read_bytes() == before
    path.write_text(json.dumps(config | {"steps": 1, "methods": {"lora-2": [1e-3]}}))
    compare_metamathqa.main()
    runs = json.loads(results.read_text())
    assert runs[:2] == [lora, sgrq] and runs[2]["tuned"] != lora["tuned"]  # of other steps, so another run
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--methods", "lora-3"])
    with pytest.raises(ValueError, match=r"--methods has \['lora-3'\], expected some of \['lora-2'\]"):
        compare_metamathqa.main()


def test_every_kind_of_method_answers_in_half_precision(config, tmp_path, monkeypatch):
    path, results = tmp_path / "config.json", tmp_path / "results.json"
    methods = {"lora-2": [1e-3], "ia3": [1e-2], "peqa": [1e-2], "peqa-row": [1e-2]}
    path.write_text(json.dumps(config | {"dtype": "bfloat16", "methods": methods}))
    monkeypatch.setattr(sys, "argv", ["compare", "--config", str(path), "--results", str(results)])
    compare_metamathqa.main()
    runs = {run["method"]: run for run in json.loads(results.read_text())}
    assert list(runs) == list(methods)
    assert runs["ia3"]["merged"] is None and all(run["tuned"] != run["untrained"] for run in runs.values())


def test_the_configuration_names_known_methods_and_what_is_needed():
    config = json.loads(compare_metamathqa.CONFIG.read_text())
    assert all(parse_method(name).name == name and rates for name, rates in config["methods"].items())
    assert config["prompt"].format(question="Q?") == "Question: Q? Think step by step.\nAnswer:"


def test_batches_have_each_text_once_in_an_epoch_with_one_end_each(config):
    tokenizer = AutoTokenizer.from_pretrained(config["model"])
    tokenizer.pad_token = tokenizer.eos_token
    task = Task(config, tokenizer)
    assert 0 < len(task.texts) < 12  # the longest are left out
    steps = -(-len(task.texts) // 2)
    batches = list(task.batches(steps, 2, seed=0))
    seen = []
    for batch in batches:
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            kept = ids[mask.bool()]
            assert kept[-1] == tokenizer.eos_token_id and int((labels != -100).sum()) == len(kept)
            seen.append(tokenizer.decode(kept[:-1], skip_special_tokens=True))
    assert sorted(seen) == sorted(task.texts)
    assert len(list(task.batches(steps + 3, 2, seed=0))) == steps + 3
    assert [b["input_ids"].tolist() for b in task.batches(3, 2, seed=0)] == [
        b["input_ids"].tolist() for b in batches[:3]
    ]


@given(st.integers(-(10**6), 10**6), st.sampled_from(["The answer is: {}", "so The answer is {}.", "1 + 1\n#### {}"]))
def test_the_number_of_an_answer_is_found_however_it_is_written(number, form):
    assert is_same(form.format(f"{number:,}"), f"#### {number}")
    assert is_same(form.format(f"${number}"), f"#### {number}.0")
    assert not is_same(form.format(number), f"#### {number + 1}")


def test_fractions_are_compared_and_missing_answers_are_wrong():
    assert is_same("The answer is: 20/14", "#### 10/7")
    assert is_same("The answer is: x + 1", "The answer is: x + 1")
    assert parse_answer("I do not know") is None and not is_same("I do not know", "#### 1")
    assert not is_same("The answer is: 1/0", "#### 1")
