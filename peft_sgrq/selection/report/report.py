"""What a selection takes and holds, layer by layer: by a saliency at some ratio, or in a saved adapter."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from peft_sgrq.adapter.stored import read_adapter
from peft_sgrq.choices import DEFAULT_BUDGET, Budget, Ratio
from peft_sgrq.files.sources import find_folder
from peft_sgrq.selection.layer_saliency import LayerSaliency
from peft_sgrq.selection.ratio import knee
from peft_sgrq.selection.saliency import Saliency

RATIOS: tuple[Ratio, ...] = (0.05, 0.1, 0.2, 0.4, 1.0, "knee", "global")
# Where layers stand in a block, by the ends of their names: an adapter's file and config have them by the alphabet.
_ORDER = (
    *("q_proj", "query", "k_proj", "key", "v_proj", "value", "qkv_proj", "query_key_value", "c_attn", "Wqkv"),
    *("o_proj", "out_proj", "dense"),
    *("gate_proj", "w1", "up_proj", "w3", "gate_up_proj", "fc1", "c_fc", "fc_in", "dense_h_to_4h"),
    *("down_proj", "w2", "fc2", "fc_out", "dense_4h_to_h"),
)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_NUMBERED = re.compile(r"(.*?\.)??(\d+)\.(.+)")


class Report(NamedTuple):
    """A saliency at one ratio, or an adapter, in numbers and strings.

    Attributes:
        facts (`dict[str, Any]`): What is known about the whole; `kind` is `"saliency"` or `"adapter"`.
        layers (`list[dict[str, Any]]`): By layer its `name`; how many groups (rows in a row format) are
            `selected`, out of how many (`selectable`), and which share that is (`ratio`); how many `scales` are
            trained; the share of the layer's saliency they have (`held`); its share of columns above the winsorised
            mean (`knee`); the root mean square of an adapter's deltas (`change`); of an adapter also how many
            `zero_points` are trained, and the root mean square of their `moves` in steps. `None` is unknown.
        sizes (`list[dict[str, Any]]`): By `ratio` that an adapter could have: its `scales`, their `share` of all, the
            mean share of saliency (`held`), and the size of its file by `adapter_dtype` (`bytes_float32`,
            `bytes_bfloat16`). Empty for an adapter.
    """

    facts: dict[str, Any]
    layers: list[dict[str, Any]]
    sizes: list[dict[str, Any]]

    def grid(self, key: str) -> tuple[list[int | None], list[str], list[list[float | None]]]:
        """A number of each layer as a table: block numbers (`None`: no block), kinds of layers, `[blocks][kinds]`."""
        cells: dict[tuple[int | None, str], list[float]] = {}
        for layer in self.layers:
            if layer[key] is not None:
                cells.setdefault(place(layer["name"]), []).append(layer[key])
        kinds = list(dict.fromkeys(kind for _, kind in cells))
        blocks = sorted({block for block, _ in cells}, key=lambda block: (block is None, block))
        means = [[_mean(cells.get((block, kind), [])) for kind in kinds] for block in blocks]
        return blocks, shorten(kinds), means


def place(name: str) -> tuple[int | None, str]:
    """The number of a layer's block, and its kind: the name within the block, with `*` for further numbers."""
    match = _NUMBERED.fullmatch(name)
    return (None, name) if match is None else (int(match[2]), re.sub(r"\b\d+\b", "*", match[3]))


def in_model_order(names: Iterable[str]) -> list[str]:
    """Names of layers as they follow each other in a model: by block, attention first, what is in no block last."""

    def key(name: str) -> tuple[Any, ...]:
        block, kind = place(name)
        end = kind.rpartition(".")[2]
        known = _ORDER.index(end) if end in _ORDER else len(_ORDER)
        return block is None, block or 0, _ATTENTION.search(kind) is None, known, name

    return sorted(names, key=key)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def shorten(kinds: Sequence[str]) -> list[str]:
    """Kinds of layers by the last parts of their names that tell them apart."""
    parts = [kind.split(".") for kind in kinds]
    for length in range(1, max(map(len, parts), default=0)):
        short = [".".join(part[-length:]) for part in parts]
        if len(set(short)) == len(kinds):
            return short
    return list(kinds)


def report_saliency(
    saliency: Saliency, ratio: Ratio = "knee", budget: Budget = DEFAULT_BUDGET, ratios: Sequence[Ratio] = RATIOS
) -> Report:
    """What selections by a saliency take and hold.

    Args:
        saliency (`Saliency`): The saliency.
        ratio (`float` or `str`): The ratio to show layer by layer, as `Saliency.select` takes it.
        budget (`float`, `int` or `str`): The budget of the ratio `"global"`.
        ratios (`Sequence`): The ratios to give sizes for.

    Raises:
        ValueError, TypeError: If a ratio or the budget cannot be used.
    """
    counts = saliency.counts(ratio, budget=budget)
    layers = [
        _row(name, counts[name], counts[name] * layer.scales_per_group, layer, share_held(layer, counts[name]))
        for name, layer in saliency.layers.items()
    ]
    facts = {name: getattr(saliency, name) for name in ("criterion", "tokens", "seconds")}
    sizes = [size for other in ratios if (size := _size(saliency, other, budget)) is not None]
    spent = {"budget": budget} if ratio == "global" else {}
    return Report({"kind": "saliency", **facts, "ratio": ratio, **spent}, layers, sizes)


def _row(name: str, selected: int, scales: int, layer: LayerSaliency | None, held: float | None) -> dict[str, Any]:
    row = {"name": name, "selected": selected, "scales": scales, "held": held, "change": None}
    if layer is None:
        return row | dict.fromkeys(("selectable", "ratio", "knee"))
    return row | {
        "selectable": layer.selectable,
        "ratio": selected / layer.selectable,
        "knee": knee(layer.scores),
    }


def _size(saliency: Saliency, ratio: Ratio, budget: Budget) -> dict[str, Any] | None:
    try:
        counts = saliency.counts(ratio, budget=budget)
    except ValueError:
        if budget == DEFAULT_BUDGET:  # nobody asked for it, and a model whose layers have few groups cannot meet it
            return None
        raise
    layers = saliency.layers
    scales = sum(layer.scales_per_group * counts[name] for name, layer in layers.items())
    total = sum(layer.scales for layer in layers.values())
    held = [share_held(layer, counts[name]) for name, layer in layers.items()]
    shapes = {
        name: (layer.unit.delta_shape(counts[name], layer.scales_shape), layer.selectable)
        for name, layer in layers.items()
    }
    sizes = {f"bytes_{dtype}": adapter_bytes(shapes, dtype) for dtype in ("float32", "bfloat16")}
    return {"ratio": ratio, "scales": scales, "share": scales / total, "held": _mean(held), **sizes}


def adapter_bytes(shapes: Mapping[str, tuple[tuple[int, int], int]], adapter_dtype: str = "float32") -> int:
    """The exact size of `adapter_model.safetensors` in bytes.

    Args:
        shapes (`Mapping`): By name of the layer: the shape of its deltas, and how many groups it has to select from.
        adapter_dtype (`str`): `"float32"` or `"bfloat16"`, as in the config.
    """
    dtype, item = {"float32": ("F32", 4), "bfloat16": ("BF16", 2)}[adapter_dtype]
    names = sorted(shapes)  # safetensors writes wide dtypes first, then by name
    tensors: list[tuple[str, str, list[int], int]] = [
        (f"{name}.sgrq_delta.weight", dtype, list(shapes[name][0]), item) for name in names
    ]
    tensors += [(f"{name}.sgrq_delta.selection", "U8", [-(-shapes[name][1] // 8)], 1) for name in names]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, kind, shape, size in tensors:
        start, offset = offset, offset + size * torch.Size(shape).numel()
        header[f"base_model.model.{name}"] = {"dtype": kind, "shape": shape, "data_offsets": [start, offset]}
    text = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + -(-text // 8) * 8 + offset


def share_held(layer: LayerSaliency, count: int, groups: torch.Tensor | None = None) -> float:
    """The share of a layer's saliency in its `count` most salient groups, or in those given; 1 if it has none."""
    scores = layer.group_scores().double()
    total = float(scores.sum())
    held = scores.sort(descending=True).values[:count] if groups is None else scores[groups]
    return float(held.sum()) / total if total else 1.0


def report_adapter(adapter: str | os.PathLike[str], saliency: Saliency | None = None) -> Report:
    """What an adapter selects, and how far it has moved the scales.

    Args:
        adapter (`str`): Directory of a saved adapter, or its name on the Hub.
        saliency (`Saliency` or `None`): The saliency of its base: it knows the share of saliency held, and how many
            groups there are to select from.

    Raises:
        ValueError: If it is no SGRQ adapter, or the saliency is that of another base.
    """
    stored = read_adapter(find_folder(adapter, "adapter"))
    if not stored.deltas:
        raise ValueError(f"{os.fspath(adapter)} holds no deltas, expected some for each adapted layer; save it again.")
    config, fingerprints = stored.config, stored.config.base_fingerprint or {}
    layers = []
    names = in_model_order(stored.deltas)
    if saliency is not None:  # which was made of the model
        names = [*(name for name in saliency.layers if name in stored.deltas), *names]
    for name in dict.fromkeys(names):
        delta, groups, moved = stored.deltas[name]
        known = None if saliency is None else _same_layer(name, saliency, fingerprints.get(name))
        held = None if known is None else share_held(known, 0, groups)
        row = _row(name, len(groups), delta.numel(), known, held)
        change = _root_mean_square(delta) if len(groups) else None  # zero points alone are moved
        moves = {} if moved is None else {"zero_points": moved.numel(), "moves": _root_mean_square(moved)}
        layers.append(row | {"change": change, "zero_points": 0, "moves": None} | moves)
    facts = {name: getattr(config, name) for name in ("criterion", "ratio", "adapter_dtype")}
    formats = sorted({text.partition(":")[0] for text in fingerprints.values()})
    base = config.base_model_name_or_path
    return Report({"kind": "adapter", "base": base, **facts, "format": formats}, layers, [])


def _root_mean_square(values: torch.Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def _same_layer(name: str, saliency: Saliency, fingerprint: str | None) -> LayerSaliency:
    layer = saliency.layers.get(name)
    if layer is None or fingerprint not in (None, layer.fingerprint):
        raise ValueError(
            f"The saliency is that of another base: layer {name!r} is "
            f"{'missing' if layer is None else layer.fingerprint} in it, expected {fingerprint or 'to be there'} "
            "(format:weights:scales); give the one the adapter was made with."
        )
    return layer
