"""torchao's NVFP4 weight-only layers: 4-bit floats in blocks of 16, float8 (e4m3) scales and one float32 factor.

A step between two e4m3 numbers is 6 to 12 %, so a small change of a scale rounds to none. The forward pass rounds
the scales as the file does, straight-through in the gradient: training sees what is stored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peft_sgrq.formats.torchao.weight import TorchaoWeight, weight_type

_LARGEST = torch.finfo(torch.float8_e4m3fn).max


class TorchaoNVFP4Weight(TorchaoWeight):
    """`NVFP4Tensor` without quantized activations; scales may be stored swizzled, in tiles of 128 x 4."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        if self.owner.act_quant_kwargs is not None:
            raise ValueError(
                "its activations are quantized to NVFP4, whose kernel this has not been run with; quantize with "
                "NVFP4WeightOnlyConfig"
            )
        self.group_size = int(self.owner.block_size)
        self.name = f"torchao-nvfp4-{self.group_size}"

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return weight_type(module) == "NVFP4Tensor"

    @property
    def _factor(self) -> torch.Tensor:
        factor = self.owner.per_tensor_scale
        return torch.ones((), device=self.device) if factor is None else factor

    def scales(self) -> torch.Tensor:
        return self.owner.get_hp_scales().view(self.scales_shape)

    def _to_e4m3(self, scales: torch.Tensor) -> torch.Tensor:
        # The format's scales are not negative, and e4m3 has no infinity: beyond its range is NaN.
        return (scales / self._factor).clamp(0, _LARGEST).to(torch.float8_e4m3fn)

    def round_to_storage(self, scales: torch.Tensor) -> torch.Tensor:
        return self._factor * self._to_e4m3(scales).float()

    def prepare(self, scales: torch.Tensor) -> torch.Tensor:
        stored, rounded = self.stored_scales, self._to_e4m3(scales)
        if self.owner.is_swizzled_scales:
            from torchao.prototype.mx_formats.utils import to_blocked

            rounded = to_blocked(rounded)
        return rounded.reshape(stored.shape)

    def codes(self, units: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        from torchao.prototype.mx_formats.kernels import f4_unpacked_to_f32, unpack_uint4

        values = f4_unpacked_to_f32(unpack_uint4(self.stored_codes.view(torch.uint8)))  # (N, K)
        return self.select_codes(values, units).to(dtype)

    def dequantize(self, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        weight: Any = self.with_parts(self.prepare(scales))
        return weight.dequantize(dtype)
