"""The comparison of methods on chats: the loss is one of answers, and a training merged in two ways is done once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean

import compare_methods
import pytest
import torch
from comparison.bench import Bench
from comparison.data import inputs_of, read_chats
from comparison.evaluation import label_loss, mean_loss
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    rows = [{"question": f"What is {i} and one?", "answer": f"It is {i + 1}{'.' * (i % 5)}"} for i in range(40)]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def test_labels_are_those_of_answers_alone(llama_dir, chats):
    tokenizer = AutoTokenizer.from_pretrained(llama_dir)
    rows = read_chats(tokenizer, chats, 200, 30)
    assert len(rows) == 30
    for i, (ids, labels, mask) in enumerate(rows):
        answer = tokenizer.decode(ids[labels != -100])
        assert f"It is {i + 1}" in answer and "What" not in answer
        assert torch.equal(ids[labels != -100], labels[labels != -100])
        assert "What is" in tokenizer.decode(ids[mask == 1]) and (labels[mask == 0] == -100).all()
    shortest = int(rows[:, 2].sum(1).min())
    kept = read_chats(tokenizer, chats, shortest, 30)
    assert 0 < len(kept) < 30 and (kept[:, 2] == 1).all()
    with pytest.raises(ValueError, match="has no chat of at most 3 tokens, expected some; raise --length"):
        read_chats(tokenizer, chats, 3, 30)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template, expected one"):
        read_chats(tokenizer, chats, 200, 30)


def test_the_loss_of_chats_is_the_mean_over_tokens_of_answers_whatever_they_are_filled_up_with(llama_dir, chats):
    model = AutoModelForCausalLM.from_pretrained(llama_dir).eval()
    rows = read_chats(AutoTokenizer.from_pretrained(llama_dir), chats, 200, 7)
    losses = []
    with torch.no_grad():
        for ids, labels, mask in rows:
            count = int(mask.sum())
            logits = model(input_ids=ids[None, :count]).logits[0].log_softmax(-1)
            places = [t for t in range(1, count) if labels[t] != -100]
            losses += [-float(logits[t - 1, labels[t]]) for t in places]
    assert mean_loss(model, rows, batch_size=3) == pytest.approx(mean(losses), abs=1e-4)
    assert inputs_of(rows)["input_ids"].shape[1] == int(rows[:, 2].sum(1).max()) < rows.shape[2]


def test_the_loss_at_labels_and_its_gradient_are_the_models_own(llama_dir, chats):
    model = AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.float32)
    inputs = inputs_of(read_chats(AutoTokenizer.from_pretrained(llama_dir), chats, 200, 3))
    found = []
    for loss in (model(**inputs).loss, label_loss(model, inputs)):
        model.zero_grad()
        loss.backward()
        found.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*found, strict=True))
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_rates_are_those_named_and_a_training_is_merged_twice(llama_dir, chats, tmp_path, monkeypatch):
    other = tmp_path / "other.txt"
    other.write_text("The sum of two numbers is a number. " * 40)
    results = tmp_path / "results.json"
    fitted = []
    fit = Bench.fit
    monkeypatch.setattr(
        Bench,
        "fit",
        lambda self, model, method, *rest: (fitted.append((method.name, *rest)), fit(self, model, method, *rest)),
    )
    command = [
        "compare_methods.py", str(llama_dir), "--chat", "--train", str(chats), "--test", str(chats),
        "--other", str(other), "--base", "nf4", "--dtype", "float32", "--steps", "3", "--batch-size", "2",
        "--length", "96", "--calibration-rows", "4", "--evaluation-rows", "4", "--seeds", "0", "1",
        "--results", str(results),
        "--methods", "lora-2", "lora-2:original", "sgrq-0.5:diag", "peqa", "peqa:decay-20", "--at", "3e-2", "1e-2",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    compare_methods.main()
    (setting,) = json.loads(results.read_text())
    runs = {(run["method"], run["seed"], run["learning_rate"]): run for run in setting["runs"]}
    methods = ("lora-2", "lora-2:original", "sgrq-0.5:diag", "peqa", "peqa:decay-20")
    assert set(runs) == {(name, seed, rate) for name in methods for seed in (0, 1) for rate in (3e-2, 1e-2)}
    assert not [name for name, *_ in fitted if name == "lora-2:original"] and len(fitted) == 16
    for seed in (0, 1):
        one, two = (runs[name, seed, 3e-2] for name in ("lora-2", "lora-2:original"))
        assert one["tuned"] == two["tuned"] and one["merged"] != two["merged"]
    assert setting["shared"]["chat"] is True
    assert runs["peqa", 0, 3e-2]["tuned"] != runs["peqa:decay-20", 0, 3e-2]["tuned"]
