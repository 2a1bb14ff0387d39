"""Tables of what `rotated_bits.py` and `planned_bits.py` found.

python examples/benchmarks/rotation_table.py docs/results/rotation-*.json docs/results/bits-*.json
python examples/benchmarks/rotation_table.py docs/results/{rotation,bits}-*.json --update docs/rotation.md

On a page the tables of a file stand between `<!-- NAME.json -->` and `<!-- end of NAME.json -->`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import mean
from typing import Any

from markdown_tables import table
from page_tables import print_or_update
from planned_bits import METHODS as PLANNED
from rotated_bits import METHODS, ROTATIONS

Run = dict[str, Any]
NAMES = {
    "none": "not tuned",
    "scales": "scales tuned (SGRQ)",
    "dense": "all weights tuned, then rotated and quantized",
    "straight-through": "all weights tuned through the rounding (RoSTE)",
}
BITS = {
    "uniform": "uniform",
    "fixed": "columns, fixed share",
    "threshold": "columns, one threshold",
    "programme": "columns, programme",
    "output": "layers, output error",
    "fisher": "layers, Fisher",
    "measured": "layers, measured loss",
    "autoround uniform": "AutoRound, uniform",
    "autoround planned": "AutoRound, layers by Fisher",
}


def main() -> None:
    print_or_update(__doc__, describe)


def describe(found: Sequence[Run]) -> str:
    """Markdown for what a file holds."""
    parts = []
    for setting in found:
        parts += [about(setting), *(rotated(setting) if "rotation" in setting["runs"][0] else [planned(setting)])]
    return "\n\n".join(parts)


def about(setting: Run) -> str:
    """The model, the texts, versions and machine."""
    shared, exact = setting["shared"], setting["full precision"]
    held = f"{shared['windows']} x {shared['length']} tokens of {shared['test']}"
    if shared.get("task"):
        held += f" / of {shared['task']}"
    texts = f"Perplexity on {held}; in full precision {spell(exact)}. Calibrated on {shared['rows']} x 128 tokens of "
    texts += f"{shared['calibration']}."
    if "tuned in full precision" in setting:
        texts += f" Tuned in full precision: {spell(setting['tuned in full precision'])}."
    if any(run.get("trained") for run in setting["runs"]):
        texts += (
            f" Tuned for {shared['steps']} steps of {shared['batch']} x {shared['train_length']} tokens of "
            f"{shared['train']}, scales at {shared['rate']:g}, weights at {shared['weight_rate']:g}."
        )
    if any("after" in run for run in setting["runs"]):
        texts += (
            f" Groups of {shared['group_size']}. Recovered on {shared['recovery_rows']} x 128 tokens in "
            f"{shared['epochs']} epochs."
        )
    packages = ", ".join(f"{name} {number}" for name, number in setting["versions"].items())
    return f"**{shared['model']}**, {shared['dtype']}. {texts} {packages}. {setting['machine']}."


def spell(found: dict[str, float]) -> str:
    return " / ".join(f"{value:.2f}" for value in found.values())


def rotated(setting: Run) -> list[str]:
    """A table for each group size and method: rotations by scheme, the mean over seeds with their range."""
    runs, parts = setting["runs"], []
    for size in sorted({run["group_size"] for run in runs}, reverse=True):
        for method in METHODS:
            own = [run for run in runs if run["group_size"] == size and run["method"] == method]
            if own:
                trained = {run["trained"] for run in own if "trained" in run}
                count = f", {max(trained):,} numbers" if trained else ""
                seeds = len({run["seed"] for run in own})
                parts.append(f"Groups of {size}, {NAMES[method]}{count}; rotation seeds: {seeds} at most.")
                parts.append(of_method(own))
    return parts


def of_method(runs: Sequence[Run]) -> str:
    schemes = sorted({run["scheme"] for run in runs}, key=digits)
    rows = [["rotations", *schemes]]
    for rotation in ROTATIONS:
        cells = [
            over_seeds([run["perplexity"] for run in runs if (run["rotation"], run["scheme"]) == (rotation, scheme)])
            for scheme in schemes
        ]
        if any(cells):
            rows.append([rotation, *cells])
    return table(rows)


def digits(scheme: str) -> list[int]:
    """The widths of a scheme, negative, so that schemes of more bits come first."""
    return [-int(width) for width in re.findall(r"\d+", scheme)]


def over_seeds(found: Sequence[dict[str, float]]) -> str:
    """The means by text; of several seeds with the lowest and the highest of the first text."""
    if not found:
        return ""
    text = " / ".join(f"{mean(one[name] for one in found):.2f}" for name in found[0])
    first = [next(iter(one.values())) for one in found]
    return text if len(first) == 1 else f"{text} ({min(first):.2f} to {max(first):.2f}, {len(first)} seeds)"


def planned(setting: Run) -> str:
    """Who gives the bits, by bits: before / after `recover`, the means over seeds."""
    runs = setting["runs"]
    widths = sorted({run["bits"] for run in runs})
    rows = [["", *(f"{bits:g} bits" for bits in widths)]]
    for method in PLANNED:
        cells = [
            before_and_after([run for run in runs if (run["method"], run["bits"]) == (method, b)]) for b in widths
        ]
        if any(cells):
            rows.append([BITS[method], *cells])
    return table(rows)


def before_and_after(runs: Sequence[Run]) -> str:
    if not runs:
        return ""
    names = [name for name in ("before", "after") if all(name in run for run in runs)]
    text = " / ".join(f"{mean(run[name] for run in runs):.2f}" for name in names)
    kept = sum(bool(run.get("uniform")) for run in runs)
    seeds = f" ({len(runs)} seeds)" if len(runs) > 1 else ""
    return text + seeds + (f" (uniform kept {kept}x)" if kept else "")


if __name__ == "__main__":
    main()
