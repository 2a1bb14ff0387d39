"""The table by learning rates has what the results have, and what a merge left of a gain."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import rates_report
from comparison.rates import rates_table


def run(method: str, rate: float, seed: int, tuned: float, merged: float | None) -> dict[str, Any]:
    losses = [None if value is None else {"test": value, "other": value + 2} for value in (tuned, merged)]
    found = {"method": method, "learning_rate": rate, "seed": seed, "trained": 1000}
    return found | {"tuned": losses[0], "merged": losses[1]}


@pytest.fixture
def settings() -> list[dict[str, Any]]:
    shared = {
        "model": "m", "base": "nf4", "train": "a", "other": "b", "dtype": "float32", "steps": 1, "batch_size": 2,
        "length": 3,
    }  # fmt: skip
    runs = [
        run("lora-2", 0.1, 0, 2.0, 2.9), run("lora-2", 0.01, 0, 2.5, None), run("peqa", 0.1, 1, 2.0, 2.0),
        run("peqa", 0.1, 0, 2.4, 2.4), run("peqa", 1.0, 0, 4.0, 4.0),
    ]  # fmt: skip
    untrained = {"test": 3.0, "other": 5.0}
    return [
        {
            "shared": shared, "versions": {"torch": "2"}, "machine": "here", "runs": runs, "untrained": untrained,
            "full_precision": untrained,
        }
    ]  # fmt: skip


def test_each_rate_has_its_row_and_what_the_merge_left(settings):
    rows = rates_table(settings).splitlines()[2:]
    assert len(rows) == 2 + 4
    assert rows[2] == "| nf4 | lora-2 | 0.01 | 0 | 1,000 | 2.500 |  |  | 4.500 |  |"
    assert rows[3] == "| nf4 | lora-2 | 0.1 | 0 | 1,000 | 2.000 | 2.900 | 10 % | 4.000 | 4.900 |"
    assert rows[4].startswith("| nf4 | peqa | 0.1 | 0, 1 | 1,000 | 2.200 ± 0.283 | 2.200 ± 0.283 | 100 % | 4.200")
    assert rows[5] == "| nf4 | peqa | 1 | 0 | 1,000 | 4.000 | 4.000 |  | 6.000 | 6.000 |"  # diverged


def test_a_page_gets_the_table_between_its_marks(settings, tmp_path, monkeypatch):
    results, page = tmp_path / "results.json", tmp_path / "page.md"
    results.write_text(json.dumps(settings))
    page.write_text(
        "before\n<!-- rates: made by examples/benchmarks/rates_report.py -->\nold\n<!-- end of rates -->\nafter\n"
    )
    monkeypatch.setattr(sys, "argv", ["rates_report.py", str(results), "--update", str(page)])
    rates_report.main()
    text = page.read_text()
    assert rates_table(settings) in text and "old" not in text
    assert text.startswith("before\n") and text.endswith("after\n")
