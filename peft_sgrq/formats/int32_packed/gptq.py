"""GPTQ layers as GPTQModel loads them: 2, 3, 4 and 8 bits, symmetric or not, in activation order or not.

`qweight` int32 `[K * bits / 32, N]` holds codes packed along the input, `qzeros` int32 `[groups, N * bits / 32]` zero
points packed along the output, `scales` is float16 `[groups, N]`, and `g_idx` int32 `[K]` names each column's group.
In memory zero points are stored as they are (`gptq_v2`), whatever the file does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peft_sgrq.formats.int32_packed.bound_copies import release_copy
from peft_sgrq.formats.int32_packed.gptqmodel_layer import GPTQModelLayer
from peft_sgrq.formats.int32_packed.packing import WORD, unpack, unpack_rows
from peft_sgrq.formats.int32_packed.weight import Int32PackedWeight


class GPTQLayout(Int32PackedWeight):
    """Codes packed along the input, zero points along the output: the tensors of GPTQ, whoever computes with them."""

    smallest_served = 32  # of vLLM's Marlin kernels: 32, 64, 128 or the whole row

    def unpack_codes(self) -> torch.Tensor:
        return unpack(self.stored_codes, self.bits, 0)[: self.in_features]

    def unpack_columns(self, columns: torch.Tensor) -> torch.Tensor:
        return unpack_rows(self.stored_codes, self.bits, columns)

    def unpack_groups(self, units: torch.Tensor) -> torch.Tensor:
        words, rest = divmod(self.group_size * self.bits, WORD)
        if rest or self.columns.padded or not self.columns.consecutive:
            return super().unpack_groups(units)
        packed = self.stored_codes.view(-1, words, self.out_features).index_select(0, units)  # (n, words, N)
        return unpack(packed.flatten(0, 1), self.bits, 0)

    def unpack_zeros(self) -> torch.Tensor:
        return unpack(self.module.qzeros, self.bits, 1)[:, : self.out_features]  # type: ignore[arg-type]


class GPTQWeight(GPTQModelLayer, GPTQLayout):
    """`gptqmodel`'s `TorchLinear`, its one GPTQ kernel that can be trained through and sees other scales at once."""

    family, method = "gptq", "gptq"
    kernel = "TorchLinear"
    loading = (
        'quantization_config=GPTQConfig(bits=..., backend="torch"), or GPTQModel.load(..., backend=BACKEND.GPTQ_TORCH)'
    )

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        layer: Any = module
        if layer.planar or layer.pack_dtype != torch.int32:
            raise ValueError(
                f"its {layer.bits}-bit codes are packed as bit planes or in {layer.pack_dtype}, expected 2, 3, 4 or 8 "
                "bits in one stream of torch.int32; quantize it with format='gptq'"
            )
        if layer.online_full_had or layer.online_partial_had:
            raise ValueError(
                "it carries a rotation of GPTQModel's own, expected a plain GPTQ layer; leave it out with "
                "`exclude_modules`"
            )
        _ = self.columns  # an index that cannot be used is found now

    @property
    def _index(self) -> torch.Tensor | None:
        return self.module.g_idx  # type: ignore[return-value]

    def linear(self, x: torch.Tensor, prepared: torch.Tensor) -> torch.Tensor:
        y, bias = self.product(x, prepared), self.bias
        return y if bias is None else y.add_(bias.to(y.dtype))

    def restore_scales(self, stored: Any) -> Any:
        release_copy(self.module)
        return super().restore_scales(stored)

    def split(self, group_size: int) -> None:
        release_copy(self.module)
        super().split(group_size)
