"""Tables and plots of the comparison of methods: means, differences seed by seed, choices by validation."""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import methods_report
import pytest
from comparison.cross import cross_table
from comparison.tables import cost_table, describe, exactness, front, summary_table
from markdown_tables import put_between
from PIL import Image

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"


def a_run(method: str, seed: int, rate: float, test: float, other: float = 1.0, merged: float = 0.0) -> dict[str, Any]:
    tuned = {"validation": test, "test": test, "other": other, "accuracy": 0.5}
    after = {key: value + merged for key, value in tuned.items()} if merged is not None else None
    return {
        "method": method, "seed": seed, "learning_rate": rate, "trained": 1234, "adapter_bytes": 5000, "tuned": tuned,
        "merged": after, "same_bits": not merged, "seconds": 1.0,
    }  # fmt: skip


def a_setting(runs: list[dict[str, Any]]) -> dict[str, Any]:
    shared = {
        "model": "m",
        "base": "nf4",
        "train": "a/b",
        "steps": 1,
        "batch_size": 1,
        "length": 1,
        "dtype": "float32",
    }
    untrained = {"validation": 5.0, "test": 5.0, "other": 0.5}
    return {
        "shared": {**shared, "other": "c/d"}, "versions": {"torch": "2"}, "machine": "none", "unavailable": {},
        "same": {}, "untrained": untrained, "runs": runs,
    }  # fmt: skip


def test_tables_give_mean_spread_and_differences_seed_by_seed():
    lora = [a_run("lora-16", seed, 0.1, 3.0 + 0.1 * seed, merged=0.5) for seed in range(3)]
    worse = a_run("lora-16", 0, 0.2, 9.0)  # a rate that was not chosen
    sgrq = [a_run("sgrq-0.4", seed, 0.2, value) for seed, value in enumerate((3.1, 3.0, 3.3))]
    peqa = [a_run("peqa", seed, 0.2, 2.5, other=2.0) for seed in range(3)]
    tried = [a_run("peqa:exp", seed, 0.2, 2.6, other=2.0) for seed in range(3)]
    setting = a_setting([*lora, worse, *sgrq, *peqa, *tried])
    text = describe(setting)
    assert "| lora-16 | 0.1 | 1,234 | 5 | 3.100 ± 0.100 | 3.600 ± 0.100 | 1.000 ± 0.000 | 1.500 ± 0.000 |" in text
    assert (
        "| peqa:exp | 0.2, plain 0.2 | 1,234 | 2.600 ± 0.000 | 2.000 ± 0.000 "
        "| +0.100 ± 0.000 | +0.000 ± 0.000 | +0.100 ± 0.000 | +0.000 ± 0.000 |"
    ) in text
    differences = [3.1 - 3.5, 3.0 - 3.6, 3.3 - 3.7]
    assert f"{mean(differences):+.3f} ± {stdev(differences):.3f}" in summary_table([setting])
    assert front(setting["runs"]) == ["sgrq-0.4", "peqa"]  # LoRA is beaten by sgrq-0.4 in both
    setting["cost"] = {name: {"step": step, "peak": 4, "kept": 2} for name, step in (("lora-16", 0.2), ("peqa", 0.1))}
    assert "| peqa | 0.50 | 1.00 | 1.00 |" in cost_table([setting])


def test_rates_and_methods_are_chosen_by_validation_alone():
    def run(method: str, seed: int, rate: float, validation: float, test: float) -> dict[str, Any]:
        found = a_run(method, seed, rate, test)
        return found | {state: {**found[state], "validation": validation} for state in ("tuned", "merged")}

    lora = [run("lora-8", 0, 0.1, 2.0, 4.0), run("lora-8", 0, 0.2, 3.0, 1.0), run("lora-16", 0, 0.1, 2.5, 1.0)]
    lora += [run("lora-8", 1, 0.1, 2.0, 4.0), run("lora-8", 1, 0.2, 1.0, 1.0), run("lora-16", 1, 0.1, 2.5, 1.0)]
    peqa = [run("peqa", seed, 0.1, 2.0, 3.5) for seed in range(2)]
    table = summary_table([a_setting([*lora, *peqa])])
    assert "| lora-8: 4.000 ± 0.000 |" in table and "| -0.500 ± 0.000 |" in table


def test_differences_to_peqa_are_by_model_and_width_where_all_methods_were_run():
    methods = [
        "lora-2",
        "lora-8",
        "lora-8:original",
        "ia3",
        "sgrq-0.4",
        "random-0.1",
        "bottom-0.1",
        "peqa-row",
        "peqa",
        "peqa:beta-0.5",
        "lora-8:beta-0.5",
    ]
    losses = {"lora-2": 3.5, "lora-8": 3.0, "lora-8:original": 2.9, "sgrq-0.4": 3.4, "peqa:beta-0.5": 3.125}
    runs = [a_run(method, seed, 0.1, losses.get(method, 3.25) + seed) for method in methods for seed in range(2)]
    setting = a_setting(runs)
    few = a_setting(runs[6:])
    few["shared"] |= {"base": "hqq-2-64"}
    assert cross_table([setting, few]).splitlines()[2:] == [
        "| m, a | PEQA less the best LoRA | +0.250 ± 0.000 |  |  |",
        "| m, a | less LoRA into the original | +0.350 ± 0.000 |  |  |",
        "| m, a | less LoRA r=2, about as many values | -0.250 ± 0.000 |  |  |",
        "| m, a | less SGRQ at 0.4 | -0.150 ± 0.000 |  |  |",
        "| m, a | with beta 0.5 less the best LoRA with 0.9 or 0.5 | +0.125 ± 0.000 |  |  |",
    ]


def test_what_cannot_be_merged_is_in_no_table_of_merged_losses():
    lora = [a_run("lora-16", 0, 0.1, 3.0), a_run("lora-16:constant", 0, 0.1, 2.0, merged=None)]
    setting = a_setting([*lora, a_run("lora-16:original", 0, 0.1, 2.9), a_run("peqa", 0, 0.1, 3.1)])
    assert "constant" not in describe(setting)
    assert "| lora-16: 3.000 | lora-16: 2.900 |  | 3.100 |" in summary_table([setting])
    assert cost_table([setting | {"cost": {"peqa": {"step": 1, "peak": 1, "kept": 1}}}]) == ""
    inexact = a_run("peqa", 0, 0.2, 3.1, merged=0.1)
    assert "in 1 of 2 runs of scales and in 2 of 2 of LoRA" in exactness([a_setting([*setting["runs"], inexact])])


def test_the_tables_and_plots_on_the_page_are_those_of_the_results(tmp_path, monkeypatch):
    root = EXAMPLES.parents[1]
    results = sorted(map(str, (root / "docs" / "results").glob("methods-*.json")))
    pages = [root / "docs" / "results.md", root / "docs" / "results" / "methods.md"]
    copies = [tmp_path / page.name for page in pages]
    for page, copied in zip(pages, copies, strict=True):
        copied.write_text(page.read_text())
    options = ["--update", *map(str, copies), "--plots", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["report", *results, *options])
    methods_report.main()
    for page, copied in zip(pages, copies, strict=True):
        assert copied.read_text() == page.read_text()
    for path in results:
        picture = Path(path).with_suffix(".png")
        drawn = [Image.open(path).text["Description"] for path in (picture, tmp_path / picture.name)]
        assert picture.stat().st_size < 150_000 and drawn[0] == drawn[1], f"draw {picture.name} again"
        assert f"({picture.name})" in pages[1].read_text()


def test_a_page_without_marks_is_refused():
    with pytest.raises(ValueError, match="has no marks '<!-- a -->' and '<!-- b -->'"):
        put_between("nothing", "<!-- a -->", "<!-- b -->", "text")
