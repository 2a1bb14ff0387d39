"""torchao's packed int4 layers, whose codes are laid out for one kernel: CPU, tile-packed for CUDA, and plain (mslk).

All compute `W = (q - 8) * scale + offset` with a float offset, the zero point times the scale: it changes with the
scale, so that `W'` is the weight times `1 + delta` (see `rescaled_offset`). What the codes are is found by running the
kernel on the identity matrix, which holds for any packing. Only the CPU layout has been run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from peft_sgrq.formats.scale_arithmetic import rescaled_offset
from peft_sgrq.formats.scale_matrix import split_zero_points
from peft_sgrq.formats.torchao.weight import TorchaoWeight, weight_type


class TorchaoInt4Weight(TorchaoWeight):
    """`Int4OpaqueTensor` (CPU) and `Int4TilePackedTo4dTensor` (CUDA): scales and offsets in one `[G, N, 2]` tensor."""

    stored_fields: tuple[str, ...] = ("scale_and_zero",)
    movable_zero_points = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        weight = self.owner
        if getattr(weight, "act_mapping_type", None) is not None or getattr(weight, "act_pre_scale", None) is not None:
            raise ValueError(
                "its activations are quantized or scaled on the fly, which is not supported in this int4 layout; "
                "quantize weights only"
            )
        if type(weight).__name__ == "Int4OpaqueTensor":
            self.saved_by = "`torch.save(model.state_dict(), file)`"
        self.group_size = int(weight.block_size[-1])
        self.name = f"torchao-int4-{self.group_size}"

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return weight_type(module) in ("Int4OpaqueTensor", "Int4TilePackedTo4dTensor")

    def quantization(self) -> dict[str, Any] | None:
        return {**(super().quantization() or {}), "layout": type(self.owner).__name__}

    def _used(self, stored: torch.Tensor) -> torch.Tensor:
        """Scales and offsets without the padding the kernel asks for, float32 `[N, G, 2]`."""
        rows, groups = self.scales_shape
        return stored.float().transpose(0, 1)[:rows, :groups]

    def scales(self) -> torch.Tensor:
        return self._used(self.stored_scales)[..., 0]

    def prepare(self, scales: torch.Tensor) -> torch.Tensor:
        scales, moves = split_zero_points(scales)
        stored = self.stored_scales
        old, offsets = self._used(stored).unbind(-1)  # (N, G)
        rows, groups = self.scales_shape
        prepared = stored.clone()
        prepared[:groups, :rows, 0] = scales.t().to(stored.dtype)
        prepared[:groups, :rows, 1] = rescaled_offset(offsets, scales, old, moves).t().to(stored.dtype)
        return prepared

    def _kernel_weight(self, stored: torch.Tensor) -> torch.Tensor:
        eye = torch.eye(self.in_features, dtype=stored.dtype, device=stored.device)
        return F.linear(eye, self.with_parts(*self.parts(stored))).t()  # (N, K)

    def codes(self, units: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        unit = torch.zeros_like(self.stored_scales)
        unit[..., 0] = 1
        codes = self._kernel_weight(unit).float()  # q - 8
        scales, offsets = self._used(self.stored_scales).unbind(-1)
        zeros = torch.where(scales == 0, 0.0, offsets / scales)  # (N, G)
        codes = codes + zeros.repeat_interleave(self.group_size, 1)
        return self.select_codes(codes, units).to(dtype)

    def dequantize(self, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self._kernel_weight(self.prepare(scales)).to(dtype)


class TorchaoInt4PlainWeight(TorchaoInt4Weight):
    """`Int4Tensor`: signed codes, two a byte, scales and offsets `[G, N]` each; its kernel (mslk) has not been run."""

    stored_fields = ("scale", "zero_point")

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        if self.owner.activation_dtype != torch.bfloat16:
            raise ValueError(
                f"its activations are quantized to {self.owner.activation_dtype}, expected bfloat16 activations; "
                "quantize with Int4WeightOnlyConfig"
            )

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return weight_type(module) == "Int4Tensor"

    @property
    def stored_scales(self) -> torch.Tensor:
        return torch.stack(self.stored(), -1)  # (G, N, 2), as in the other layouts

    def parts(self, scales: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(part.contiguous() for part in scales.unbind(-1))

    def fingerprint_tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.stored_codes, self.stored_scales

    def _kernel_weight(self, stored: torch.Tensor) -> torch.Tensor:
        packed = self.owner.qdata.view(torch.int8)  # (N, K / 2), the even column in the low half
        codes = torch.stack(((packed << 4) >> 4, packed >> 4), -1).flatten(1).float()
        scales, offsets = (part.repeat_interleave(self.group_size, 1) for part in self._used(stored).unbind(-1))
        return codes * scales + offsets  # (N, K)
