"""Tables of what `compare_selection.py` found: losses with their spread, and overlaps of selections.

python examples/benchmarks/selection_table.py docs/results/selection-*.json
python examples/benchmarks/selection_table.py docs/results/selection-*.json --update docs/selection-results.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

from markdown_tables import put_between, spell, table
from results_file import replace_text

START, END = "<!-- tables: made by examples/benchmarks/selection_table.py -->", "<!-- end of the tables -->"

Run = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--update", type=Path, help="a Markdown file to put the tables into, between its marks")
    arguments = parser.parse_args()
    settings = [setting for path in arguments.results for setting in json.loads(path.read_text())]
    text = "\n\n".join(map(describe, settings))
    if arguments.update is None:
        print(text)
        return
    replace_text(arguments.update, put_between(arguments.update.read_text(encoding="utf-8"), START, END, text))


def describe(setting: dict[str, Any]) -> str:
    """A section of Markdown for one setting."""
    shared = setting["shared"]
    base = {"nf4": "NF4", "dense": "not quantized", "dense-3bit": "rounded to 3 bits in groups of 64"}[shared["base"]]
    group = "" if shared["base"] == "nf4" else f", scales of {shared['group_size']} columns"
    versions = ", ".join(f"{name} {number}" for name, number in setting["versions"].items())
    parts = [
        f"### {shared['model']}, {base}{group}: {shared['train']}",
        f"{shared['steps']} steps of {shared['batch_size']} x {shared['length']} tokens, {shared['dtype']}; test on "
        f"{shared['evaluation_rows']} windows of {shared['test']}. {versions}. {setting['machine']}.",
    ]
    if "untrained" in setting:
        parts.append(f"Untrained: test loss {setting['untrained']['test']:.3f}.")
    parts.append(losses(setting["runs"]))
    parts += [text for text in (*same_rates(setting["runs"]), overlaps(setting["overlap"])) if text]
    return "\n\n".join(parts)


def losses(runs: list[Run]) -> str:
    """Test loss by selection: mean over seeds, its standard deviation, and the difference to `random` seed by seed."""
    rows = [["ratio", "selection", "scales", "learning rate", "test loss", "less random", "seeds"]]
    pairs = list(dict.fromkeys((run["ratio"], run["method"]) for run in runs))
    for ratio, method in sorted(pairs, key=lambda pair: pair[0]):
        chosen = best(runs, method, ratio)
        control = best(runs, "random", ratio)
        shared = sorted(set(chosen) & set(control))
        differences = [chosen[seed]["test"] - control[seed]["test"] for seed in shared]
        name = "all" if ratio == 1.0 else method
        run = next(iter(chosen.values()))
        cells = [
            f"{ratio:g}",
            name,
            f"{run['scales']:,}",
            f"{run['learning_rate']:g}",
            spell([run["test"] for run in chosen.values()]),
            "" if method == "random" else spell(differences, sign="+"),
            str(len(chosen)),
        ]
        rows.append(cells)
    return table(rows)


def best(runs: list[Run], method: str, ratio: float) -> dict[int, Run]:
    """By seed the runs at one learning rate: of those run at all seeds, that with the lowest mean validation loss."""
    own = [run for run in runs if (run["method"], run["ratio"]) == (method, ratio)]
    if not own:
        return {}
    by_rate: dict[float, list[Run]] = {}
    for run in own:
        by_rate.setdefault(run["learning_rate"], []).append(run)
    most = max(map(len, by_rate.values()))
    full = [found for found in by_rate.values() if len(found) == most]
    chosen = min(full, key=lambda found: mean(run["validation"] for run in found))
    return {run["seed"]: run for run in sorted(chosen, key=lambda run: run["seed"])}


def same_rates(runs: list[Run]) -> list[str]:
    """Where several learning rates were run at all seeds: at each of them every selection beside `random`."""
    tables = []
    for ratio in sorted({run["ratio"] for run in runs}):
        found: dict[tuple[str, float], dict[int, float]] = {}
        for run in runs:
            if run["ratio"] == ratio:
                found.setdefault((run["method"], run["learning_rate"]), {})[run["seed"]] = run["test"]
        seeds = max(map(len, found.values()))
        rates = sorted(
            rate for (method, rate), tests in found.items() if method == "random" and len(tests) == seeds > 1
        )
        if len(rates) < 2:
            continue
        heads = [head for rate in rates for head in (f"rate {rate:g}: test loss", "less random")]
        rows = [[f"ratio {ratio:g}, same rate", *heads]]
        for method in dict.fromkeys(method for method, _ in found):
            cells = []
            for rate in rates:
                tests, control = found.get((method, rate), {}), found["random", rate]
                differences = [tests[seed] - control[seed] for seed in sorted(tests)]
                full = len(tests) == seeds
                cells += [
                    spell(list(tests.values())) if full else "",
                    spell(differences, sign="+") if full and method != "random" else "",
                ]
            rows.append([method, *cells])
        tables.append(table(rows))
    return tables


def overlaps(by_seed: dict[str, list[dict[str, Any]]]) -> str:
    """Jaccard overlaps of two selections, mean over seeds."""
    values: dict[tuple[str, str], dict[float, list[float]]] = {}
    for found in by_seed.values():
        for item in found:
            one, other = item["methods"]
            values.setdefault((one, other), {}).setdefault(item["ratio"], []).append(item["jaccard"])
    if not values:
        return ""
    ratios = sorted({ratio for cells in values.values() for ratio in cells})
    rows = [["overlap of", "and", *(f"ratio {ratio:g}" for ratio in ratios)]]
    for (one, other), cells in values.items():
        shown = [f"{mean(cells[ratio]):.2f}" if ratio in cells else "" for ratio in ratios]
        rows.append([one, other, *shown])
    return table(rows)


if __name__ == "__main__":
    main()
