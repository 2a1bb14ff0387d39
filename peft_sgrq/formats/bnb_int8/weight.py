"""bitsandbytes LLM.int8() layers: int8 codes and one float32 scale a row."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peft_sgrq.formats.scaled_weight import ScaledWeight
from peft_sgrq.formats.selectable_unit import SelectableUnit

_CODE_RANGE = 1.0 / 127.0  # W = CB * SCB / 127


class BnbInt8Weight(ScaledWeight):
    """`bitsandbytes.nn.Linear8bitLt`. Rows are selected; outlier decomposition works as in the base."""

    layer_class = ("bitsandbytes.nn", "Linear8bitLt")
    stored_fields = ("SCB",)
    keeps_dtype = True
    in_parts = True
    unit = SelectableUnit.ROW

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.out_features, self.in_features = module.out_features, module.in_features  # type: ignore[assignment]
        self.group_size = self.in_features
        self.name = "bnb-int8-row"
        state: Any = module.state
        if state.has_fp16_weights:
            raise ValueError(
                "it keeps 16-bit weights (has_fp16_weights=True) and quantizes them anew at each forward pass, so it "
                "has no stored scales; make the layer with has_fp16_weights=False"
            )
        if self.owner is None:
            raise ValueError(
                "its weight is not quantized yet, expected int8 codes; move the model to its device first, "
                "bitsandbytes quantizes on the way"
            )

    @property
    def owner(self) -> Any:
        # The scales move from the weight to the layer's state at its first forward pass.
        candidates: tuple[Any, ...] = (self.module.state, self.module.weight)
        return next((owner for owner in candidates if getattr(owner, "SCB", None) is not None), None)

    def scales(self) -> torch.Tensor:
        owner = self.owner
        if owner is None:
            raise RuntimeError(
                "An int8 layer of bitsandbytes has lost its scales, as FSDP makes it lose them (for adapters of every "
                "kind), expected them beside its codes; train int8 bases by DDP or DeepSpeed ZeRO-2, or quantize in 4 "
                "bits for FSDP (https://huggingface.co/docs/bitsandbytes/fsdp_qlora)."
            )
        return owner.SCB.view(self.scales_shape)

    def codes_of_rows(self, units: torch.Tensor | None, dtype: torch.dtype, rows: slice) -> torch.Tensor:
        codes = self.stored_codes
        codes = codes[rows] if units is None else codes.index_select(0, units[rows])
        return codes.to(dtype) * _CODE_RANGE

    def dequantize_columns(self, scales: torch.Tensor, dtype: torch.dtype, columns: slice) -> torch.Tensor:
        return self.stored_codes[:, columns].to(dtype, copy=True).mul_(scales * _CODE_RANGE)

    def prepare(self, scales: torch.Tensor) -> torch.Tensor:
        return scales.reshape(-1)  # (N,)

    @property
    def writes_to_input(self) -> bool:
        # In eval mode bitsandbytes 0.50 sets outliers of float16 inputs to zero and puts them back: the values stay,
        # but autograd sees a changed tensor. `test_bitsandbytes_still_writes_to_int8_inputs` fails once it does not.
        state: Any = self.module.state
        return state.threshold > 0 and not self.module.training

    def linear(self, x: torch.Tensor, prepared: torch.Tensor) -> torch.Tensor:
        import bitsandbytes as bnb

        own: Any = self.module.state
        state = bnb.MatmulLtState()
        state.CB, state.SCB = self.stored_codes, prepared
        state.has_fp16_weights = False
        state.threshold, state.use_pool = own.threshold, own.use_pool
        state.is_training = self.module.training
        bias = self.bias
        return bnb.matmul(x, state.CB, bias=None if bias is None else bias.to(x.dtype), state=state)

    def quantization(self) -> dict[str, Any] | None:
        return {
            "quant_method": "bitsandbytes",
            "load_in_8bit": True,
            "llm_int8_threshold": float(self.module.state.threshold),  # type: ignore[union-attr, arg-type]
        }
