"""Pictures of a selection: how saliency is spread over columns, and ratios by layer. Needs the extra `plot`."""

from __future__ import annotations

import os
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from peft_sgrq.files.output import check_output, written
from peft_sgrq.selection.ratio import knee
from peft_sgrq.selection.report.report import LayerReport, Report, cumulative_share, shorten

if TYPE_CHECKING:
    from peft_sgrq.selection.saliency import Saliency

# Okabe and Ito's colours, told apart in the usual forms of colour blindness; markers tell them apart without colour.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C00")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
_ANNOTATED = 16  # with more blocks than that numbers would not fit into the cells
_POINTS = 401


def plot_report(report: Report, path: str | os.PathLike[str], saliency: Saliency | None = None) -> None:
    """Draws a report: ratios by block and kind of layer, and with a saliency its cumulative distribution and knees.

    Args:
        report (`Report`): What `report_saliency` or `report_adapter` returned.
        path (`str`): The picture to write; its ending says the format (png, svg, pdf).
        saliency (`Saliency` or `None`): The saliency of the same layers.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If matplotlib does not know the ending of `path`.
    """
    figure_class = _import_figure()
    kinds = list(dict.fromkeys(layer.place[1] for layer in report.layers))
    blocks = sorted({block for layer in report.layers if (block := layer.place[0]) is not None})
    labels = dict(zip(kinds, shorten(kinds), strict=True))
    grid_height = 1.5 + 0.34 * len(kinds)
    curve_height = 4.6 if saliency is not None else 0.0
    figure = figure_class(figsize=(max(8.0, min(16.0, 3.0 + 0.5 * len(blocks))), grid_height + curve_height))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(
        1 if saliency is None else 2, 1, squeeze=False, height_ratios=[curve_height, grid_height][saliency is None :]
    )[:, 0]
    if saliency is not None:
        _draw_curves(axes[0], report, saliency, labels)
    _draw_ratios(figure, axes[-1], report.layers, kinds, blocks, labels)
    with written(path) as file:
        figure.savefig(file, dpi=150, format=picture_format(path))


def check_picture(path: str | os.PathLike[str]) -> None:
    """Refuses what [`plot_report`] could not draw to.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If matplotlib does not know the ending of `path`, or it cannot be written.
    """
    known = _import_figure()().canvas.get_supported_filetypes()
    if picture_format(path) not in known:
        raise ValueError(
            f"The picture {os.fspath(path)!r} ends in {picture_format(path)!r}, expected one of {sorted(known)}; name "
            "another."
        )
    check_output(path, "The picture")


def picture_format(path: str | os.PathLike[str]) -> str:
    """What the ending of a path says, png if there is none."""
    return os.path.splitext(path)[1][1:].lower() or "png"


def _import_figure() -> Any:
    try:
        from matplotlib.figure import Figure  # without pyplot: no window, no global state
    except ImportError as error:
        raise ImportError(
            "Drawing needs matplotlib, which is not installed; `pip install peft-sgrq[plot]` brings it."
        ) from error
    return Figure


def _draw_curves(axes: Any, report: Report, saliency: Saliency, labels: dict[str, str]) -> None:
    by_kind: dict[str, list[torch.Tensor]] = {}
    for layer in report.layers:
        by_kind.setdefault(layer.place[1], []).append(saliency.layers[layer.name].scores)
    axes.plot([0, 100], [0, 100], color="0.6", linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        "all alike", (73, 73), (0, -4), textcoords="offset points", va="top", ha="left", color="0.4", fontsize=8
    )
    for index, (kind, layers) in enumerate(by_kind.items()):
        colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
        curves = [cumulative_share(scores, _POINTS) for scores in layers]
        x = 100 * curves[0][0].numpy()
        y = 100 * torch.stack([curve[1] for curve in curves])  # (layers, points)
        axes.fill_between(x, y.amin(0).numpy(), y.amax(0).numpy(), color=colour, alpha=0.10, linewidth=0)
        middle = y.median(0).values
        at = median(knee(scores) for scores in layers)
        held = float(middle[round(at * (_POINTS - 1))])
        text = f"{labels[kind]}: knee at {100 * at:.0f} %, holds {held:.0f} %"
        axes.plot(x, middle.numpy(), color=colour, linewidth=1.6, label=text, marker=marker, markevery=[])
        axes.plot([100 * at], [held], color=colour, marker=marker, markersize=8, markeredgecolor="white", zorder=5)
    # The marker of the knee is what the legend shows with the line.
    axes.legend(
        handles=[_legend_entry(line) for line in axes.get_lines() if not line.get_label().startswith("_")],
        loc="lower right",
        fontsize=8,
        frameon=False,
    )
    axes.set(xlim=(0, 100), ylim=(0, 101), xlabel="most salient columns, %", ylabel="share of saliency, %")
    axes.set_title(
        f"Cumulative saliency ({report.facts['criterion'] if report.kind == 'saliency' else saliency.criterion}): "
        "median of the blocks, their range, and the knee",
        fontsize=10,
        loc="left",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)


def _legend_entry(line: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D(
        [],
        [],
        color=line.get_color(),
        linewidth=1.6,
        marker=line.get_marker(),
        markersize=7,
        markeredgecolor="white",
        label=line.get_label(),
    )


def _draw_ratios(
    figure: Any,
    axes: Any,
    layers: list[LayerReport],
    kinds: list[str],
    blocks: list[int],
    labels: dict[str, str],
) -> None:
    columns: list[int | None] = [*blocks]
    if any(layer.place[0] is None for layer in layers):
        columns.append(None)  # layers outside of all blocks
    known = all(layer.ratio is not None for layer in layers)
    sums = torch.zeros(len(kinds), len(columns), dtype=torch.float64)
    counts = torch.zeros_like(sums)
    for layer in layers:
        block, kind = layer.place
        cell = kinds.index(kind), columns.index(block)
        sums[cell] += 100 * (layer.ratio or 0.0) if known else layer.scales
        counts[cell] += 1
    values = (sums / counts).numpy()  # NaN where there is no such layer: left blank
    image = axes.imshow(values, cmap="cividis", vmin=0, vmax=100 if known else None, aspect="auto")
    axes.set_yticks(range(len(kinds)), [labels[kind] for kind in kinds], fontsize=9)
    every = -(-len(columns) // 32)
    shown = range(0, len(columns), every)
    axes.set_xticks(shown, ["other" if columns[i] is None else str(columns[i]) for i in shown], fontsize=8)
    axes.set_xlabel("block")
    what = "selected groups, %" if known else "selected scales"
    axes.set_title(f"By layer: {what}", fontsize=10, loc="left")
    figure.colorbar(image, ax=axes, pad=0.01, aspect=12).ax.tick_params(labelsize=8)
    if len(columns) <= _ANNOTATED:
        middle = (image.norm.vmin + image.norm.vmax) / 2
        for (row, column), value in zip(
            torch.cartesian_prod(*map(torch.arange, values.shape)).tolist(), values.flat, strict=True
        ):
            if value == value:
                text = f"{value:.0f}"
                axes.text(
                    column,
                    row,
                    text,
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if value < middle else "black",
                )
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
