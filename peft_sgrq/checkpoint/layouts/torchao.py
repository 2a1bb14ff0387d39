"""torchao: a weight `w` flattened to `_w_qdata`, `_w_scale` and so on, its class in the metadata of the file."""

from __future__ import annotations

import json
from typing import Literal

from peft_sgrq.backends.scales import Geometry
from peft_sgrq.checkpoint.folder import CheckpointFolder
from peft_sgrq.checkpoint.layouts.base import PlainScales, StoredLayer

# Class of the tensor -> what its format is called.
_KINDS = {"Int8Tensor": "int8", "IntxUnpackedToInt8Tensor": "intx", "Float8Tensor": "fp8"}


class TorchaoLayer(PlainScales):
    """Weight-only int8, intx and float8: codes unpacked `[N, K]`, scales `[N, groups]`."""

    scale_name = "_weight_scale"
    code_name = "_weight_qdata"

    @classmethod
    def find(cls, folder: CheckpointFolder, prefix: str, group_size: int) -> StoredLayer | None:
        codes = f"{prefix}._weight_qdata"
        if codes not in folder:
            return None
        described = json.loads(folder.metadata(codes).get(f"{prefix}.weight", "{}"))
        kind = described.get("_type", "a tensor torchao does not describe")
        scale = f"{prefix}._weight_scale"
        if kind not in _KINDS or scale not in folder:
            raise ValueError(
                f"it is stored as torchao's {kind}, expected one of {', '.join(_KINDS)}, whose scales are a plain "
                "matrix in the file; merge in memory with `merge_and_unload` instead"
            )
        layer = cls(folder, prefix)
        rows, columns = folder.entry(codes).shape
        groups = folder.entry(scale).shape[1]
        bits = str(described.get("_data", {}).get("target_dtype", {}).get("_data", "")).removeprefix("int")
        name = f"int{bits}" if kind == "IntxUnpackedToInt8Tensor" else _KINDS[kind]
        granularity: Literal["group", "row"] = "row" if groups == 1 else "group"
        size = columns // groups
        name = f"torchao-{name}-{'row' if groups == 1 else size}"
        layer._set_geometry(Geometry(name, granularity, rows, columns, size, 1))
        return layer
