"""Fine-grained fp8 (DeepSeek's): float8 codes and a float32 scale for each block of, usually, 128 x 128 weights.

On GPUs that compute in fp8 transformers loads such a checkpoint into `FP8Linear` modules. Everywhere else it
dequantizes the weights while loading; `restore_codes` puts the codes and scales of the checkpoint back beneath such a
model, bit for bit, so that scales can be trained there too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from peft_sgrq.formats.scale_matrix import Geometry
from peft_sgrq.formats.scaled_weight import ScaledWeight
from peft_sgrq.formats.selectable_unit import SelectableUnit
from peft_sgrq.formats.stored_scales import ParameterScales


def geometry(codes: torch.Tensor, scales: torch.Tensor, block: Sequence[int] | None) -> Geometry:
    """What the stored tensors of a layer say about its blocks.

    Args:
        codes (`torch.Tensor`): `weight`, float8 `[N, K]`.
        scales (`torch.Tensor`): `weight_scale_inv`, `[ceil(N / rows), ceil(K / columns)]`, or a single number.
        block (`Sequence[int]` or `None`): Rows and columns of a block; `None` if one scale serves the whole weight.

    Raises:
        ValueError: If its scales cannot be tuned; a clause about the layer.
    """
    if scales.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"its scales are {scales.dtype}, powers of two (E8M0), which a small change leaves as they are; use a "
            "checkpoint with float32 scales"
        )
    if codes.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2) or codes.dim() != 2:
        raise ValueError(f"its weight is {codes.dtype} {tuple(codes.shape)}, expected float8 [out, in]")
    rows, columns = codes.shape
    height, width = (rows, columns) if block is None else (int(block[0]), int(block[1]))
    expected = (-(-rows // height), -(-columns // width))
    if scales.numel() != expected[0] * expected[1]:
        raise ValueError(
            f"its scales have shape {tuple(scales.shape)}, expected {expected} for blocks of {height} x {width}; "
            "check `weight_block_size` in the quantization config"
        )
    name = "fp8-tensor" if block is None else f"fp8-{height}x{width}"
    return Geometry(name, SelectableUnit.GROUP, rows, columns, width, height)


class Fp8BlockLinear(nn.Module):
    """A linear layer that keeps fp8 codes and block scales, and dequantizes its weight when it computes.

    Args:
        codes (`torch.Tensor`): float8 `[N, K]`.
        scales (`torch.Tensor`): float32 `[ceil(N / rows), ceil(K / columns)]`.
        block (`Sequence[int]` or `None`): Rows and columns of a block.
        dtype (`torch.dtype`): What the weight is rounded to: the dtype transformers dequantizes it to.
        bias (`nn.Parameter` or `None`): `[N]`.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        block: Sequence[int] | None,
        dtype: torch.dtype,
        bias: nn.Parameter | None,
    ) -> None:
        super().__init__()
        geometry(codes, scales, block)
        self.out_features, self.in_features = codes.shape
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight_scale_inv = nn.Parameter(scales, requires_grad=False)
        self.register_parameter("bias", bias)
        self.block_size = None if block is None else tuple(block)
        self.compute_dtype = dtype

    def dense_weight(self, scales: torch.Tensor) -> torch.Tensor:
        """The weight for given scales, as transformers dequantizes it."""
        return dequantize_blocks(self.weight, scales, self.block_size).to(self.compute_dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.dense_weight(self.weight_scale_inv), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, block_size={self.block_size}"


def dequantize_blocks(codes: torch.Tensor, scales: torch.Tensor, block: Sequence[int] | None) -> torch.Tensor:
    """`C * S` in float32, `[N, K]`; each scale serves a block of rows and columns."""
    rows, columns = codes.shape
    height, width = (rows, columns) if block is None else block
    expanded = scales.float().reshape(-(-rows // height), -(-columns // width))
    expanded = expanded.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
    return codes.to(torch.float32) * expanded


class Fp8BlocksWeight(ParameterScales, ScaledWeight):
    """transformers' `FP8Linear`, computing by its own kernels on a GPU, and `Fp8BlockLinear`."""

    stored_fields = ("weight_scale_inv",)

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        block: Any = module.block_size
        self._set_geometry(geometry(self.stored_codes, self._stored, block))

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        if isinstance(module, Fp8BlockLinear):
            return True
        fp8 = sys.modules.get("transformers.integrations.finegrained_fp8")
        # The same class holds dense weights where the kernels cannot run.
        weight: Any = module.weight if fp8 is not None and type(module) is fp8.FP8Linear else None
        return weight is not None and weight.element_size() == 1

    @classmethod
    def known_class(cls, module: nn.Module) -> type[nn.Module]:
        return Fp8BlockLinear if isinstance(module, Fp8BlockLinear) else type(module)  # matched by its very class

    def codes(self, units: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        return self.select_codes(self.stored_codes.to(dtype), units)

    def dequantize(self, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if isinstance(self.module, Fp8BlockLinear):
            return self.module.dense_weight(scales).to(dtype)
        return dequantize_blocks(self.stored_codes, scales, self.module.block_size).to(dtype)  # type: ignore[arg-type]

    def prepare(self, scales: torch.Tensor) -> torch.Tensor:
        if isinstance(self.module, Fp8BlockLinear):
            return self.module.dense_weight(scales)  # (N, K)
        return self._to_stored(scales)

    def linear(self, x: torch.Tensor, prepared: torch.Tensor) -> torch.Tensor:
        if isinstance(self.module, Fp8BlockLinear):
            return F.linear(x, prepared, self.bias)
        from transformers.integrations.finegrained_fp8 import fp8_linear

        own: Any = self.module
        return fp8_linear(
            x, own.weight, prepared, own.block_size, own.bias, own.activation_scale, not own._deepgemm_disabled
        )

    def quantization(self) -> dict[str, Any] | None:
        found = {"quant_method": "fp8", "weight_block_size": list(self.module.block_size or ())}  # type: ignore[arg-type]
        return found | ({"restored_codes": True} if isinstance(self.module, Fp8BlockLinear) else {})
