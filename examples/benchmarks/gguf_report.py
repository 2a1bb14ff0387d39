"""Tables of what `gguf_table.py`, `gguf_steps.py` and `gguf_memory.py` found.

    python examples/benchmarks/gguf_report.py docs/results/gguf-*.json
    python examples/benchmarks/gguf_report.py docs/results/gguf-*.json --update docs/gguf.md

On a page the table of a file stands between `<!-- NAME.json -->` and `<!-- end of NAME.json -->`.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from markdown_tables import spell, table
from page_tables import print_or_update

NAMES = {"lora": "LoRA r=16", "scales": "SGRQ, scales", "zero points": "SGRQ, zero points", "both": "SGRQ, both"}
Row = dict[str, Any]


def main() -> None:
    print_or_update(__doc__, describe)


def describe(found: dict[str, Any]) -> str:
    """Markdown for what a file holds."""
    first = found["rows"][0]
    if "milliseconds" in first:
        return steps(found)
    return memory(found) if "most MB" in first else methods(found)


def about(found: dict[str, Any]) -> str:
    """Versions and machine."""
    return ", ".join(f"{name} {number}" for name, number in found["versions"].items()) + f". {found['machine']}."


def methods(found: dict[str, Any]) -> str:
    """What llama.cpp makes of each way to tune a file, at the best of the rates of each method."""
    setting, rows = found["settings"], found["rows"]
    base = Path(setting["file"]).name if setting["file"] else f"{Path(setting['original']).name} in {setting['kind']}"
    words = "bfloat16 autocast" if setting.get("bf16") else "float32"
    text = (
        f"**{base}**: {setting['steps']} steps of {setting['batch']} x {setting['length']} tokens of "
        f"{setting['train']}, {words}; task is {setting['test']}, other {setting['other']}, "
        f"{setting['test_tokens']} tokens each. {about(found)}"
    )
    head = ["", "way", "rate", "task, llama.cpp", "torch", "other, llama.cpp", "torch", "MB", "extra MB", "tokens/s"]
    cells = [[*head, "code bytes changed", "trained", "CPU s", "seeds"]]
    for method in ("base", *NAMES):
        own = [row for row in rows if row["method"] == method]
        for way in dict.fromkeys(row.get("way") for row in own):
            chosen = at_best_rate([row for row in own if row.get("way") == way], own)
            cells.append(line(NAMES.get(method, "base"), way, chosen))
    return f"{text}\n\n{table(cells)}\n\n{sweep(rows)}"


def best_rate(rows: list[Row]) -> float:
    """The rate of the lowest perplexity on the task at the first seed, as it was trained."""
    by_rate: dict[float, dict[int, float]] = {}
    for row in rows:
        if row["torch"] is not None:
            by_rate.setdefault(row["rate"], {})[row["seed"]] = row["torch"]["task"]
    first = min(seed for found in by_rate.values() for seed in found)
    return min(by_rate, key=lambda rate: by_rate[rate].get(first, float("inf")))


def at_best_rate(rows: list[Row], method: list[Row]) -> list[Row]:
    rate = best_rate(method)
    return [row for row in rows if row["rate"] == rate]


def line(name: str, way: str | None, rows: list[Row]) -> list[str]:
    first = rows[0]

    def perplexity(where: str, text: str) -> str:
        return "" if first[where] is None else spell([row[where][text] for row in rows], 2)

    changed, extra = first["code_bytes_changed"], first["extra_megabytes"]
    return [
        name,
        way or "",
        f"{first['rate']:g}" if first["rate"] else "",
        *(perplexity(where, text) for text in ("task", "other") for where in ("llama.cpp", "torch")),
        f"{first['megabytes']:.1f}",
        "" if extra is None else f"{extra:.1f}",
        f"{mean(row['tokens_per_second'] for row in rows):.0f}",
        "all" if changed is None else f"{changed:,}",
        f"{first['trained']:,}" if "trained" in first else "",
        f"{mean(row['cpu_seconds'] for row in rows):.0f}" if "trained" in first else "",
        str(len(rows)) if first["rate"] else "",
    ]


def sweep(rows: list[Row]) -> str:
    """The perplexity on the task at each rate of the first seed, in torch."""
    parts = []
    first = min(row["seed"] for row in rows)
    for method, name in NAMES.items():
        own = [row for row in rows if row["method"] == method and row["torch"] is not None and row["seed"] == first]
        found = {row["rate"]: row["torch"] for row in sorted(own, key=lambda row: row["rate"])}
        if found:
            tried = (f"{rate:g}: {lost['task']:.2f} / {lost['other']:.2f}" for rate, lost in found.items())
            parts.append(f"{name} {', '.join(tried)}")
    return f"Rates, seed {first}, task / other in torch: {'; '.join(parts)}."


def steps(found: dict[str, Any]) -> str:
    """A step by method, over the bare layer and over LoRA on a dense layer."""
    setting = found["settings"]
    rows = [
        [
            "type",
            "dtype",
            "bare, ms",
            "scales",
            "zero points",
            "both",
            "LoRA on dense",
            "scales / LoRA",
            "zero points / LoRA",
        ]
    ]
    for row in found["rows"]:
        times = row["milliseconds"]
        ratios = [f"{times[name] / times['base']:.2f}" for name in ("scales", "zero points", "both", "lora")]
        over = [f"{times[name] / times['lora']:.2f}" for name in ("scales", "zero points")]
        rows.append([row["type"], row["dtype"], f"{times['base']:.1f}", *ratios, *over])
    width = setting["width"]
    what = f"A layer of {width} x {width}" if width else "A whole model"
    parts = "forward and backward" if width else "forward, backward and AdamW"
    return (
        f"{what}, {setting['tokens']} tokens, {parts}, the median of {setting['repeats']}; each over the bare packed "
        f"{'layer' if width else 'model'}, but for the last two columns. {about(found)}\n\n"
        f"{table(rows)}"
    )


def memory(found: dict[str, Any]) -> str:
    """What a file takes in memory, by loader."""
    rows = [["loaded by", "dtype", "MB in the end", "MB at the most"]]
    rows += [[row["loader"], row["dtype"], f"{row['held MB']:.0f}", f"{row['most MB']:.0f}"] for row in found["rows"]]
    setting = found["settings"]
    return f"{setting['file']}, {setting['file MB']} MB, model and tokenizer. {about(found)}\n\n{table(rows)}"


if __name__ == "__main__":
    main()
