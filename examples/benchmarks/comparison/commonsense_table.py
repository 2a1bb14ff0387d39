"""The table of what `compare_commonsense.py` found."""

from __future__ import annotations

from collections import defaultdict
from math import sqrt
from statistics import mean
from typing import Any

from markdown_tables import table

Run = dict[str, Any]


def accuracy_table(setting: dict[str, Any], score: str = "sum", reference: str = "peqa") -> str:
    """A row for each method: right answers in percent by task, means over seeds.

    Beside each task stands its binomial error, of as many questions as were asked; seeds ask the same ones, so they do
    not add up. The last column is the difference to a reference, question by question and seed by seed, with its
    standard error over questions.

    Args:
        setting (`dict`): A setting of the results.
        score (`str`): "sum", or "character" for log-likelihoods divided by the length of a choice.
        reference (`str`): The method the others are compared with.
    """
    shared = setting["shared"]
    tasks = list(dict.fromkeys(name for run in setting["runs"] for name in run["tasks"]))
    rows = [["method", "rate", "trained", *tasks, "mean", f"less {reference}"]]
    by_method: dict[tuple[str, float | None], list[Run]] = defaultdict(list)
    for run in setting["runs"]:
        by_method[run["method"], run["learning_rate"]].append(run)
    references = {run["seed"]: run for run in setting["runs"] if run["method"] == reference}
    for (method, rate), runs in by_method.items():
        cells = [
            method,
            "" if rate is None else f"{rate:g}",
            f"{runs[0]['trained']:,}" if "trained" in runs[0] else "",
        ]
        means = []
        for task in tasks:
            found = [run["tasks"][task][score] for run in runs if task in run["tasks"]]
            if not found:
                cells.append("")
                continue
            share = mean(marks.count("1") / len(marks) for marks in found)
            means.append(share)
            cells.append(f"{100 * share:.1f} ± {100 * sqrt(share * (1 - share) / len(found[0])):.1f}")
        cells.append(f"{100 * mean(means):.1f}" if len(means) == len(tasks) else "")
        cells.append("" if method == reference else _difference(runs, references, tasks, score))
        rows.append(cells)
    head = (
        f"{shared['model']}, {shared['base']}, {shared['dtype']}; tuned on {', '.join(shared['train_tasks'])}, "
        f"{shared['steps']} steps of {shared['batch_size']} rows, seeds {_seeds(setting['runs'])}; merged. "
        f"{', '.join(f'{name} {number}' for name, number in setting['versions'].items())}. {setting['machine']}."
    )
    return f"{head}\n\n{table(rows)}"


def _seeds(runs: list[Run]) -> str:
    return ", ".join(str(seed) for seed in dict.fromkeys(run["seed"] for run in runs) if seed is not None) or "none"


def _difference(runs: list[Run], references: dict[int, Run], tasks: list[str], score: str) -> str:
    """The mean difference over tasks in percentage points, with its standard error; of seeds and tasks both have."""
    pairs = [(run, references[run["seed"]]) for run in runs if run["seed"] in references]
    if not pairs:  # the base, which has no seed, is compared with all of them
        pairs = [(run, other) for run in runs if run["seed"] is None for other in references.values()]
    differences, variances = [], []
    for task in tasks:
        marks = [
            (a["tasks"][task][score], b["tasks"][task][score])
            for a, b in pairs
            if {task} <= set(a["tasks"]) & set(b["tasks"])
        ]
        if not marks:
            continue
        count = len(marks[0][0])
        # By question the mean over seeds: answers of two seeds to one question are not independent.
        each = [mean(int(one[i]) - int(other[i]) for one, other in marks) for i in range(count)]
        centre = mean(each)
        differences.append(centre)
        variances.append(sum((value - centre) ** 2 for value in each) / max(count - 1, 1) / count)
    if not differences:
        return ""
    return f"{100 * mean(differences):+.1f} ± {100 * sqrt(sum(variances)) / len(variances):.1f}"
