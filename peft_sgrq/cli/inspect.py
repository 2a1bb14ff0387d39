"""Show what an adapter or a saliency file selects (ratios, saliency held, sizes), or what a .gguf file holds.

A saliency file also says what adapters of several ratios would take. The layers are shown as a grid, a row for each
block and a column for each kind of layer; `--json` has them one by one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from peft_sgrq.choices import DEFAULT_BUDGET, NAMED_RATIOS

if TYPE_CHECKING:
    from peft_sgrq.formats.gguf.report import FileReport
    from peft_sgrq.selection.report.report import LayerReport, Report, SizeReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", metavar="ADAPTER|SALIENCY|GGUF", help="a saved adapter, a saliency file, or a .gguf file"
    )
    parser.add_argument("--ratio", type=_ratio, help="of a saliency: the ratio to show by layer (default: knee)")
    parser.add_argument(
        "--budget", type=_budget, default=DEFAULT_BUDGET, help='of ratio "global": a share, a number, or "20MB"'
    )
    parser.add_argument("--saliency", metavar="FILE", help="of an adapter: that of its base, for the share held")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", metavar="FILE.png", help="draw it (needs the extra `plot`)")


def run(args: argparse.Namespace) -> int:
    import os

    from peft_sgrq.files.hub import check_source
    from peft_sgrq.files.output import is_standard_output

    check_source(args.path, "adapter or saliency file")
    if args.path.endswith(".gguf"):
        from peft_sgrq.formats.gguf.report import report_file

        found = report_file(args.path)
        print(json.dumps(found.as_dict(), indent=1) if args.json else describe_file(found))
        return 0
    if args.plot:
        from peft_sgrq.selection.report.plot import check_picture

        try:
            check_picture(args.plot)
        except ImportError as error:
            raise ValueError(str(error)) from error
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
    saliency: Saliency | None
    if saliency_file:
        saliency = Saliency.load(args.path)
        report = report_saliency(saliency, args.ratio or "knee", args.budget)
    else:
        saliency = Saliency.load(args.saliency) if args.saliency else None
        report = report_adapter(args.path, saliency)
    if args.plot:
        from peft_sgrq.selection.report.plot import plot_report

        plot_report(report, args.plot, saliency)
    text = json.dumps(report.as_dict(), indent=1) if args.json else describe(report)
    print(text, file=sys.stderr if args.plot and is_standard_output(args.plot) else None)
    return 0


def _ratio(text: str) -> float | str:
    try:
        return text if text in NAMED_RATIOS else float(text)
    except ValueError:
        known = ", ".join(NAMED_RATIOS)
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number in (0, 1] or one of {known}") from None


def _budget(text: str) -> float | int | str:
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return text


def describe(report: Report) -> str:
    """The report as text with tables."""
    parts = ["\n".join(f"{key}: {_spell(value)}" for key, value in report.facts.items() if value not in (None, []))]
    scales = sum(layer.scales for layer in report.layers)
    parts.append(f"{scales:,} scales in {len(report.layers)} layers")
    parts.append(_grid("Share of the groups selected, %", report, lambda layer: layer.ratio))
    parts.append(_grid("Share of the layer's saliency they hold, %", report, lambda layer: layer.held))
    parts.append(_grid("Root mean square of the deltas, %", report, lambda layer: layer.change, digits=2))
    if report.sizes:
        parts.append("Adapters to come")
        parts[-1] += "\n" + _table(
            ["ratio", "scales", "of all", "saliency held", "float32", "bfloat16"], [_size_row(s) for s in report.sizes]
        )
    return "\n\n".join(part for part in parts if part)


def describe_file(report: FileReport) -> str:
    """A GGUF file as a table of the types of its tensors."""
    rows = [
        [
            entry.name,
            str(entry.tensors),
            f"{entry.weights:,}",
            f"{entry.bytes / 1e6:.2f} MB",
            str(entry.group_size or ""),
            f"{entry.scales:,}" if entry.group_size else "",
        ]
        for entry in report.types
    ]
    head = f"{report.path}: {report.model or 'a model'}, architecture {report.architecture}"
    tied = ", output head tied to the embedding" if report.tied else ""
    total = sum(entry.scales for entry in report.types)
    table = _table(["type", "tensors", "weights", "size", "columns a scale", "scales to train"], rows)
    return f"{head}{tied}\n{total:,} scales to train\n\n{table}"


def _spell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {number:.1f}" for key, number in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _size_row(size: SizeReport) -> list[str]:
    return [
        str(size.ratio),
        f"{size.scales:,}",
        f"{100 * size.share:.1f} %",
        f"{100 * size.held:.1f} %",
        f"{size.bytes_float32 / 1e6:.2f} MB",
        f"{size.bytes_bfloat16 / 1e6:.2f} MB",
    ]


def _grid(title: str, report: Report, value: Callable[[LayerReport], float | None], digits: int = 0) -> str:
    """A row for each block and a column for each kind of layer; layers of a kind in one block are averaged."""
    from peft_sgrq.selection.report.report import shorten

    cells: dict[tuple[int | None, str], list[float]] = {}
    for layer in report.layers:
        found = value(layer)
        if found is not None:
            cells.setdefault(layer.place, []).append(100 * found)
    if not cells:
        return ""
    kinds = list(dict.fromkeys(kind for block, kind in cells if block is not None))
    blocks = list(dict.fromkeys(block for block, _ in cells if block is not None))

    def spell(values: list[float] | None) -> str:
        return "" if values is None else f"{sum(values) / len(values):.{digits}f}"

    rows = [[str(block), *(spell(cells.get((block, kind))) for kind in kinds)] for block in blocks]
    if len(blocks) > 1:
        columns = [[v for block in blocks for v in cells.get((block, kind), [])] for kind in kinds]
        rows.append(["mean", *map(spell, columns)])
    text = f"{title}\n" + (_table(["block", *shorten(kinds)], rows) if blocks else "")
    for (block, kind), values in cells.items():
        text += f"\n{kind}: {spell(values)}" if block is None else ""
    return text


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
    return "\n".join(lines)
