"""torchao: a weight `w` flattened to `_w_qdata`, `_w_scale` and so on, its class in the metadata of the file."""

from __future__ import annotations

import json

import torch

from peft_sgrq.config import SGRQConfig
from peft_sgrq.formats.stored_weight import PlainScales
from peft_sgrq.formats.torchao.weight import PLAIN, geometry, rounding_name


class StoredTorchao(PlainScales):
    """int8, intx and float8, one code an element: codes `[N, K]`, a scale for a group, a row or a block."""

    scale_name = "_weight_scale"
    code_name = "_weight_qdata"
    needed = ("_weight_qdata",)

    def measure(self, config: SGRQConfig) -> bool:
        described = json.loads(self.folder.metadata(self.key(self.code_name)).get(self.key("weight"), "{}"))
        kind = described.get("_type", "tensor without a description")
        if kind not in PLAIN:
            raise ValueError(
                f"it is stored as torchao's {kind}, expected one of {', '.join(PLAIN)}, whose scales are a plain "
                "matrix in the file; merge in memory with `merge_and_unload` instead"
            )
        data, stored = described["_data"], self.tensor(self.code_name)
        dtype = stored.dtype
        if kind == "IntxUnpackedToInt8Tensor":
            dtype = getattr(torch, data["target_dtype"]["_data"])
        rounding, how = "", data.get("act_quant_kwargs") or data.get("activation_quantization")
        if how:
            fields = how["_data"] if isinstance(how, dict) else {}
            mapping = fields.get("mapping_type", {}).get("_data", "")
            rounding = rounding_name(self.has("_weight_act_quant_scale"), mapping)
        self._set_geometry(geometry(kind, dtype, stored.shape, data["block_size"], rounding))
        return True
