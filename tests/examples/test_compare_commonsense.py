"""The comparison on multiple-choice tasks: answers are those by log-likelihood, and a task joins as a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import compare_commonsense
import pytest
import torch
from comparison.commonsense import answered, read_task, tasks_of, training_batch, training_batches
from comparison.commonsense_table import accuracy_table
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow


def write(path: Path, count: int, choices: int = 3) -> None:
    rows = [
        {
            "question": f"How many are {i} and {'very ' * (i % 4)}few?",
            "choices": [f"{'about ' * ((i + c) % 3)}{c}" for c in range(choices + i % 2)],
            "answer": i % choices,
        }
        for i in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, choices in (("first", 3), ("second", 2)):
        for split, count in (("train", 20), ("test", 12)):
            write(folder / f"{name}.{split}.jsonl", count, choices)
    return folder


def test_answers_are_those_of_choices_scored_one_by_one(llama_dir, data):
    tokenizer = AutoTokenizer.from_pretrained(llama_dir)
    model = AutoModelForCausalLM.from_pretrained(llama_dir).eval()
    questions = read_task(tokenizer, data / "first.test.jsonl")
    expected: dict[str, str] = {"sum": "", "character": ""}
    for question in questions:
        scores = []
        for choice in question.choices:
            ids = torch.tensor([question.asked + choice])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0].log_softmax(-1)
            scores.append(sum(float(logits[t - 1, ids[0, t]]) for t in range(len(question.asked), ids.shape[1])))
        by_character = [score / count for score, count in zip(scores, question.characters, strict=True)]
        for name, found in (("sum", scores), ("character", by_character)):
            expected[name] += str(int(found.index(max(found)) == question.answer))
    assert answered(model, questions, batch_size=5) == expected
    assert 0 < expected["sum"].count("1") < len(questions)
    assert answered(model, questions, batch_size=1) == expected


def test_what_is_tuned_on_is_the_right_answer_and_an_end(llama_dir, data):
    tokenizer = AutoTokenizer.from_pretrained(llama_dir)
    questions = read_task(tokenizer, data / "first.train.jsonl")
    batch = training_batch(questions[:3], end=2)
    for ids, labels, question in zip(batch["input_ids"], batch["labels"], questions, strict=False):
        kept = labels != -100
        assert labels[kept].tolist() == [*question.choices[question.answer], 2] == ids[kept].tolist()
        assert ids[: len(question.asked)].tolist() == question.asked
    tasks = {"a": questions, "b": questions[:5]}
    one, two, other = (list(training_batches(tasks, 2, 4, 3, seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(one, two, strict=True))
    assert any(not torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(one, other, strict=True))


def test_a_part_of_a_task_is_always_the_same(llama_dir, data):
    tokenizer = AutoTokenizer.from_pretrained(llama_dir)
    path = data / "first.test.jsonl"
    whole, part = read_task(tokenizer, path), read_task(tokenizer, path, 5)
    assert len(part) == 5 and part == read_task(tokenizer, path, 5) and all(question in whole for question in part)
    assert read_task(tokenizer, path, 99) == whole and tasks_of(data, "test") == ["first", "second"]


@pytest.mark.parametrize(
    "row", [{"question": "a", "choices": ["b"]}, {"question": "a", "choices": ["b"], "answer": 1}]
)
def test_a_row_without_a_right_choice_is_refused(row, llama_dir, tmp_path):
    path = tmp_path / "a.test.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"A row of .* expected .* with the index of the right choice"):
        read_task(AutoTokenizer.from_pretrained(llama_dir), path)


def test_a_further_task_is_asked_alone_and_of_the_same_adapters(llama_dir, data, tmp_path, monkeypatch, capsys):
    results, trained = tmp_path / "results.json", []
    fit = compare_commonsense.Study._fit
    monkeypatch.setattr(
        compare_commonsense.Study, "_fit", lambda self, *rest: (trained.append(rest[1].name), fit(self, *rest))
    )
    command = [
        "compare_commonsense.py", str(data), str(llama_dir), "--dtype", "float32", "--steps", "2", "--batch-size", "2",
        "--calibration-rows", "8", "--questions", "8", "--methods", "peqa", "sgrq-0.5", "random-0.5", "lora-2",
        "--seeds", "0", "1", "--results", str(results), "--save", str(tmp_path / "adapters"),
    ]  # fmt: skip

    def run(*more: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [*command, *more])
        compare_commonsense.main()
        (setting,) = json.loads(results.read_text())
        return setting

    with pytest.raises(FileNotFoundError):  # nothing was run
        run("--limit", "0")
    assert "The time is up" in capsys.readouterr().out
    runs = run()["runs"]
    assert len(runs) == 1 + 4 * 2 and len(trained) == 8
    assert all(list(run["tasks"]) == ["first", "second"] for run in runs)
    assert all(len(marks) == 8 for run in runs for found in run["tasks"].values() for marks in found.values())
    write(data / "third.test.jsonl", 8)
    setting = run()
    assert len(trained) == 8  # the adapters were there
    for old, new in zip(runs, setting["runs"], strict=True):
        assert list(new["tasks"]) == ["first", "second", "third"]
        assert {name: new["tasks"][name] for name in old["tasks"]} == old["tasks"]
    table = accuracy_table(setting)
    assert table.count("\n| ") == 1 + 5 and "third" in table
    run("--table")
    assert capsys.readouterr().out.endswith(table + "\n")


def test_the_table_has_binomial_errors_and_differences_question_by_question():
    def made(method: str, seed: int | None, marks: str) -> dict[str, Any]:
        rate = None if seed is None else 0.1
        return {
            "method": method,
            "seed": seed,
            "learning_rate": rate,
            "tasks": {"a": {"sum": marks, "character": marks}},
        }

    shared = {"model": "m", "base": "nf4", "dtype": "float32", "train_tasks": ["a"], "steps": 1, "batch_size": 1}
    runs = [made("untrained", None, "0000"), made("peqa", 0, "1100"), made("peqa", 1, "1000"), made("x", 0, "1111")]
    table = accuracy_table({"shared": shared, "versions": {}, "machine": "", "runs": runs})
    assert "| peqa | 0.1 |  | 37.5 ± 24.2 | 37.5 |  |" in table  # sqrt(.375 * .625 / 4)
    assert "| x | 0.1 |  | 100.0 ± 0.0 | 100.0 | +50.0 ± 28.9 |" in table  # of 0, 0, 1, 1
    assert "| untrained |  |  | 0.0 ± 0.0 | 0.0 | -37.5 ± 23.9 |" in table  # of -1, -1/2, 0, 0
