"""torchao: a weight `w` flattened to `_w_qdata`, `_w_scale` and so on, its class in the metadata of the file."""

from __future__ import annotations

import json

import torch

from peft_sgrq.config import SGRQConfig
from peft_sgrq.files.folder import CheckpointFolder
from peft_sgrq.formats.stored_weight import PlainScales, StoredWeight
from peft_sgrq.formats.torchao.weight import PLAIN, geometry, rounding_name


class StoredTorchao(PlainScales):
    """int8, intx and float8, one code an element: codes `[N, K]`, a scale for a group, a row or a block."""

    scale_name = "_weight_scale"
    code_name = "_weight_qdata"

    @classmethod
    def find(cls, folder: CheckpointFolder, prefix: str, config: SGRQConfig) -> StoredWeight | None:
        codes = f"{prefix}._weight_qdata"
        if codes not in folder:
            return None
        described = json.loads(folder.metadata(codes).get(f"{prefix}.weight", "{}"))
        kind = described.get("_type", "tensor without a description")
        if kind not in PLAIN:
            raise ValueError(
                f"it is stored as torchao's {kind}, expected one of {', '.join(PLAIN)}, whose scales are a plain "
                "matrix in the file; merge in memory with `merge_and_unload` instead"
            )
        layer = cls(folder, prefix)
        data, stored = described["_data"], layer.tensor("_weight_qdata")
        dtype = stored.dtype
        if kind == "IntxUnpackedToInt8Tensor":
            dtype = getattr(torch, data["target_dtype"]["_data"])
        rounding, how = "", data.get("act_quant_kwargs") or data.get("activation_quantization")
        if how:
            fields = how["_data"] if isinstance(how, dict) else {}
            mapping = fields.get("mapping_type", {}).get("_data", "")
            rounding = rounding_name(f"{prefix}._weight_act_quant_scale" in folder, mapping)
        layer._set_geometry(geometry(kind, dtype, stored.shape, data["block_size"], rounding))
        return layer
