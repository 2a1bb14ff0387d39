"""The examples that measure recovery: they do what they say, they resume, and the page has their tables."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import recover_low_bits
import recover_then_tune
import recovery_memory
import recovery_table
import torch
from recovery_bench import settings_of

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    rows = [{"text": f"Line {i}: the quick brown fox jumps over {i * i} lazy dogs."} for i in range(60)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def run(module: Any, monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


def arguments_for(directory: Path, text: Path, results: Path) -> list[Any]:
    return [
        directory, "--data", text, "--test", text, "--samples", 8, "--length", 16, "--batch-size", 4,
        "--evaluation-rows", 4, "--results", results,
    ]  # fmt: skip


def test_it_recovers_in_every_way_keeps_what_is_done_and_makes_a_table(llama_dir, text, tmp_path, monkeypatch, capsys):
    results = tmp_path / "results.json"
    ways = ["--recover", "epochs=2 learning_rate=0.03", "epochs=0 learning_rate=0.03 distill_steps=4"]
    arguments = [*arguments_for(llama_dir, text, results), "--bits", 2, "--other", text, "--seeds", 0, 1, *ways]
    run(recover_low_bits, monkeypatch, *arguments, "--limit", 0)
    assert "The time is up" in capsys.readouterr().out
    run(recover_low_bits, monkeypatch, *arguments)
    (setting,) = json.loads(results.read_text())
    assert setting["shared"]["model"] == llama_dir.name and setting["shared"]["data"].endswith("/text.jsonl")
    assert setting["bases"]["2"]["test"] != setting["bases"]["full"]["test"]
    assert len(setting["runs"]) == 4
    blocks, distilled = setting["runs"][:2]
    assert all(after < before for before, after in blocks["blocks"]) and len(blocks["blocks"]) == 2
    assert distilled["blocks"] == [] and len(distilled["divergence"]) == 2
    assert len({run["test"] for run in setting["runs"]} | {setting["bases"]["2"]["test"]}) == 5
    content = results.read_bytes()
    run(recover_low_bits, monkeypatch, *arguments)
    assert results.read_bytes() == content  # nothing is run twice
    capsys.readouterr()
    run(recovery_table, monkeypatch, results)
    table = capsys.readouterr().out
    assert "All with `learning_rate=0.03`." in table
    first = [line.split("|")[2].strip() for line in table.splitlines() if line.startswith("| 2 |")]
    assert first == ["no", "`epochs=2`", "`epochs=0`, `distill_steps=4`"]


def test_a_streamed_reference_gives_the_same_and_hqq_is_another_base(llama_dir, text, tmp_path, monkeypatch):
    pytest.importorskip("hqq")
    runs = []
    for name, extra in {"memory": [], "stream": ["--stream"], "hqq": ["--quantizer", "hqq"]}.items():
        results = tmp_path / f"{name}.json"
        arguments = [*arguments_for(llama_dir, text, results), "--bits", 3, "--seeds", 0, "--recover", "epochs=1"]
        run(recover_low_bits, monkeypatch, *arguments, *extra)
        (setting,) = json.loads(results.read_text())
        runs.append({key: setting["runs"][0][key] for key in ("test", "blocks")} | {"base": setting["bases"]["3"]})
    assert runs[0] == runs[1]
    assert runs[0]["base"] != runs[2]["base"]


def test_both_starts_are_tuned_at_all_rates_once(llama_dir, text, tmp_path, monkeypatch, capsys):
    results = tmp_path / "results.json"
    arguments = [
        *arguments_for(llama_dir, text, results), "--train", text, "--bits", 2, "--seeds", 0, 1, "--steps", 2,
        "--recovery", "epochs=1", "--learning-rates", 0.01, 0.05,
    ]  # fmt: skip
    run(recover_then_tune, monkeypatch, *arguments)
    (setting,) = json.loads(results.read_text())
    runs = setting["runs"]
    assert [(run["start"], run["seed"]) for run in runs] == [
        ("plain", 0), ("plain", 0), ("recovered", 0), ("recovered", 0), ("plain", 1), ("recovered", 1),
    ]  # fmt: skip
    plain = {run["untuned"] for run in runs if run["start"] == "plain"}
    recovered = [run["untuned"] for run in runs if run["start"] == "recovered"]
    assert len(plain) == 1 and recovered[0] == recovered[1] and not plain & set(recovered)
    sweep = {run["learning_rate"]: run["validation"] for run in runs[:2]}
    assert runs[4]["learning_rate"] == min(sweep, key=lambda rate: sweep[rate])
    capsys.readouterr()
    run(recovery_table, monkeypatch, results)
    out = capsys.readouterr().out
    assert "| 2 | plain |" in out and "| 2 | recovered |" in out


def test_ways_to_recover_are_read_as_arguments():
    assert settings_of("epochs=20 augmented=true importance=diag learning_rate=1e-2") == {
        "epochs": 20, "augmented": True, "importance": "diag", "learning_rate": 0.01,
    }  # fmt: skip
    assert settings_of("") == {}
    with pytest.raises(ValueError, match="'quickly' is no argument"):
        settings_of("quickly")


def test_shares_are_of_the_gap_in_log_perplexity():
    losses = [2.5, 2.75]
    setting = {
        "bases": {"full": {"test": 2.0}, "3": {"test": 3.0}},
        "runs": [
            {"bits": 3, "seed": seed, "recover": {"epochs": 5}, "test": loss} for seed, loss in enumerate(losses)
        ],
    }
    values = [math.exp(loss) for loss in losses]
    expected = f"| 3 | yes | {mean(values):.2f} ± {stdev(values):.2f} | 38 ± 18 % | 2 |"
    assert recovery_table.recovered(setting).splitlines()[-1] == expected


def test_memory_is_measured_of_a_recovery_that_takes_place(tmp_path):
    recovery_memory.save_llama(tmp_path / "a", 128, 1)
    recovery_memory.save_llama(tmp_path / "b", 128, 2)
    found = recovery_memory.measure(
        str(tmp_path / "b"), str(tmp_path / "a"), batches=1, length=8, epochs=1, stream=True
    )
    assert found["most MB"] >= 0 and found["block over forward pass"] > 1  # it trains, and runs both blocks before
    assert torch.isfinite(torch.tensor(list(found.values()))).all()


def test_the_tables_on_the_page_are_those_of_the_results(tmp_path, monkeypatch):
    root = EXAMPLES.parents[1]
    results = sorted((root / "docs" / "results").glob("recovery-*.json"))
    page = root / "docs" / "recovery.md"
    if not results:
        pytest.skip("no results in this checkout")
    copy = tmp_path / "page.md"
    copy.write_text(page.read_text())
    run(recovery_table, monkeypatch, *results, "--update", copy)
    assert copy.read_text() == page.read_text()
