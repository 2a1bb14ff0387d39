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
from peft import PeftModel
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


def test_rows_of_all_shapes_are_taken(llama_dir, tmp_path):
    rows = [
        {"question": "Où est-ce ? 在哪里?\u2028Là.", "choices": ["здесь", "là-bas, derrière la maison"], "answer": 1},
        {"question": "", "choices": ["a", "", "something longer than the others are"], "answer": 0, "id": 7},
        {"question": "She picks up the ball and", "choices": ["v", "w " * 30, "x", "y", "z"], "answer": 4},
    ]
    path = tmp_path / "a.test.jsonl"
    path.write_bytes("\r\n \r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    questions = read_task(AutoTokenizer.from_pretrained(llama_dir), path)
    assert [len(question.choices) for question in questions] == [2, 3, 5]
    assert [question.answer for question in questions] == [1, 0, 4] and questions[1].characters[1] == 1
    model = AutoModelForCausalLM.from_pretrained(llama_dir).eval()
    for marks in answered(model, questions).values():
        assert len(marks) == 3 and set(marks) <= {"0", "1"}


@pytest.mark.parametrize(
    "row",
    [
        '{"question": "a", "choices": ["b", "c"]}',
        '{"question": "a", "choices": ["b"], "answer": 0}',
        '{"question": "a", "choices": ["b", "c"], "answer": 2}',
        '{"question": "a", "choices": ["b", "c"], "answer": -1}',
        '{"question": "a", "choices": ["b", "c"], "answer": "1"}',
        '{"question": "a", "choices": ["b", "c"], "answer": 1.0}',
        '{"question": "a", "choices": ["b", "c"], "answer": true}',
        '{"question": "a", "choices": ["b", null], "answer": 0}',
        '{"question": null, "choices": ["b", "c"], "answer": 0}',
        '{"question": "a", "choices": "bc", "answer": 0}',
        '{"question": "a", "choices": ["b", "c"], "answer": ',
        '["a", ["b", "c"], 0]',
    ],
)
def test_a_row_without_a_right_choice_is_refused(row, llama_dir, tmp_path):
    path = tmp_path / "a.test.jsonl"
    path.write_text('{"question": "a", "choices": ["b", "c"], "answer": 1}\n' + row)
    with pytest.raises(ValueError, match=r"Line 2 of .*a.test.jsonl' is .* expected .* the index of the right choice"):
        read_task(AutoTokenizer.from_pretrained(llama_dir), path)


def test_a_file_without_rows_is_refused(llama_dir, tmp_path):
    path = tmp_path / "a.test.jsonl"
    path.write_text("\n")
    with pytest.raises(ValueError, match=r"has no row, expected some"):
        read_task(AutoTokenizer.from_pretrained(llama_dir), path)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--methods", "lora-16:original"], "'lora-16:original' is not run here"),
        (["--methods", "peqa:linear"], "'peqa:linear' is not run here"),
        (["--methods", "ia3"], "'ia3' is not run here"),
        (["--methods", "pequa"], "'pequa' is not known"),
        (["--rate", "sgrq"], "--rate has 'sgrq', expected KIND=RATE"),
        (["--steps", "0"], "--steps is 0, expected at least 1"),
        (["--questions", "-1"], "--questions is -1, expected"),
        (["--tasks", "none"], "There is no file .*none.test.jsonl"),
        (["--train-tasks", "none"], "There is no file .*none.train.jsonl"),
        (["--table"], "There is no file .*results.json"),
    ],
)
def test_a_mistaken_argument_is_named(arguments, text, llama_dir, data, tmp_path, monkeypatch):
    command = ["compare_commonsense.py", str(data), str(llama_dir), "--results", str(tmp_path / "results.json")]
    monkeypatch.setattr(sys, "argv", [*command, *arguments])
    with pytest.raises(ValueError, match=text):
        compare_commonsense.main()


def test_a_model_that_is_nowhere_is_named(data, tmp_path, monkeypatch):
    command = ["compare_commonsense.py", str(data), "./nowhere", "--results", str(tmp_path / "results.json")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(ValueError, match=r"The model './nowhere' is no folder here"):
        compare_commonsense.main()


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_folder_without_tasks_is_named(split, llama_dir, data, tmp_path, monkeypatch):
    for path in data.glob(f"*.{split}.jsonl"):
        path.unlink()
    command = ["compare_commonsense.py", str(data), str(llama_dir), "--results", str(tmp_path / "results.json")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(ValueError, match=rf"has no file NAME.{split}.jsonl"):
        compare_commonsense.main()


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

    # Adapters that were trained otherwise, and answers to other questions, are not taken for these.
    with pytest.raises(ValueError, match=r"was trained with \{'steps': 2\} .*, expected \{'steps': 3\}"):
        run("--steps", "3")
    assert len(json.loads(results.read_text())) == 1  # nothing was run before
    write(data / "third.test.jsonl", 7)
    with pytest.raises(ValueError, match=r"has answers to 8 questions of 'third', expected 7"):
        run()


def test_an_interrupted_comparison_ends_as_one_that_was_not(llama_dir, data, tmp_path, monkeypatch):
    def run(name: str) -> list[dict[str, Any]]:
        results = tmp_path / f"{name}.json"
        command = [
            "compare_commonsense.py", str(data), str(llama_dir), "--dtype", "float32", "--steps", "2", "--batch-size",
            "2", "--methods", "peqa", "--seeds", "0", "--results", str(results), "--save", str(tmp_path / name),
        ]  # fmt: skip
        monkeypatch.setattr(sys, "argv", command)
        compare_commonsense.main()
        return json.loads(results.read_text())[0]["runs"]

    whole, asked, save = run("whole"), [], PeftModel.save_pretrained

    def interrupted(model: Any, folder: Any) -> None:
        save(model, folder)
        raise KeyboardInterrupt

    def ask(*arguments: Any) -> Any:
        asked.append(arguments)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return answered(*arguments)

    monkeypatch.setattr(PeftModel, "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("parts")
    assert not list((tmp_path / "parts").iterdir())  # no half of an adapter
    monkeypatch.setattr(PeftModel, "save_pretrained", save)
    monkeypatch.setattr(compare_commonsense, "answered", ask)
    with pytest.raises(KeyboardInterrupt):
        run("parts")
    assert run("parts") == whole and len(asked) == 3


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
