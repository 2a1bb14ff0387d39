"""Show what an adapter or a saliency file selects (ratios, saliency held, sizes), or what a .gguf file holds.

A saliency file also says what adapters of several ratios would take. The layers are shown as a grid, a row for each
block and a column for each kind of layer; `--json` lists them one by one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peft_sgrq.choices import DEFAULT_BUDGET
from peft_sgrq.cli.argument_types import budget, ratio
from peft_sgrq.files.gguf_names import is_gguf
from peft_sgrq.files.hub import check_source
from peft_sgrq.files.output import is_standard_output
from peft_sgrq.files.paths_apart import check_not_read
from peft_sgrq.files.sources import check_adapter_folder

if TYPE_CHECKING:
    from peft_sgrq.selection.report.report import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", metavar="ADAPTER|SALIENCY|GGUF", help="a saved adapter, a saliency file, or a .gguf file"
    )
    parser.add_argument(
        "--ratio",
        type=ratio,
        help="of a saliency: the ratio to show by layer, a number in (0, 1], knee or global (default: knee)",
    )
    parser.add_argument(
        "--budget", type=budget, default=DEFAULT_BUDGET, help='of ratio "global": a share, a number, or "20MB"'
    )
    parser.add_argument("--saliency", metavar="FILE", help="of an adapter: that of its base, for the share held")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", metavar="FILE.png", help="draw it (needs the extra `plot`)")


def check(args: argparse.Namespace) -> None:
    check_source(args.path, "adapter or saliency file")
    if os.path.isdir(args.path):
        check_adapter_folder(args.path)
    if is_gguf(args.path):
        given = [name for name in ("ratio", "saliency", "plot") if getattr(args, name) is not None]
        if given:
            raise ValueError(
                f"--{given[0]} is {getattr(args, given[0])!r} and {args.path} a GGUF file, which selects nothing, "
                f"expected an adapter or a saliency file; leave --{given[0]} out."
            )
    if args.plot:
        check_not_read(args.plot, args.path, args.saliency)


def run(args: argparse.Namespace) -> int:
    if is_gguf(args.path):
        from peft_sgrq.formats.gguf.report import report_file

        file = report_file(args.path)
        print(json.dumps(file, indent=1) if args.json else describe_file(file))
        return 0
    if args.plot:
        from peft_sgrq.selection.report.plot import check_picture, plot_report

        check_picture(args.plot)
    from peft_sgrq.selection.report.report import report_adapter, report_saliency
    from peft_sgrq.selection.saliency import Saliency

    saliency_file = os.path.isfile(args.path)
    if saliency_file and args.saliency:
        raise ValueError(f"{args.path} is a file and --saliency another, expected one saliency; leave --saliency out.")
    if not saliency_file and args.ratio is not None:
        raise ValueError(
            f"--ratio is {args.ratio!r} and {args.path} an adapter, whose ratios are what they are, expected a "
            "saliency file; leave --ratio out."
        )
    path = args.path if saliency_file else args.saliency
    saliency = Saliency.load(path) if path else None
    if saliency_file and saliency is not None:
        report = report_saliency(saliency, args.ratio or "knee", args.budget)
    else:
        report = report_adapter(args.path, saliency)
    if args.plot:
        plot_report(report, args.plot, saliency)
    found = {**report.facts, "layers": report.layers, "sizes": report.sizes}
    text = json.dumps(found, indent=1) if args.json else describe(report)
    print(text, file=sys.stderr if args.plot and is_standard_output(args.plot) else None)
    return 0


def describe(report: Report) -> str:
    """The report as text with tables."""
    facts = {key: value for key, value in report.facts.items() if key != "kind" and value not in (None, [])}
    parts = ["\n".join(f"{key}: {_spell(value)}" for key, value in facts.items())]
    scales = sum(layer["scales"] for layer in report.layers)
    zero_points = sum(layer.get("zero_points", 0) for layer in report.layers)
    trained = f"{scales:,} scales" + (f" and {zero_points:,} zero points" if zero_points else "")
    parts.append(f"{trained} in {len(report.layers)} layers")
    if all(layer["ratio"] is None for layer in report.layers):
        parts.append(_grid("Groups selected", report, "selected"))
    parts.append(_grid("Share of the groups selected, %", report, "ratio", 100))
    parts.append(_grid("Share of the layer's saliency they hold, %", report, "held", 100))
    parts.append(_grid("Root mean square of the deltas, %", report, "change", 100, digits=2))
    if zero_points:
        parts.append(_grid("Root mean square of the moves of zero points, steps", report, "moves", digits=3))
    if report.sizes:
        head = ["ratio", "scales", "of all", "saliency held", "float32", "bfloat16"]
        parts.append("Adapters to come\n" + _table(head, [_size_row(size) for size in report.sizes]))
        parts += _notes(report.sizes)
    return "\n\n".join(part for part in parts if part)


def _notes(sizes: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence about ratios that take far more than they say."""
    above = [size for size in sizes if not isinstance(size["ratio"], str) and size["share"] > 1.25 * size["ratio"]]
    if not above:
        return []
    taken = ", ".join(f"{size['ratio']:g} takes {100 * size['share']:.1f} %" for size in above)
    return [f"Note: of the scales of this model {taken}: each layer has at least one group, and these have few."]


def describe_file(report: dict[str, Any]) -> str:
    """A GGUF file as a table of the types of its tensors."""
    rows = [
        [
            entry["name"],
            str(entry["tensors"]),
            f"{entry['weights']:,}",
            f"{entry['bytes'] / 1e6:.2f} MB",
            str(entry["group_size"] or ""),
            f"{entry['scales']:,}" if entry["group_size"] else "",
        ]
        for entry in report["types"]
    ]
    head = f"{report['path']}: {report['model'] or 'a model'}, architecture {report['architecture']}"
    tied = ", output head tied to the embedding" if report["tied"] else ""
    total = sum(entry["scales"] for entry in report["types"])
    table = _table(["type", "tensors", "weights", "size", "columns a scale", "scales to train"], rows)
    return f"{head}{tied}\n{total:,} scales to train\n\n{table}"


def _spell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {number:.1f}" for key, number in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _size_row(size: dict[str, Any]) -> list[str]:
    shares = [f"{100 * size[key]:.1f} %" for key in ("share", "held")]
    sizes = [f"{size[key] / 1e6:.2f} MB" for key in ("bytes_float32", "bytes_bfloat16")]
    return [str(size["ratio"]), f"{size['scales']:,}", *shares, *sizes]


def _grid(title: str, report: Report, key: str, factor: int = 1, digits: int = 0) -> str:
    """A row for each block and a column for each kind of layer; layers of a kind in one block are averaged."""
    blocks, kinds, means = report.grid(key)
    if not blocks:
        return ""
    rows = [
        ["other" if block is None else str(block)]
        + ["" if mean is None else f"{factor * mean:.{digits}f}" for mean in row]
        for block, row in zip(blocks, means, strict=True)
    ]
    return f"{title}\n{_table(['block', *kinds], rows)}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
    return "\n".join(lines)
