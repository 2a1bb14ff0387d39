"""The file a saliency is kept in: one safetensors file, its description in the metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from peft_sgrq.files.tensors import read_tensors, write_tensors
from peft_sgrq.selection.layer_saliency import LayerSaliency

FORMAT_VERSION = 1
_KIND = "saliency"


def write_saliency_file(path: str, layers: Mapping[str, LayerSaliency], described: Mapping[str, Any]) -> None:
    """Writes the layers and further JSON values, the whole file or none."""
    tensors, geometry = {}, {}
    for name, layer in layers.items():
        tensors[f"{name}.scores"] = layer.scores
        if layer.column_groups is not None:
            tensors[f"{name}.groups"] = layer.column_groups
        geometry[name] = {
            "shape": layer.shape,
            "granularity": layer.unit.value,
            "group_size": layer.group_size,
            "scale_rows": layer.scale_rows,
            "fingerprint": layer.fingerprint,
        }
    write_tensors(path, _KIND, tensors, {"version": FORMAT_VERSION, **described, "layers": geometry})


def read_saliency_file(path: str) -> tuple[dict[str, LayerSaliency], dict[str, Any]]:
    """Reads what [`write_saliency_file`] wrote: the layers, and the further values.

    Raises:
        ValueError: If the file is truncated, no saliency file, of a newer version, or holds other than numbers >= 0.
        OSError: If there is none.
    """
    tensors, described = read_tensors(path, _KIND, "saliency", "copy it again, or calibrate anew")
    version = described.pop("version")
    if not 1 <= version <= FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}, this peft-sgrq reads versions 1 to {FORMAT_VERSION}; install a "
            "newer peft-sgrq."
        )
    layers = {}
    for name, geometry in described.pop("layers").items():
        scores = tensors[f"{name}.scores"]
        if not (torch.isfinite(scores).all() and (scores >= 0).all()):
            raise ValueError(
                f"{path} has NaN, infinite or negative scores for layer {name!r}, expected numbers >= 0; calibrate "
                "again."
            )
        geometry["shape"] = tuple(geometry["shape"])
        geometry["unit"] = geometry.pop("granularity")
        layers[name] = LayerSaliency(scores, column_groups=tensors.get(f"{name}.groups"), **geometry)
    return layers, described
