"""Pictures of a selection: how saliency is spread over columns, and ratios by layer. Needs the extra `plot`."""

from __future__ import annotations

import os
from statistics import median
from typing import Any

import torch

from peft_sgrq.files.output import check_output, written
from peft_sgrq.selection.ratio import knee
from peft_sgrq.selection.report.report import Report, place, shorten
from peft_sgrq.selection.saliency import Saliency

# Okabe and Ito's colours, told apart in the usual forms of colour blindness; markers tell them apart without colour.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C00")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
_POINTS = 401


def plot_report(report: Report, path: str | os.PathLike[str], saliency: Saliency | None = None) -> None:
    """Draws a report by block and kind of layer: ratios, and of an adapter how far it moved the scales.

    With a saliency its cumulative distribution and knees come first.

    Args:
        report (`Report`): What `report_saliency` or `report_adapter` returned.
        path (`str`): The picture to write; its ending says the format (png, svg, pdf).
        saliency (`Saliency` or `None`): The saliency of the same layers.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If matplotlib does not know the ending of `path`.
    """
    draw = [] if saliency is None else [lambda axes: _draw_curves(axes, report, saliency)]
    whole = {layer["ratio"] for layer in report.layers} | {report.facts.get("ratio")} <= {None, 1.0}
    if not whole:  # of everything there is nothing to see
        draw.append(lambda axes: _draw_ratios(figure, axes, report))
    moved = "How far the scales moved: root mean square of the deltas, %"
    if any(layer["change"] is not None for layer in report.layers):
        draw.append(lambda axes: _draw_grid(figure, axes, report, "change", 100, None, moved))
    draw = draw or [lambda axes: _draw_ratios(figure, axes, report)]
    figure = _import_figure()(figsize=(9, 4.5 * len(draw)), layout="constrained")
    for axes, picture in zip(figure.subplots(len(draw), 1, squeeze=False)[:, 0], draw, strict=True):
        picture(axes)
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
            "Drawing needs matplotlib, which is not installed; `pip install matplotlib` brings it."
        ) from error
    return Figure


def cumulative_share(scores: torch.Tensor) -> torch.Tensor:
    """The share of saliency in the most salient share `p` of columns, float64 `[401]`, for `p` from 0 to 1.

    Between columns it is that of the nearest number of them.
    """
    curve = torch.cat([torch.zeros(1), scores.sort(descending=True).values]).double().cumsum(0)
    at = (torch.linspace(0, 1, _POINTS, dtype=torch.float64) * len(scores)).round().long()
    return curve[at] / curve[-1] if curve[-1] else at.double() / len(scores)


def _draw_curves(axes: Any, report: Report, saliency: Saliency) -> None:
    by_kind: dict[str, list[torch.Tensor]] = {}
    for layer in report.layers:
        by_kind.setdefault(place(layer["name"])[1], []).append(saliency.layers[layer["name"]].scores)
    axes.plot([0, 100], [0, 100], color="0.6", linewidth=1, linestyle="--", label="all columns alike")
    x = torch.linspace(0, 100, _POINTS).tolist()
    for index, (kind, layers) in enumerate(zip(shorten(list(by_kind)), by_kind.values(), strict=True)):
        curve = 100 * torch.stack([cumulative_share(scores) for scores in layers]).median(0).values
        at = round(median(knee(scores) for scores in layers) * (_POINTS - 1))
        text = f"{kind}: knee at {x[at]:.0f} %, holds {float(curve[at]):.0f} %"
        style = {"color": _COLOURS[index % len(_COLOURS)], "marker": _MARKERS[index % len(_MARKERS)]}
        axes.plot(x, curve.tolist(), markevery=[at], label=text, **style)
    axes.legend(loc="lower right", fontsize=8, frameon=False)
    axes.set(xlim=(0, 100), ylim=(0, 101), xlabel="most salient columns, %", ylabel="share of saliency, %")
    axes.set_title(f"Cumulative saliency ({saliency.criterion}), median of the blocks, and its knee", fontsize=10)
    axes.grid(color="0.92")


def _draw_ratios(figure: Any, axes: Any, report: Report) -> None:
    known = all(layer["ratio"] is not None for layer in report.layers)
    if known:
        _draw_grid(figure, axes, report, "ratio", 100, 100, "By layer: selected groups, %")
    else:
        _draw_grid(figure, axes, report, "scales", 1, None, "By layer: selected scales")


def _draw_grid(
    figure: Any, axes: Any, report: Report, key: str, factor: float, highest: float | None, title: str
) -> None:
    blocks, kinds, means = report.grid(key)
    values = torch.tensor([[torch.nan if value is None else factor * value for value in row] for row in means]).T
    image = axes.imshow(values.numpy(), cmap="cividis", vmin=0, vmax=highest, aspect="auto")
    axes.set_yticks(range(len(kinds)), kinds, fontsize=9)
    shown = range(0, len(blocks), -(-len(blocks) // 32))
    axes.set_xticks(shown, ["other" if blocks[at] is None else str(blocks[at]) for at in shown], fontsize=8)
    axes.set_xlabel("block")
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axes, pad=0.01)
