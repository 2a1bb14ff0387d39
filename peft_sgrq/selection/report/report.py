"""What a selection takes and holds, layer by layer: with a saliency for ratios to come, or in an adapter."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from peft_sgrq.adapter.size import AdaptedShape, adapter_bytes
from peft_sgrq.choices import DEFAULT_BUDGET, Budget, Ratio
from peft_sgrq.files.hub import check_source
from peft_sgrq.layer.masks import unpack_mask
from peft_sgrq.selection.layer_saliency import LayerSaliency
from peft_sgrq.selection.ratio import knee
from peft_sgrq.selection.saliency import Saliency

RATIOS: tuple[Ratio, ...] = (0.05, 0.1, 0.2, 0.4, 1.0, "knee", "global")
_INDEX = re.compile(r"(.*?\.)??(\d+)\.(.+)")
_WEIGHT = re.compile(r"base_model\.model\.(.+)\.sgrq_delta\.weight")


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Attributes:
        name (`str`): Name of the module.
        selected (`int`): How many of its groups (rows in a row format) are selected.
        selectable (`int` or `None`): Of how many; `None` where only the adapter is known.
        scales (`int`): How many scales that is.
        held (`float` or `None`): The share of the layer's saliency that the selected groups hold.
        knee (`float` or `None`): Its share of columns above the winsorised mean saliency.
        change (`float` or `None`): Root mean square of the deltas of an adapter.
    """

    name: str
    selected: int
    selectable: int | None
    scales: int
    held: float | None = None
    knee: float | None = None
    change: float | None = None

    @property
    def ratio(self) -> float | None:
        """The share of its groups that are selected."""
        return None if self.selectable is None else self.selected / self.selectable

    @property
    def place(self) -> tuple[int | None, str]:
        """The number of its block, and what it is there; further numbers stand as `*`, for all of a kind."""
        match = _INDEX.fullmatch(self.name)
        if match is None:
            return None, self.name
        return int(match[2]), re.sub(r"\b\d+\b", "*", match[3])


def shorten(kinds: Sequence[str]) -> list[str]:
    """Kinds of layers by the last parts of their names that tell them apart."""
    parts = [kind.split(".") for kind in kinds]
    for length in range(1, max(map(len, parts), default=0)):
        short = [".".join(part[-length:]) for part in parts]
        if len(set(short)) == len(kinds):
            return short
    return list(kinds)


@dataclass(frozen=True)
class SizeReport:
    """What an adapter with some ratio takes.

    Attributes:
        ratio (`float` or `str`): The ratio.
        scales (`int`): How many scales it trains.
        share (`float`): Which share of all scales that is.
        held (`float`): The share of the saliency that the selected groups hold, mean over layers.
        bytes_float32, bytes_bfloat16 (`int`): Size of the adapter's weights file by `adapter_dtype`.
    """

    ratio: Ratio
    scales: int
    share: float
    held: float
    bytes_float32: int
    bytes_bfloat16: int


@dataclass(frozen=True)
class Report:
    """A saliency with one ratio, or an adapter.

    Attributes:
        kind (`"saliency"` or `"adapter"`): Which of them.
        facts (`dict[str, Any]`): What is known about the whole of it, by what it is called.
        layers (`list[LayerReport]`): Layer by layer.
        sizes (`list[SizeReport]`): What other ratios would take; empty without a saliency.
    """

    kind: str
    facts: dict[str, Any]
    layers: list[LayerReport]
    sizes: list[SizeReport] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Numbers and strings only, for JSON."""
        layers = [{**asdict(layer), "ratio": layer.ratio} for layer in self.layers]
        return {"kind": self.kind, **self.facts, "layers": layers, "sizes": [asdict(size) for size in self.sizes]}


def report_saliency(
    saliency: Saliency, ratio: Ratio = "knee", budget: Budget = DEFAULT_BUDGET, ratios: Sequence[Ratio] = RATIOS
) -> Report:
    """What selections by a saliency take and hold.

    Args:
        saliency (`Saliency`): The saliency.
        ratio (`float` or `str`): The ratio to show layer by layer, as `Saliency.select` takes it.
        budget (`float`, `int` or `str`): Of the ratio `"global"`.
        ratios (`Sequence`): The ratios to give sizes for.

    Raises:
        ValueError, TypeError: If a ratio or the budget cannot be used.
    """
    counts = saliency.counts(ratio, budget=budget)
    layers = [
        LayerReport(
            name=name,
            selected=counts[name],
            selectable=layer.selectable,
            scales=counts[name] * layer.scales_per_group,
            held=share_held(layer, counts[name]),
            knee=knee(layer.scores),
        )
        for name, layer in saliency.layers.items()
    ]
    facts = {
        "criterion": saliency.criterion,
        "tokens": saliency.tokens,
        "seconds": saliency.seconds,
        "ratio": ratio,
        "budget": budget,
    }
    return Report("saliency", facts, layers, [_size(saliency, other, budget) for other in ratios])


def _size(saliency: Saliency, ratio: Ratio, budget: Budget) -> SizeReport:
    counts = saliency.counts(ratio, budget=budget)
    scales = sum(layer.scales_per_group * counts[name] for name, layer in saliency.layers.items())
    total = sum(layer.scales_per_group * layer.selectable for layer in saliency.layers.values())
    shapes = {name: _shape(layer, counts[name]) for name, layer in saliency.layers.items()}
    held = [share_held(layer, counts[name]) for name, layer in saliency.layers.items()]
    return SizeReport(
        ratio=ratio,
        scales=scales,
        share=scales / total,
        held=sum(held) / len(held),
        bytes_float32=adapter_bytes(shapes, "float32"),
        bytes_bfloat16=adapter_bytes(shapes, "bfloat16"),
    )


def _shape(layer: LayerSaliency, count: int) -> AdaptedShape:
    return AdaptedShape(layer.unit.delta_shape(count, layer.scales_shape), layer.selectable)


def share_held(layer: LayerSaliency, count: int, groups: torch.Tensor | None = None) -> float:
    """The share of a layer's saliency in some of its groups: the `count` most salient ones, or those given.

    A layer without any saliency counts as held whole.
    """
    scores = layer.group_scores().double()
    total = float(scores.sum())
    held = scores.sort(descending=True).values[:count] if groups is None else scores[groups]
    return float(held.sum()) / total if total else 1.0


def cumulative_share(scores: torch.Tensor, points: int = 101) -> tuple[torch.Tensor, torch.Tensor]:
    """The share of saliency that the most salient columns hold, as a curve.

    Args:
        scores (`torch.Tensor`): Saliency of each column, float `[n]`.
        points (`int`): At how many shares of columns to give it.

    Returns:
        Two float64 tensors `[points]`: shares of columns from 0 to 1, and the shares of saliency they hold.
    """
    ordered = scores.double().sort(descending=True).values
    curve = torch.cat([torch.zeros(1, dtype=torch.float64), ordered.cumsum(0)])
    x = torch.linspace(0, 1, points, dtype=torch.float64)
    if not curve[-1]:
        return x, x
    position = x * (len(curve) - 1)
    low = position.floor().long().clamp(max=len(curve) - 2)
    y = curve[low] + (position - low) * (curve[low + 1] - curve[low])
    return x, y / curve[-1]


def report_adapter(adapter: str | os.PathLike[str], saliency: Saliency | None = None) -> Report:
    """What an adapter selects, and how far it has moved the scales.

    Args:
        adapter (`str`): Directory of a saved adapter, or its name on the Hub.
        saliency (`Saliency` or `None`): That of its base, for the share of saliency held. It also tells how many
            groups the layers have, which otherwise the config of the base model does, if it can be found.

    Raises:
        ValueError: If it is no SGRQ adapter, or the saliency is that of another base.
    """
    from peft import PeftConfig, load_peft_weights

    from peft_sgrq.config import SGRQConfig

    check_source(adapter, "adapter")
    config = PeftConfig.from_pretrained(os.fspath(adapter))
    if not isinstance(config, SGRQConfig):
        raise ValueError(
            f"{os.fspath(adapter)} is an adapter of type {config.peft_type}, expected one of SGRQ; inspect one that "
            "peft_sgrq made."
        )
    tensors = load_peft_weights(os.fspath(adapter), device="cpu")
    deltas = {match[1]: key for key in tensors if (match := _WEIGHT.fullmatch(key))}
    if not deltas:
        raise ValueError(f"{os.fspath(adapter)} holds no deltas, expected some for each adapted layer; save it again.")
    fingerprints = config.base_fingerprint or {}
    if saliency is not None:
        _check_same_base(fingerprints, saliency, list(deltas))
    sizes = None if saliency is not None else _groups_of_base(config, fingerprints)
    layers = []
    for name, key in deltas.items():
        delta = tensors[key].double()
        groups = unpack_mask(tensors[key.removesuffix("weight") + "selection"])
        known = None if saliency is None else saliency.layers[name]
        layers.append(
            LayerReport(
                name=name,
                selected=len(groups),
                selectable=(sizes or {}).get(name) if known is None else known.selectable,
                scales=delta.numel(),
                held=None if known is None else share_held(known, 0, groups),
                knee=None if known is None else knee(known.scores),
                change=float(delta.square().mean().sqrt()),
            )
        )
    facts = {
        "base": config.base_model_name_or_path,
        "criterion": config.criterion,
        "ratio": config.ratio,
        "adapter_dtype": config.adapter_dtype,
        "format": sorted({text.partition(":")[0] for text in fingerprints.values()}),
    }
    return Report("adapter", facts, layers)


def _check_same_base(fingerprints: Mapping[str, str], saliency: Saliency, names: list[str]) -> None:
    for name in names:
        layer = saliency.layers.get(name)
        found = None if layer is None else layer.fingerprint
        if found is None or fingerprints.get(name, found) != found:
            raise ValueError(
                f"The saliency is that of another base: layer {name!r} is {found or 'missing'} in it, expected "
                f"{fingerprints.get(name, 'to be there')} (format:weights:scales); give the one the adapter was made "
                "with."
            )


def _groups_of_base(config: Any, fingerprints: Mapping[str, str]) -> dict[str, int] | None:
    """How many groups each layer has, from the config of the base model; `None` if that cannot be found."""
    import transformers

    gguf_file = (config.base_quantization or {}).get("gguf_file")
    more = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        check_source(config.base_model_name_or_path, "base model", config.revision)
        base = transformers.AutoConfig.from_pretrained(
            config.base_model_name_or_path, revision=config.revision, **more
        )
        with torch.device("meta"):
            if gguf_file is None:
                model = getattr(transformers, base.architectures[0])(base)
            else:
                model = transformers.AutoModelForCausalLM.from_config(base)
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    groups = {}
    for name, module in model.named_modules():
        weight, form = getattr(module, "weight", None), fingerprints.get(name, "").partition(":")[0]
        size = re.search(r"-(\d+)$", form)
        if weight is None or weight.dim() != 2 or not form:
            continue
        rows, columns = reversed(weight.shape) if type(module).__name__ == "Conv1D" else weight.shape
        if size:
            groups[name] = -(-columns // int(size[1]))
        elif form.endswith("-row"):
            groups[name] = rows
    return groups
