"""A row for each method and learning rate: what was learnt, what the merge left of it, and what was forgotten."""

from __future__ import annotations

from collections import defaultdict
from statistics import mean
from typing import Any

from comparison.tables import Setting
from markdown_tables import spell, table


def rates_table(settings: list[Setting]) -> str:
    """Of settings that differ in their base alone: losses in and out of domain by base, method and learning rate.

    "Kept" is the part of what tuning gained in domain, over the untrained base, that is there after merging.
    """
    heads = ["base", "method", "learning rate", "seeds", "trained"]
    rows = [[*heads, "in domain, tuned", "merged", "kept", "out of domain, tuned", "merged"]]
    for setting in settings:
        shared = setting["shared"]
        base = shared["base"] + (", recovered" if "recover" in shared else "")
        for name, key in (("not quantized", "full_precision"), ("untrained", "untrained")):
            found = setting[key]
            losses = [f"{found[part]:.3f}" for part in ("test", "other")]
            rows.append([base, name, "", "", "", losses[0], losses[0], "", losses[1], losses[1]])
        for (method, rate), runs in _grouped(setting["runs"]).items():
            cells = [base, method, f"{rate:g}", _seeds(runs), f"{runs[0]['trained']:,}"]
            for part in ("test", "other"):
                for state in ("tuned", "merged"):
                    cells.append(spell([run[state][part] for run in runs if run[state] is not None]))
                if part == "test":
                    cells.append(_kept(runs, setting["untrained"]["test"]))
            rows.append(cells)
    return table(rows)


def _grouped(runs: list[dict[str, Any]]) -> dict[tuple[str, float], list[dict[str, Any]]]:
    found: dict[tuple[str, float], list[dict[str, Any]]] = defaultdict(list)
    order = list(dict.fromkeys(run["method"] for run in runs))
    for run in sorted(runs, key=lambda run: (order.index(run["method"]), run["learning_rate"], run["seed"])):
        found[run["method"], run["learning_rate"]].append(run)
    return found


def _seeds(runs: list[dict[str, Any]]) -> str:
    return ", ".join(str(run["seed"]) for run in runs)


def _kept(runs: list[dict[str, Any]], untrained: float) -> str:
    pairs = [(run["tuned"]["test"], run["merged"]["test"]) for run in runs if run["merged"] is not None]
    if not pairs or any(None in pair for pair in pairs):
        return ""
    gained, left = (mean(untrained - pair[i] for pair in pairs) for i in (0, 1))
    return f"{100 * left / gained:.0f} %" if gained > 0 else ""  # of nothing there is no part
