"""The comparison of selections: what it runs is what it says, it resumes, and its tables are those of its results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import compare_selection
import pytest
import selection_table
import torch
from selection_bench import Bench, round_to_grid, windows_of

from peft_sgrq.layer.masks import decode_mask

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    rows = [{"text": f"Line {i}: the quick brown fox jumps over {i * i} lazy dogs."} for i in range(60)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def arguments_for(directory: Path, text: Path, results: Path, *extra: str) -> list[str]:
    return [
        str(directory), "--train", str(text), "--test", str(text), "--base", "dense-3bit", "--group-size", "16",
        "--steps", "2", "--batch-size", "2", "--length", "16", "--calibration-rows", "4", "--evaluation-rows", "4",
        "--learning-rates", "0.01", "0.3", "--seeds", "0", "1", "--ratios", "0.25", "--results", str(results), *extra,
    ]  # fmt: skip


def run(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["compare_selection.py", *arguments])
    compare_selection.main()


@pytest.fixture
def bench(llama_dir, text, tmp_path, monkeypatch) -> Bench:
    monkeypatch.setattr(sys, "argv", ["compare", *arguments_for(llama_dir, text, tmp_path / "r.json")])
    return Bench(compare_selection.parse_arguments())


def test_it_sweeps_at_the_first_seed_and_resumes(llama_dir, text, tmp_path, monkeypatch, capsys):
    results = tmp_path / "results.json"
    arguments = arguments_for(llama_dir, text, results, "--methods", "obs", "random")
    run(monkeypatch, [*arguments, "--limit", "0"])
    assert not results.exists() and "The time is up" in capsys.readouterr().out
    run(monkeypatch, arguments)
    assert "Everything is done" in capsys.readouterr().out
    (setting,) = json.loads(results.read_text())
    runs = setting["runs"]
    # Two selections and all scales: both rates at seed 0, and the better one at seed 1.
    assert len(runs) == 3 * 3
    for method, ratio in (("obs", 0.25), ("random", 0.25), ("random", 1.0)):
        own = [run for run in runs if (run["method"], run["ratio"]) == (method, ratio)]
        sweep = [run for run in own if run["seed"] == 0]
        assert [run["learning_rate"] for run in sweep] == [0.01, 0.3]
        (other,) = [run for run in own if run["seed"] == 1]
        assert other["learning_rate"] == min(sweep, key=lambda run: run["validation"])["learning_rate"]
    assert setting["untrained"]["test"] > 0 and set(setting["overlap"]) == {"0", "1"}
    before = results.read_bytes()
    run(monkeypatch, arguments)
    assert results.read_bytes() == before  # nothing is run twice
    run(monkeypatch, [*arguments, "--steps", "1", "--no-full", "--methods", "random"])
    assert [len(setting["runs"]) for setting in json.loads(results.read_text())] == [9, 3]


def test_the_selections_have_equally_many_scales_and_are_what_they_say(bench):
    ratio, seed = 0.5, 0
    layers = bench.saliency("obs", seed).layers
    chosen = {
        method: bench.select(method, ratio, seed)
        for method in ("obs", "bottom", "random", "obs:global", "obs:layerwise", "random:layerwise")
    }

    def scales(selection: dict[str, str]) -> int:
        return sum(
            layers[name].scales_per_group * len(decode_mask(mask, layers[name].selectable))
            for name, mask in selection.items()
        )

    assert scales(chosen["obs"]) == scales(chosen["bottom"]) == scales(chosen["random"])
    for method in ("obs:global", "obs:layerwise", "random:layerwise"):
        assert 0.5 * scales(chosen["obs"]) < scales(chosen[method]) <= scales(chosen["obs"]), method
    for name, layer in layers.items():
        scores = layer.group_scores()
        top, bottom = (scores[decode_mask(chosen[method][name], layer.selectable)] for method in ("obs", "bottom"))
        assert float(top.min()) >= float(bottom.max())
    assert chosen["random"] != bench.select("random", ratio, 1)
    assert chosen["random"] == bench.select("random", ratio, 0)


def test_single_scales_are_as_many_as_those_of_whole_columns(bench):
    masks = bench.scale_masks(0.5, 0)
    for name, layer in bench.saliency("magnitude", 0).layers.items():
        assert masks[name].shape == (layer.shape[0], layer.selectable)
        assert int(masks[name].sum()) == layer.shape[0] * layer.selectable // 2
    one, all_of_columns = (bench.run(method, 0.5, 0, 0.01)["scales"] for method in ("gradient:scale", "random"))
    assert one == all_of_columns


def test_the_grid_has_eight_values_in_a_group():
    weight = torch.randn(5, 150)
    rounded = round_to_grid(weight)
    assert rounded.shape == weight.shape
    for part, original in zip(rounded.split(64, 1), weight.split(64, 1), strict=True):
        for row, before in zip(part, original, strict=True):
            assert len(row.unique()) <= 8
            step = (max(float(before.max()), 0) - min(float(before.min()), 0)) / 7
            assert float((row - before).abs().max()) <= step * 1.0001  # half a step, and the zero point is rounded
    assert torch.equal(round_to_grid(torch.zeros(2, 64)), torch.zeros(2, 64))


def test_texts_and_rows_of_questions_become_windows(tmp_path, llama_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama_dir)
    (tmp_path / "a.txt").write_text("x" * 100)
    (tmp_path / "b.jsonl").write_text(json.dumps({"question": "q" * 30, "answer": "a" * 30}))
    assert windows_of(tokenizer, tmp_path / "a.txt", 16, 1000).shape == (6, 16)
    assert windows_of(tokenizer, tmp_path / "a.txt", 16, 40).shape == (2, 16)
    windows = windows_of(tokenizer, tmp_path / "b.jsonl", 16, 1000)
    assert tokenizer.decode(windows.flatten()) == ("q" * 30 + "\n" + "a" * 30)[:48]


def a_run(method: str, seed: int, rate: float, test: float, **fields: Any) -> dict[str, Any]:
    return {
        "method": method, "ratio": 0.1, "seed": seed, "learning_rate": rate, "validation": test, "test": test,
        "scales": 1234, **fields,
    }  # fmt: skip


def test_tables_give_mean_spread_and_the_difference_seed_by_seed():
    random = [a_run("random", seed, 0.1, 3.0 + 0.1 * seed) for seed in range(3)]
    worse = a_run("random", 0, 0.2, 9.0)  # a rate that was not chosen
    obs = [a_run("obs", seed, 0.2, value) for seed, value in enumerate((2.9, 3.1, 3.0))]
    table = selection_table.losses([*random, worse, *obs]).splitlines()
    differences = [2.9 - 3.0, 3.1 - 3.1, 3.0 - 3.2]
    expected = f"| 0.1 | obs | 1,234 | 0.2 | 3.000 ± 0.100 | {mean(differences):+.3f} ± {stdev(differences):.3f} | 3 |"
    assert expected in table
    assert "| 0.1 | random | 1,234 | 0.1 | 3.100 ± 0.100 |  | 3 |" in table


def test_of_rates_run_at_all_seeds_the_one_with_the_lowest_mean_is_taken():
    low = [a_run("obs", seed, 0.1, value) for seed, value in enumerate((2.0, 3.0, 3.0))]
    high = [a_run("obs", seed, 0.2, value) for seed, value in enumerate((2.5, 2.6, 2.7))]
    once = a_run("obs", 0, 0.4, 1.0)
    chosen = selection_table.best([*low, once, *high], "obs", 0.1)
    assert list(chosen) == [0, 1, 2] and all(run["learning_rate"] == 0.2 for run in chosen.values())


def test_selections_are_compared_at_the_same_rate_where_several_were_run():
    runs = [
        a_run(method, seed, rate, 3.0 + rate + 0.01 * seed + (0.5 if method == "obs" else 0))
        for method in ("random", "obs")
        for rate in (0.1, 0.2)
        for seed in range(3)
    ]
    once = a_run("random", 0, 0.4, 1.0)
    (table,) = selection_table.same_rates([*runs, once])
    assert table.splitlines() == [
        "| ratio 0.1, same rate | rate 0.1: test loss | less random | rate 0.2: test loss | less random |",
        "|---|---|---|---|---|",
        "| random | 3.110 ± 0.010 |  | 3.210 ± 0.010 |  |",
        "| obs | 3.610 ± 0.010 | +0.500 ± 0.000 | 3.710 ± 0.010 | +0.500 ± 0.000 |",
    ]
    assert selection_table.same_rates([run for run in runs if run["learning_rate"] == 0.1]) == []


def test_all_rates_run_at_all_seeds_and_new_selections_get_overlaps(llama_dir, text, tmp_path, monkeypatch):
    results = tmp_path / "results.json"
    arguments = arguments_for(llama_dir, text, results, "--no-full")
    run(monkeypatch, [*arguments, "--methods", "random", "magnitude"])
    run(monkeypatch, [*arguments, "--methods", "magnitude", "random", "bottom", "--all-rates"])
    (setting,) = json.loads(results.read_text())
    runs = {(run["method"], run["seed"], run["learning_rate"]) for run in setting["runs"]}
    assert runs == {
        (method, seed, rate) for method in ("random", "magnitude", "bottom") for seed in (0, 1) for rate in (0.01, 0.3)
    }
    pairs = [tuple(item["methods"]) for item in setting["overlap"]["1"]]
    assert sorted(pairs) == [("magnitude", "bottom"), ("magnitude", "random"), ("random", "bottom")]


def test_the_tables_on_the_page_are_those_of_the_results(tmp_path, monkeypatch):
    root = EXAMPLES.parents[1]
    results = sorted(map(str, (root / "docs" / "results").glob("selection-*.json")))
    page = root / "docs" / "selection-results.md"
    if not results:
        pytest.skip("no results in this checkout")
    copy = tmp_path / "page.md"
    copy.write_text(page.read_text())
    monkeypatch.setattr(sys, "argv", ["selection_table.py", *results, "--update", str(copy)])
    selection_table.main()
    assert copy.read_text() == page.read_text()
