"""An SGRQ adapter read from its folder, without a model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import torch
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME

from peft_sgrq.adapter.file import check_complete, read_adapter_file
from peft_sgrq.choices import without_wrapper_names
from peft_sgrq.config import SGRQConfig
from peft_sgrq.files.sources import check_adapter_folder
from peft_sgrq.layer.masks import unpack_mask

_PREFIX = "base_model.model."
_DELTA = re.compile(r"(.+)\.sgrq_delta\.(weight|selection)")
_ZERO_POINTS = re.compile(r"(.+)\.sgrq_zero_points\.(weight|selection)")
_ROWS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta")
_COPY = re.compile(r"(.+?)(?:\.token_adapter)?\.base_layer\.(.+)")


class StoredDelta(NamedTuple):
    """The deltas of one layer, float32, the groups they belong to, int64, ascending, and moves of its zero points."""

    values: torch.Tensor
    units: torch.Tensor
    zero_points: torch.Tensor | None = None


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
    from peft import PeftConfig

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
    tensors = read_adapter_file(str(path))
    check_complete(str(path / SAFETENSORS_WEIGHTS_NAME), config.base_fingerprint or (), tensors)
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
            raise ValueError(
                f"{path / SAFETENSORS_WEIGHTS_NAME} holds {key!r}, expected tensors of an SGRQ adapter; save the "
                "adapter again."
            )
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
