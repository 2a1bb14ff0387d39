"""Results as tables and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from examples.benchmarks.layers import ratios
from examples.benchmarks.methods import BOTH, LORA, LORA_16BIT, ZERO_POINTS, sgrq_name


def table(head: list[str], rows: list[list[str]]) -> str:
    """A markdown table, the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: list[str]) -> str:
        aligned = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
        return f"| {' | '.join(aligned)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(head), line(rule), *map(line, rows)])


def megabytes(value: float) -> str:
    return f"{value / 1e6:.2f}"


def milliseconds(values: Mapping[str, float]) -> str:
    return f"{values['median'] * 1e3:.1f} ({values['low'] * 1e3:.1f}-{values['high'] * 1e3:.1f})"


def layer_table(entry: Mapping[str, Any]) -> str:
    compared = ratios(entry["result"])
    rows = []
    for name, values in entry["result"].items():
        floor = entry["floors"].get(name)
        rows.append(
            [
                name,
                milliseconds(values["forward"]),
                milliseconds(values["step"]),
                f"{compared[name]['over base']:.2f}",
                f"{compared[name]['over LoRA']:.2f}",
                "" if floor is None else f"{values['step']['median'] / floor:.2f}",
                megabytes(values["kept"]),
                megabytes(values["peak"]),
                f"{values['parameters']:,}",
            ]
        )
    head = ["", "forward ms", "step ms", "/ base", "/ LoRA", "/ floor", "kept MB", "peak MB", "parameters"]
    return table(head, rows)


def training_table(result: Mapping[str, Any]) -> str:
    lora, base = result["LoRA r=16"], result.get("base")
    rows = [
        [
            name,
            milliseconds(values["step"]),
            f"{values['step']['median'] / base['step']['median']:.2f}" if base else "",
            f"{values['step']['median'] / lora['step']['median']:.2f}",
            megabytes(values["kept"]),
            megabytes(values["kept by the adapter"]),
            f"{values['kept by the adapter'] / lora['kept by the adapter']:.2f}",
            megabytes(values["peak"]),
            f"{values['peak'] / lora['peak']:.2f}",
            megabytes(values["optimizer state"]),
        ]
        for name, values in result.items()
        if name != "base"
    ]
    return table(
        [
            "",
            "step ms",
            "/ base",
            "/ LoRA",
            "kept MB",
            "by the adapter",
            "/ LoRA",
            "peak MB",
            "/ LoRA",
            "optimizer MB",
        ],
        rows,
    )


def decoding_table(result: Mapping[str, Any]) -> str:
    base = result["base"]["seconds"]["median"]
    rows = [
        [name, f"{values['tokens per second']:.1f}", f"{values['seconds']['median'] / base:.3f}"]
        for name, values in result.items()
    ]
    return table(["", "tokens a second", "time / base"], rows)


def startup_table(result: Mapping[str, Any]) -> str:
    size = result["model"]["bytes"]
    rows = [
        [name, step, f"{v['seconds']:.2f}", f"{v['CPU seconds']:.2f}", megabytes(v["peak"]), f"{v['peak'] / size:.1%}"]
        for name, steps in result.items()
        if name != "model"
        for step, v in steps.items()
    ]
    return table(["", "", "seconds", "CPU seconds", "peak MB", "of the model"], rows)


HEAD_MARKS = ("<!-- head: made by `python -m examples.benchmarks tables` -->", "<!-- end of head -->")
MARK = "<!-- tables: made by `python -m examples.benchmarks tables` -->\n"


def head_table(known: Mapping[str, Any]) -> str:
    """The first thing to know: time of a training step over the bare base's, by layer or model and by CPU.

    Of layers in 4 bits and of whole steps; LoRA is of 16 bits, as TRL makes it, where the arithmetic has 16 bits.
    """
    rows = []
    for measured in known.values():
        results = measured["results"]
        entries = results.get("entries", [])
        if measured["what"] == "training" and "base" in results["result"]:
            entries = [{"shape": f"{results['model']}, SFTTrainer", "tokens": None, **results}]
        for entry in entries:
            found = entry["result"]
            quant = entry.get("quant", "nf4")
            if quant == "int8":
                continue
            times = {name: values["step"]["median"] for name, values in found.items()}
            lora = times.get(LORA_16BIT, times[LORA])
            steps = [times.get(name) for name in (sgrq_name(1.0), sgrq_name(0.4), ZERO_POINTS, BOTH)]
            what = entry["shape"] + (f", {entry['tokens']} tokens" if entry["tokens"] else "")
            cells = [f"{what}, {quant}", _arithmetic(measured["machine"], entry.get("dtype", "bfloat16"))]
            for other, compared in ((times["base"], [lora, *steps]), (lora, steps)):
                cells += ["" if step is None else f"{step / other:.2f}" for step in compared]
            rows.append(cells)
    names = ("SGRQ 1.0", "SGRQ 0.4", "zero points", "SGRQ 1.0 and zero points")
    heads = [f"{name} / base" for name in ("LoRA r=16", *names)] + [f"{name} / LoRA" for name in names]
    return table(["step of", "arithmetic", *heads], rows)


def _arithmetic(where: Mapping[str, Any], dtype: str) -> str:
    limits = where.get("limits")
    extensions = ["avx2"] if limits else where["CPU extensions"]
    return f"{dtype}, {extensions[0]}{' (newer instructions off)' if limits else ''}"


def sections(known: Mapping[str, Any]) -> str:
    """Everything a file of results holds, as markdown; what was measured under which command and where."""
    parts = []
    for name, measured in known.items():
        where, results = measured["machine"], measured["results"]
        kind = measured["what"]
        parts.append(f"### {name}\n")
        if kind == "layers":
            for entry in results["entries"]:
                parts.append(
                    f"{entry['shape']}, {entry['tokens']} tokens, {entry['quant']}:\n\n{layer_table(entry)}\n"
                )
            reached = results["ceilings"]
            parts.append(
                f"Ceilings: {reached['flops'] / 1e9:.0f} GFLOP/s of a bfloat16 product of 2048 x 2048, "
                f"{reached['bytes'] / 1e9:.0f} GB/s of a copy of 16 MB.\n"
            )
        elif kind == "training":
            parts.append(f"{results['model']}:\n\n{training_table(results['result'])}\n")
        elif kind == "decoding":
            parts.append(f"{results['model']}:\n\n{decoding_table(results['result'])}\n")
        else:
            size = results["result"]["model"]
            parts.append(
                f"{size['weights'] / 1e9:.2f} billion weights in {size['blocks']} blocks, "
                f"{megabytes(size['bytes'])} MB:\n\n{startup_table(results['result'])}\n\n"
                f"`import peft_sgrq` after `import peft`: {results['import']['seconds']:.3f} s.\n"
            )
        versions = ", ".join(f"{package} {number}" for package, number in where["versions"].items())
        limits = "".join(f"{name}={value} " for name, value in where.get("limits", {}).items())
        parts.append(
            f"`{limits}{where['command']}`; {where['CPU'] or where['device']}"
            f"{' (' + ', '.join(where['CPU extensions']) + ')' if where['device'] == 'x86_64' else ''}, "
            f"{where['threads']} thread; {versions}; {where['date']}.\n"
        )
    return "\n".join(parts)


def update(page: Path, known: Mapping[str, Any]) -> None:
    """Writes the tables into a page, below its mark."""
    text = page.read_text(encoding="utf-8")
    head, mark, _ = text.partition(MARK)
    before, start, rest = head.partition(HEAD_MARKS[0])
    _, end, after = rest.partition(HEAD_MARKS[1])
    if not (mark and start and end):
        raise ValueError(
            f"{page} lacks one of the lines {(*HEAD_MARKS, MARK.strip())}, expected them where the tables go; add it."
        )
    page.write_text(
        f"{before}{start}\n\n{head_table(known)}\n\n{end}{after}{mark}\n{sections(known)}", encoding="utf-8"
    )


def plot(layers: list[Mapping[str, Any]], path: Path) -> None:
    """Step time over the bare base's, by layer, one point a method, with the spread of the quartiles."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise ValueError("A plot needs matplotlib, found none; install it with `pip install matplotlib`.") from None
    names = list(layers[0]["result"])
    figure, axes = pyplot.subplots(figsize=(1.6 * len(layers) + 3, 4.5), layout="constrained")
    markers = "osD^v<>P"
    for index, name in enumerate(names[1:]):
        xs, ys, low, high = [], [], [], []
        for place, entry in enumerate(layers):
            base = entry["result"]["base"]["step"]["median"]
            step = entry["result"][name]["step"]
            xs.append(place + (index - len(names) / 2 + 1) * 0.09)
            ys.append(step["median"] / base)
            low.append((step["median"] - step["low"]) / base)
            high.append((step["high"] - step["median"]) / base)
        color = pyplot.get_cmap("cividis")(index / max(1, len(names) - 2))
        axes.errorbar(xs, ys, [low, high], fmt=markers[index % len(markers)], color=color, label=name, capsize=2)
    axes.axhline(1.0, color="0.6", linewidth=1)
    axes.set_xticks(range(len(layers)), [f"{e['shape']}\n{e['tokens']} tokens, {e['quant']}" for e in layers])
    axes.set_ylabel("training step, time over the bare base's")
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
