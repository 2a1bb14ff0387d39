"""An SGRQ adapter read from its folder, without a model, and its weights file checked before its config is used."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from peft.config import PeftConfig
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from safetensors.torch import load_file

from peft_sgrq.choices import without_wrapper_names
from peft_sgrq.config import SGRQConfig
from peft_sgrq.files.sources import check_adapter_folder
from peft_sgrq.files.tensors import whole_safetensors
from peft_sgrq.formats.scale_matrix import ScaleMatrix
from peft_sgrq.layer.masks import unpack_mask

_PREFIX = "base_model.model."
_SAVED = "the file `save_pretrained` wrote; copy or download it again"
_DELTA = re.compile(r"(.+)\.sgrq_delta\.(weight|selection)")
_ZERO_POINTS = re.compile(r"(.+)\.sgrq_zero_points\.(weight|selection)")
_ROWS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta")
_COPY = re.compile(r"(.+?)(?:\.token_adapter)?\.base_layer\.(.+)")


class StoredDelta(NamedTuple):
    """The deltas of one layer, float32, the groups they belong to, int64, ascending, and moves of its zero points."""

    values: torch.Tensor
    units: torch.Tensor
    zero_points: torch.Tensor | None = None

    def fits(self, layer: ScaleMatrix) -> bool:
        """Whether a layer has these units, and as many scales of each."""
        last = int(self.units[-1]) if len(self.units) else -1  # none where zero points alone are trained
        return last < layer.selectable and tuple(self.values.shape) == layer.delta_shape(len(self.units))


class StoredAdapter(NamedTuple):
    """What an adapter folder holds.

    Attributes:
        config (`SGRQConfig`): Its config.
        deltas (`dict[str, StoredDelta]`): By layer name.
        whole (`dict[str, torch.Tensor]`): Tensors of `modules_to_save`, by the name of the tensor they replace.
        rows (`dict[str, tuple[list[int], torch.Tensor]]`): Trained embedding rows, by the name of the embedding's
            weight: their indices, and the rows.
        copies (`dict[str, torch.Tensor]`): Tensors of the base that PEFT saved with it, by name: those of an adapted
            or partly trained embedding or output head, which may have been resized before training.
    """

    config: SGRQConfig
    deltas: dict[str, StoredDelta]
    whole: dict[str, torch.Tensor]
    rows: dict[str, tuple[list[int], torch.Tensor]]
    copies: dict[str, torch.Tensor]


def read_adapter(path: Path) -> StoredAdapter:
    """Reads an adapter that `save_pretrained` wrote.

    Raises:
        ValueError: If the folder holds no SGRQ adapter in safetensors, or the file is truncated, holds NaN, or holds
            tensors no SGRQ adapter has.
    """
    check_adapter_folder(path)
    config = PeftConfig.from_pretrained(str(path))
    if not isinstance(config, SGRQConfig):
        raise ValueError(
            f"{path} holds an adapter of type {config.peft_type}, expected SGRQ; others have no scales to merge, load "
            "them with PEFT and use `merge_and_unload`."
        )
    parts: dict[str, dict[str, torch.Tensor]] = {}
    whole: dict[str, torch.Tensor] = {}
    rows: dict[str, tuple[list[int], torch.Tensor]] = {}
    copies: dict[str, torch.Tensor] = {}
    file = str(path / SAFETENSORS_WEIGHTS_NAME)
    with whole_safetensors(file, _SAVED):
        tensors = load_file(file)
    _check_complete(file, config.base_fingerprint or (), tensors)
    for key, tensor in tensors.items():
        name = without_wrapper_names(key).removeprefix(_PREFIX)
        if match := _DELTA.fullmatch(name):
            parts.setdefault(match[1], {})[match[2]] = tensor
        elif match := _ZERO_POINTS.fullmatch(name):
            if match[2] == "weight":  # all of them are moved, so the mask says nothing
                parts.setdefault(match[1], {})["zero_points"] = tensor
        elif match := _ROWS.fullmatch(name):
            rows[f"{match[1]}.weight"] = (_token_indices(config, match[1]), tensor)
        elif match := _COPY.fullmatch(name):
            copies[f"{match[1]}.{match[2]}"] = tensor
        elif ".lora_" in name or "sgrq_" in name:
            raise ValueError(f"{file} holds {key!r}, expected tensors of an SGRQ adapter; save the adapter again.")
        else:
            whole[name] = tensor
    return StoredAdapter(config, {name: _delta(name, part) for name, part in parts.items()}, whole, rows, copies)


def _delta(name: str, part: dict[str, torch.Tensor]) -> StoredDelta:
    if set(part) - {"zero_points"} != {"weight", "selection"}:
        raise ValueError(
            f"The adapter has {sorted(part)} for layer {name!r}, expected its deltas and their selection; the file is "
            "incomplete, save the adapter again."
        )
    dtype = part["weight"].dtype
    if not (dtype.is_floating_point and dtype.itemsize > 1):
        raise ValueError(
            f"The adapter has deltas in {dtype} for layer {name!r}, expected float32, bfloat16 or float16; save the "
            "adapter again."
        )
    values = part["weight"].float()
    moves = part["zero_points"].float() if "zero_points" in part else None
    if not torch.isfinite(values).all() or not (moves is None or torch.isfinite(moves).all()):
        raise ValueError(
            f"The adapter holds NaN or infinite deltas for layer {name!r}, expected finite numbers: the training that "
            "wrote it diverged; use an earlier checkpoint. Nothing was written."
        )
    return StoredDelta(values, unpack_mask(part["selection"]), moves)


def _token_indices(config: SGRQConfig, name: str) -> list[int]:
    indices = config.trainable_token_indices
    if isinstance(indices, dict):
        return next((list(value) for key, value in indices.items() if f".{name}".endswith(f".{key}")), [])
    return list(indices or ())


def check_adapter_file(directory: str, layers: Iterable[str]) -> None:
    """Checks that the weights file of a local adapter is a whole safetensors file, with deltas for all its layers.

    Only the header is read: it holds the size the file must have. A directory without such a file passes (it may be
    a Hub id, or hold a config alone).

    Args:
        directory (`str`): The folder of the adapter.
        layers (`Iterable[str]`): Names of the layers its config says it was trained on.

    Raises:
        ValueError: If the file is truncated or no safetensors file, or lacks the deltas of a layer.
    """
    path = os.path.join(directory, SAFETENSORS_WEIGHTS_NAME)
    if os.path.isfile(path):
        with whole_safetensors(path, _SAVED), safe_open(path, framework="pt") as file:
            _check_complete(path, layers, file.keys())


def _check_complete(path: str, layers: Iterable[str], keys: Iterable[str]) -> None:
    """Refuses the file of an adapter that lacks the deltas of one of its layers.

    Raises:
        ValueError: If it does; the sentence names the first.
    """
    named = {without_wrapper_names(key).removeprefix("base_model.model.") for key in keys}
    wanted = {without_wrapper_names(layer) for layer in layers}
    missing = sorted(layer for layer in wanted if f"{layer}.sgrq_delta.weight" not in named)
    if missing:
        raise ValueError(
            f"{path} is incomplete: found no deltas for {len(missing)} of the {len(wanted)} layers that the adapter's "
            f"config names (the first: {missing[0]!r}), expected those of all; copy or download it again."
        )
