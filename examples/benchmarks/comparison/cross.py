"""Models and data against bits: how far PEQA is from LoRA after merging, in the settings with all methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from comparison.tables import Setting, best_method, best_runs, differences, loras, methods_of
from markdown_tables import spell, table

WIDTHS = {"nf4": "NF4", "hqq-3": "HQQ, 3 bits", "hqq-2": "HQQ, 2 bits"}
BROAD = 9  # methods; settings with fewer are there to answer one question

Names = Callable[[Setting], list[str]]
ROWS: dict[str, tuple[str, Names]] = {
    "PEQA less the best LoRA": ("peqa", lambda setting: loras(setting["runs"])),
    "less LoRA into the original": ("peqa", lambda setting: loras(setting["runs"], "original")),
    "less LoRA r=2, about as many values": (
        "peqa",
        lambda setting: [name for name in loras(setting["runs"]) if name == "lora-2"],
    ),
    "less SGRQ at 0.4": ("peqa", lambda setting: [setting["same"].get("sgrq-0.4", "sgrq-0.4")]),
    "with beta 0.5 less the best LoRA with 0.9 or 0.5": (
        "peqa:beta-0.5",
        lambda setting: loras(setting["runs"]) + loras(setting["runs"], "beta-0.5"),
    ),
}


def cross_table(settings: Iterable[Setting]) -> str:
    """By model and data PEQA's merged loss in domain less those of others, for each width, seed by seed.

    The others are chosen by validation loss where there are several.
    """
    rows: dict[tuple[str, int], dict[str, str]] = {}
    for setting in settings:
        shared, runs = setting["shared"], setting["runs"]
        width = shared["base"] if shared["base"] == "nf4" else shared["base"].rpartition("-")[0]
        if len(methods_of(runs)) < BROAD or width not in WIDTHS:
            continue
        for index, (own, others) in enumerate(ROWS.values()):
            best = best_method(runs, others(setting))
            if best is not None and own in methods_of(runs):
                found = [best_runs(runs, name, "merged") for name in (own, best)]
                place = f"{shared['model']}, {shared['train'].split('/')[0]}"
                rows.setdefault((place, index), {})[width] = spell(differences(*found, "test"), sign="+")
    cells = [
        [place, list(ROWS)[index], *(rows[place, index].get(width, "") for width in WIDTHS)]
        for place, index in sorted(rows)
    ]
    return table([["model and data", "merged, in domain", *WIDTHS.values()], *cells])
