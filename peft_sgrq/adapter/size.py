"""The size of an adapter file, before there is one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

_DTYPES = {"float32": ("F32", 4), "bfloat16": ("BF16", 2)}


class AdaptedShape(NamedTuple):
    """What the adapter holds for one layer.

    Attributes:
        deltas (`tuple[int, int]`): Shape of its deltas, as `ScaledWeight.delta_shape` gives it.
        selectable (`int`): How many groups (rows in a row format) the layer has to select from.
    """

    deltas: tuple[int, int]
    selectable: int


def adapter_bytes(shapes: Mapping[str, AdaptedShape], adapter_dtype: str = "float32") -> int:
    """The exact size of `adapter_model.safetensors` in bytes.

    Args:
        shapes (`Mapping[str, AdaptedShape]`): By name of the layer in the base model.
        adapter_dtype (`str`): `"float32"` or `"bfloat16"`, as in the config.
    """
    label, item = _DTYPES[adapter_dtype]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # safetensors writes wide dtypes first, then by name.
    for name in sorted(shapes):
        rows, columns = shapes[name].deltas
        header[f"base_model.model.{name}.sgrq_delta.weight"] = {
            "dtype": label,
            "shape": [rows, columns],
            "data_offsets": [offset, offset := offset + rows * columns * item],
        }
    for name in sorted(shapes):
        size = -(-shapes[name].selectable // 8)
        header[f"base_model.model.{name}.sgrq_delta.selection"] = {
            "dtype": "U8",
            "shape": [size],
            "data_offsets": [offset, offset := offset + size],
        }
    text = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + -(-text // 8) * 8 + offset
