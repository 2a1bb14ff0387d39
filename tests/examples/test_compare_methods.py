"""The comparison of methods: it runs and resumes, what is tied is tied, and its tables are those of its results."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any

import compare_methods
import pytest
import torch
from comparison.bases import load_base, targets_of
from comparison.bench import Bench
from comparison.data import Questions, read_questions
from comparison.evaluation import accuracy, mean_loss
from comparison.generation import read_rows
from comparison.merging import merge
from comparison.methods import DEFAULT_METHODS, Unavailable, adapt, count_trained, parse_method
from hypothesis import given, settings
from hypothesis import strategies as st
from support.bases import NF4
from transformers import AutoTokenizer

from peft_sgrq import SGRQLinear

pytestmark = pytest.mark.slow


@pytest.fixture
def arguments(llama_dir: Path, tmp_path: Path) -> list[str]:
    questions = tmp_path / "questions.jsonl"
    texts = {"train": "the quick brown fox jumps over", "test": "a slow red hen looks at", "other": "sum of"}
    for name, words in texts.items():
        rows = [{"text": f"Line {i}: {words} {i * i} lazy dogs."} for i in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [{"context": "x" * 20 + str(i), "choices": ["one", "two two"], "label": i % 2} for i in range(6)]
    questions.write_text("\n".join(map(json.dumps, rows)))
    return [
        "compare_methods.py", str(llama_dir), *(f"--{name}={tmp_path / name}.jsonl" for name in texts),
        "--questions", str(questions), "--base", "nf4", "--dtype", "float32", "--steps", "3", "--batch-size", "2",
        "--length", "16", "--calibration-rows", "4", "--evaluation-rows", "4", "--context-length", "8",
        "--seeds", "0", "1", "--rates", "3", "--results", str(tmp_path / "results.json"),
    ]  # fmt: skip


def run(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", arguments)
    compare_methods.main()


def test_it_sweeps_until_the_best_rate_is_inside_and_resumes(arguments, tmp_path, monkeypatch, capsys):
    results = tmp_path / "results.json"
    arguments += ["--methods", "lora-2", "qalora-2", "sgrq-0.5", "sgrq-0.6", "peqa-row"]
    run(monkeypatch, [*arguments, "--limit", "0"])
    assert "The time is up" in capsys.readouterr().out
    run(monkeypatch, arguments)
    assert "Everything is done" in capsys.readouterr().out
    (setting,) = json.loads(results.read_text())
    assert list(setting["unavailable"]) == ["qalora-2"] and "GPTQ" in setting["unavailable"]["qalora-2"]
    assert setting["same"] == {"sgrq-0.6": "sgrq-0.5"}  # both are one of two groups, two of three
    assert set(setting["untrained"]) == {"validation", "test", "other", "accuracy"}
    for method in ("lora-2", "sgrq-0.5", "peqa-row"):
        own = [run for run in setting["runs"] if run["method"] == method]
        sweep = {run["learning_rate"]: run for run in own if run["seed"] == 0}
        assert len(sweep) >= 3
        for state in ("tuned", "merged"):
            best = min(sweep, key=lambda rate: sweep[rate][state]["validation"])
            assert len(sweep) == 7 or min(sweep) < best < max(sweep)
            (other,) = [run for run in own if (run["seed"], run["learning_rate"]) == (1, best)]
            assert "accuracy" in other[state] and "accuracy" in sweep[best][state]
        assert all(run["same_bits"] == (method != "lora-2") for run in own)
    before = results.read_bytes()
    run(monkeypatch, arguments)
    assert results.read_bytes() == before  # nothing is run twice
    run(monkeypatch, [*arguments, "--cost"])
    cost = json.loads(results.read_text())[0]["cost"]
    assert set(cost) == {"lora-2", "sgrq-0.5", "sgrq-0.6", "peqa-row"}
    assert all(value > 0 for found in cost.values() for value in found.values())


def test_refining_looks_on_both_sides_of_the_best_rate(arguments, tmp_path, monkeypatch):
    arguments += ["--methods", "peqa", "--seeds", "0", "--factor", "4"]
    run(monkeypatch, arguments)
    swept = json.loads((tmp_path / "results.json").read_text())[0]["runs"]
    run(monkeypatch, [*arguments, "--refine", "1"])
    refined = json.loads((tmp_path / "results.json").read_text())[0]["runs"]
    best = min(swept, key=lambda run: run["tuned"]["validation"])["learning_rate"]
    added = [run["learning_rate"] for run in refined[len(swept) :]]
    assert added == pytest.approx([best / 2, best * 2], rel=0.05)
    run(monkeypatch, [*arguments, "--refine", "1"])
    assert json.loads((tmp_path / "results.json").read_text())[0]["runs"] == refined  # nothing nearer still


def test_an_unknown_method_or_option_is_refused_with_what_is_known():
    assert [parse_method(name).name for name in DEFAULT_METHODS] == list(DEFAULT_METHODS)
    for name in ("lora", "sgrq-x", "dora-8", "", "lora-0", "sgrq-0", "random-knee"):
        with pytest.raises(ValueError, match=r"is not known, expected a name such as lora-16"):
            parse_method(name)
    for name in (
        "lora-8:gradient", "sgrq-0.4:fast", "peqa:beta-1.5", "peqa:gradient", "peqa:global", "random-0.1:gradient",
        "random-0.1:global", "sgrq-0.4:original",
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"has the option .*, expected one of"):
            parse_method(name)
    with pytest.raises(ValueError, match=r"'int9' is not known, expected as-is"):
        load_base("", "int9", torch.float32, [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--centre": "loar=1e-3"}, r"--centre has 'loar=1e-3', expected KIND=RATE"),
        ({"--centre": "lora"}, r"--centre has 'lora', expected KIND=RATE"),
        ({"--rates": "0"}, r"--rates is 0, expected at least 1"),
        ({"--batch-size": "0"}, r"--batch-size is 0, expected at least 1"),
        ({"--evaluation-rows": "0"}, r"--evaluation-rows is 0, expected at least 1"),
        ({"--at": "-1"}, r"--at has \[-1.0\], expected learning rates above 0"),
        ({"--length": "400"}, r"has \d windows of 400 tokens, expected at least 10"),
        ({"--test": "nowhere.txt"}, r"There is no file 'nowhere.txt'"),
        ({"--recover": "nowhere.txt"}, r"There is no file 'nowhere.txt'"),
        ({"--other": "./nowhere"}, r"The text './nowhere' is no file or folder here"),
        ({"--questions": "nowhere.jsonl"}, r"There is no file 'nowhere.jsonl'"),
    ],
    ids=lambda value: " ".join(next(iter(value.items()))) if isinstance(value, dict) else "",
)
def test_mistakes_are_explained_before_anything_is_run(changes, message, arguments, tmp_path, monkeypatch):
    # The last of an option given twice counts.
    monkeypatch.setattr(sys, "argv", [*arguments, *(part for item in changes.items() for part in item)])
    with pytest.raises(ValueError, match=message):
        compare_methods.main()
    assert not (tmp_path / "results.json").exists()


def test_zero_points_of_a_format_without_such_are_not_available(llama_dir):
    base = load_base(str(llama_dir), "nf4", torch.float32, [])
    for name in ("zeros", "peqa:zeros"):
        with pytest.raises(Unavailable, match="store no zero points as floats"):
            adapt(base, parse_method(name), targets_of(base), None)


def test_texts_with_separators_of_lines_are_one_row(llama_dir, tmp_path):
    row = {"context": "one\u2028two é " * 4, "choices": ["a", "b"], "label": 1}
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n\n", encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(llama_dir)
    assert read_questions(tokenizer, path, 4, 2).labels == [1]
    assert read_rows({"dataset": str(path)}) == [row]


def test_evaluation_is_on_the_texts_that_are_named(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", arguments)
    bench = Bench(compare_methods.parse_arguments())
    words = {"validation": "quick brown", "test": "red hen", "other": "sum of"}
    for part, expected in words.items():
        text = "".join(map(bench.tokenizer.decode, bench.parts[part])).replace("  ", " ")
        assert expected in text and not any(word in text for word in words.values() if word != expected)
    train = "".join(map(bench.tokenizer.decode, bench.train))
    assert "Line 1:" in train and "Line 59" not in train  # the end of it is the validation text


def test_the_beta_of_a_method_is_that_of_its_optimizer(arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", arguments)
    bench, found = Bench(compare_methods.parse_arguments()), []
    with monkeypatch.context() as patch:
        made = torch.optim.AdamW.__init__
        patch.setattr(torch.optim.AdamW, "__init__", lambda *a, **k: found.append(k["betas"]) or made(*a, **k))
        for name in ("peqa", "peqa:beta-0.5", "lora-2:constant:beta-0.0"):
            bench.fit(bench.adapted(parse_method(name), 0), parse_method(name), 0, 1e-3)
    assert found == [(0.9, 0.999), (0.5, 0.999), (0.0, 0.999)]


def adapted(directory: Path, name: str) -> tuple[Any, list[SGRQLinear]]:
    model = NF4.load(directory)
    model = adapt(model, parse_method(name), targets_of(model), None)
    return model, [module for module in model.modules() if isinstance(module, SGRQLinear)]


def test_one_number_a_row_is_trained_where_rows_are_tied(llama_dir, ids):
    model, layers = adapted(llama_dir, "peqa-row")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.0)
    for _ in range(3):
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for layer in layers:
        weight = layer.sgrq_delta["default"].weight
        assert bool((weight == weight[:, :1]).all()) and bool((weight != 0).any())
    assert max(layer.sgrq_delta["default"].weight.shape[1] for layer in layers) > 1
    assert count_trained(model, parse_method("peqa-row")) == sum(layer.out_features for layer in layers)


def test_the_gradients_of_tied_numbers_have_the_norm_of_their_sum(llama_dir, ids):
    gradients = {}
    for name in ("peqa", "peqa-row"):
        model, layers = adapted(llama_dir, name)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        gradients[name] = [layer.sgrq_delta["default"].weight.grad for layer in layers]
    for free, tied in zip(gradients["peqa"], gradients["peqa-row"], strict=True):
        torch.testing.assert_close(tied.norm(dim=1), free.sum(1).abs())


@pytest.mark.parametrize("form", ["exp", "absolute"])
def test_other_forms_start_at_the_base_and_merge_exactly(llama_dir, ids, form):
    before = NF4.load(llama_dir)(input_ids=ids).logits
    model, layers = adapted(llama_dir, f"peqa:{form}")
    assert torch.equal(model.eval()(input_ids=ids).logits, before)
    expected = []
    for layer in layers:
        scales = layer.scaled_weight.scales()
        theta = layer.sgrq_delta["default"].parametrizations["weight"].original
        assert theta.requires_grad
        theta.data = torch.randn_like(theta) * 0.1
        expected.append(scales * theta.exp() if form == "exp" else scales + scales.mean() * theta)
    tuned = model(input_ids=ids).logits
    merged = merge(model, parse_method(f"peqa:{form}"))
    assert torch.equal(merged(input_ids=ids).logits, tuned)
    for layer, scales in zip(layers, expected, strict=True):
        torch.testing.assert_close(layer.scaled_weight.scales(), scales)


def test_normalization_layers_are_trained_and_merged_on_request(llama_dir, ids):
    plain, _ = adapted(llama_dir, "peqa")
    model, _ = adapted(llama_dir, "peqa:norms")
    method = parse_method("peqa:norms")
    norms = sum(p.numel() for name, p in NF4.load(llama_dir).named_parameters() if "norm" in name)
    assert norms > 0 and count_trained(model, method) == count_trained(plain, method) + norms
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    tuned = model.eval()(input_ids=ids).logits
    merged = merge(model, method)
    assert torch.equal(merged(input_ids=ids).logits, tuned)
    assert not any("modules_to_save" in name for name, _ in merged.named_parameters())


@pytest.mark.skipif(find_spec("hqq") is None, reason="hqq is not installed")
@pytest.mark.parametrize("name", ["peqa:zeros", "zeros"])
def test_zero_points_are_trained_beside_the_scales_and_alone(name, llama_dir, ids):
    base = load_base(str(llama_dir), "hqq-3-16", torch.float32, [])
    groups = sum(base.get_submodule(target).meta["zero"].numel() for target in targets_of(base))
    method = parse_method(name)
    model = adapt(base, method, targets_of(base), None).eval()
    assert count_trained(model, method) == (groups if name == "zeros" else 2 * groups)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    tuned = model(input_ids=ids).logits
    assert torch.equal(merge(model, method)(input_ids=ids).logits, tuned)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_choices_are_scored_as_the_whole_sequence_would_be(llama_dir, seed):
    model = NF4.load(llama_dir)
    generator = torch.Generator().manual_seed(seed)
    contexts = torch.randint(3, 256, (5, 9), generator=generator)
    lengths = torch.randint(1, 7, (5, 3), generator=generator).tolist()
    choices = [[torch.randint(3, 256, (n,), generator=generator) for n in row] for row in lengths]
    best = []
    for context, row in zip(contexts, choices, strict=True):
        scores = []
        for choice in row:
            whole = torch.cat([context, choice])[None]
            labels = whole.clone()
            labels[:, : len(context)] = -100
            with torch.no_grad():
                scores.append(-float(model(input_ids=whole, labels=labels).loss))  # by token, so characters = tokens
        best.append(max(range(3), key=scores.__getitem__))
    labels = [(index + (number == 0)) % 3 for number, index in enumerate(best)]  # the first question is got wrong
    assert accuracy(model, Questions(contexts, choices, lengths, labels), batch_size=2) == 0.8


def test_a_diverged_model_has_no_loss(llama_dir):
    model = NF4.load(llama_dir)
    windows = torch.randint(3, 256, (5, 12))
    with torch.no_grad():
        losses = [float(model(input_ids=row[None], labels=row[None]).loss) for row in windows]
        assert mean_loss(model, windows, batch_size=2) == pytest.approx(mean(losses), abs=1e-4)
        model.get_input_embeddings().weight.fill_(float("nan"))
    assert mean_loss(model, windows) is None


def test_controls_select_as_many_groups_as_they_stand_against(arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", arguments)
    bench = Bench(compare_methods.parse_arguments())
    found = {name: bench.select(parse_method(name), 0) for name in ("sgrq-0.5", "random-0.5", "bottom-0.5", "peqa")}
    assert found["peqa"] is None
    counts = {name: {k: bin(int(v, 16)).count("1") for k, v in found[name].items()} for name in list(found)[:3]}
    assert counts["sgrq-0.5"] == counts["random-0.5"] == counts["bottom-0.5"]
    assert found["bottom-0.5"] != found["sgrq-0.5"]
