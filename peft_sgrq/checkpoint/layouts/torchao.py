"""torchao: a weight `w` flattened to `_w_qdata`, `_w_scale` and so on, its class in the metadata of the file."""

from __future__ import annotations

import json
from typing import Any

from peft_sgrq.backends.scales import Geometry
from peft_sgrq.checkpoint.folder import CheckpointFolder
from peft_sgrq.checkpoint.layouts.base import PlainScales, StoredLayer
from peft_sgrq.config import SGRQConfig

_PLAIN = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")


class TorchaoLayer(PlainScales):
    """int8, intx and float8, one code an element: codes `[N, K]`, a scale for a group, a row or a block."""

    scale_name = "_weight_scale"
    code_name = "_weight_qdata"

    @classmethod
    def find(cls, folder: CheckpointFolder, prefix: str, config: SGRQConfig) -> StoredLayer | None:
        codes = f"{prefix}._weight_qdata"
        if codes not in folder:
            return None
        described = json.loads(folder.metadata(codes).get(f"{prefix}.weight", "{}"))
        kind = described.get("_type", "tensor without a description")
        if kind not in _PLAIN:
            raise ValueError(
                f"it is stored as torchao's {kind}, expected one of {', '.join(_PLAIN)}, whose scales are a plain "
                "matrix in the file; merge in memory with `merge_and_unload` instead"
            )
        layer = cls(folder, prefix)
        rows, columns = folder.entry(codes).shape
        layer._set_geometry(_geometry(described["_data"], kind, folder.entry(codes).dtype, rows, columns))
        return layer


def _geometry(data: dict[str, Any], kind: str, dtype: str, rows: int, columns: int) -> Geometry:
    height, width = (int(size) for size in data["block_size"])
    if kind == "IntxUnpackedToInt8Tensor":
        name = data["target_dtype"]["_data"].replace("int", "intx")
    else:
        name = "int8" if kind == "Int8Tensor" else {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}[dtype]
    is_row = (height, width) == (1, columns)
    block = "row" if is_row else str(width) if height == 1 else f"{height}x{width}"
    dynamic = data.get("act_quant_kwargs") or data.get("activation_quantization")
    name = f"torchao-{name}-{block}{'-dynamic' if dynamic else ''}"
    return Geometry(name, "row" if is_row else "group", rows, columns, width, height)
