"""AWQ layers as GPTQModel loads them: codes and zero points packed along the output, groups of consecutive columns.

`qweight` int32 `[K, N * bits / 32]`, `qzeros` int32 `[groups, N * bits / 32]`, `scales` float16 (or bfloat16)
`[groups, N]`. Words of 4-bit codes are interleaved, those of other widths are not.
"""

from __future__ import annotations

import torch

from peft_sgrq.formats.int32_packed.gptqmodel_layer import GPTQModelLayer
from peft_sgrq.formats.int32_packed.packing import unpack

_INTERLEAVED = (0, 4, 1, 5, 2, 6, 3, 7)  # where in its word each of eight 4-bit codes is
_HALF = (torch.float16, torch.bfloat16)


class AWQWeight(GPTQModelLayer):
    """`gptqmodel`'s `AwqTorchLinear`: scales are cast to the dtype of the input before the weight is made."""

    family, method = "awq", "awq"
    kernel = "AwqTorchLinear"
    loading = (
        'quantization_config=AwqConfig(bits=..., backend="torch_awq"), AutoRoundConfig(backend="torch"), or '
        "GPTQModel.load(..., backend=BACKEND.AWQ_TORCH)"
    )

    def _unpack(self, packed: torch.Tensor) -> torch.Tensor:
        order = _INTERLEAVED if self.bits == 4 else None
        return unpack(packed, self.bits, 1, order)[:, : self.out_features]

    def unpack_codes(self) -> torch.Tensor:
        return self._unpack(self.stored_codes)

    def unpack_columns(self, columns: torch.Tensor) -> torch.Tensor:
        return self._unpack(self.stored_codes.index_select(0, columns))

    def unpack_zeros(self) -> torch.Tensor:
        return self._unpack(self.module.qzeros)  # type: ignore[arg-type]

    def weight(self, stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return super().weight(stored.to(dtype), dtype)

    def cast_input(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.dtype in _HALF else x.to(torch.float16)

    def cast_output(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return y.to(x.dtype)

    def linear(self, x: torch.Tensor, prepared: torch.Tensor) -> torch.Tensor:
        y, bias = self.product(x, prepared), self.bias
        return y if bias is None else y + bias.to(x.dtype)
