"""Pictures of what `compare_methods.py` found. Needs matplotlib."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

from comparison.store import Run
from comparison.tables import best_runs, methods_of, title, values
from markdown_tables import spell
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from peft_sgrq.files.output import written

# Okabe and Ito's colours: one a family; dashes and markers tell its members apart.
STYLES = {
    "lora-8": ("#0072B2", ":", "v"),
    "lora-16": ("#0072B2", "--", "^"),
    "lora-64": ("#0072B2", "-", "D"),
    "qalora-16": ("#56B4E9", "-", "P"),
    "ia3": ("#CC79A7", "-", "X"),
    "sgrq-0.05": ("#D55E00", ":", "v"),
    "sgrq-0.1": ("#D55E00", "-.", "^"),
    "sgrq-knee": ("#D55E00", "--", "s"),
    "sgrq-0.4": ("#D55E00", "-", "o"),
    "peqa": ("#000000", "-", "o"),
    "peqa:beta-0.5": ("#000000", "--", "*"),
    "lora-16:beta-0.5": ("#0072B2", "-.", "P"),
    "peqa-row": ("#009E73", "-", "h"),
    "random-0.1": ("#999999", "--", "."),
    "bottom-0.1": ("#999999", ":", "."),
}


def plot_forgetting(settings: list[dict[str, Any]], path: Path, columns: int = 3) -> None:
    """In-domain gain against what was forgotten, one curve a method over its learning rates, after merging.

    Both are losses in nats a token, compared with the untrained base. A curve is the first seed's; the large marker is
    the mean over seeds at the best rate, with its standard deviation. Methods PEFT cannot merge are shown unmerged.

    Args:
        settings (`list[dict]`): A panel each.
        path (`Path`): The picture to write.
        columns (`int`): Panels in a row.
    """
    columns = min(columns, len(settings))
    rows = -(-len(settings) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.7 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, setting in zip(panels, settings, strict=False):
        _draw(panel, setting)
    for panel in panels[len(settings) :]:
        panel.axis("off")
    handles = {}
    for panel in panels:
        found, labels = panel.get_legend_handles_labels()
        handles |= dict(zip(labels, found, strict=True))
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(7, 3 * columns),
        frameon=False,
        fontsize=8,
    )
    whole, about = io.BytesIO(), PngInfo()
    figure.savefig(whole, dpi=90)
    about.add_text("Description", digest(settings))
    # Few colours: a third of the size.
    with written(path) as file:
        Image.open(whole).convert("RGB").quantize(48).save(file, optimize=True, pnginfo=about)


def digest(settings: list[dict[str, Any]]) -> str:
    """What a picture says it was drawn from."""
    return "sha256 of the results: " + hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _draw(panel: Any, setting: dict[str, Any]) -> None:
    runs, before = setting["runs"], setting["untrained"]
    highest, furthest = 0.0, 0.0
    for method in methods_of(runs):
        if method not in STYLES:
            continue
        colour, dashes, marker = STYLES[method]
        state = "merged" if best_runs(runs, method, "merged") else "tuned"
        points = _curve(runs, method, state, before)
        if points:
            panel.plot(*zip(*points, strict=True), color=colour, linestyle=dashes, linewidth=1, alpha=0.6)
        best = best_runs(runs, method, state)
        gains = [before["test"] - value for value in values(best, state, "test") if value is not None]
        losses = [value - before["other"] for value in values(best, state, "other") if value is not None]
        if not gains:
            continue
        x, y = sum(losses) / len(losses), sum(gains) / len(gains)
        label = method if state == "merged" else f"{method}, unmerged"
        panel.errorbar(
            x, y, xerr=_spread(losses), yerr=_spread(gains), color=colour, marker=marker, markersize=6, linestyle="",
            linewidth=0.8, label=label,
        )  # fmt: skip
        highest, furthest = max(highest, y), max(furthest, x)
    panel.axvline(0, color="#cccccc", linewidth=0.8, zorder=0)
    panel.set_title(title(setting), fontsize=9)
    panel.set_xlabel("more loss out of domain", fontsize=8)
    panel.set_ylabel("less loss in domain", fontsize=8)
    panel.tick_params(labelsize=8)
    if highest > 0 and furthest > 0:  # rates that diverged are outside of the picture
        panel.set_xlim(max(panel.get_xlim()[0], -0.15 * furthest), 1.3 * furthest)
        panel.set_ylim(0, 1.1 * highest)


def _curve(runs: list[Run], method: str, state: str, before: dict[str, Any]) -> list[tuple[float, float]]:
    own = [run for run in runs if run["method"] == method and run[state] is not None]
    first = min((run["seed"] for run in own), default=None)
    swept = sorted((run for run in own if run["seed"] == first), key=lambda run: run["learning_rate"])
    losses = [(run[state]["other"], run[state]["test"]) for run in swept]
    return [(a - before["other"], before["test"] - b) for a, b in losses if a is not None and b is not None]


def _spread(numbers: list[float]) -> float:
    return float(spell(numbers).partition("± ")[2] or 0)
