"""Dense layers: `nn.Linear` and transformers' `Conv1D`, the case `S = 1` with a group size of our choosing."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from peft_sgrq.formats.own_forward import computed_weight
from peft_sgrq.formats.partitioned import is_partitioned, shape_of, whole
from peft_sgrq.formats.scaled_weight import ScaledWeight

_FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class DenseWeight(ScaledWeight):
    """A weight that is not quantized; its codes are the weight itself and every scale is one.

    Merging multiplies the selected columns and rounds them to the dtype of the weight; the forward pass of the
    unmerged layer does the same, so both give the same bits.
    """

    quantized = False
    in_parts = True
    stored_fields = ("weight",)

    def __init__(self, module: nn.Module, group_size: int) -> None:
        super().__init__(module)
        shape = shape_of(self._parameter)
        self.out_features, self.in_features = reversed(shape) if self._transposed else shape
        self.group_size = min(group_size, self.in_features)
        self.name = f"dense-{self.group_size}"

    @classmethod
    def of(cls, module: nn.Module, group_size: int) -> DenseWeight:
        return cls(module, group_size)

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        if not isinstance(module, (nn.Linear, Conv1D)) or not isinstance(weight, torch.Tensor):
            return False
        if isinstance(module, NonDynamicallyQuantizableLinear):
            return False  # the output projection of nn.MultiheadAttention, whose forward pass is never called
        # Tensor subclasses behind a plain nn.Linear (torchao's, DTensor) are formats of their own.
        return type(weight.data) is torch.Tensor and weight.dtype in _FLOAT_DTYPES

    @classmethod
    def known_class(cls, module: nn.Module) -> type[nn.Module]:
        return Conv1D if isinstance(module, Conv1D) else nn.Linear

    @classmethod
    def obstacle(cls, module: nn.Module) -> str | None:
        return super().obstacle(module) or computed_weight(module)

    @property
    def _parameter(self) -> nn.Parameter:
        return self.module.weight  # type: ignore[return-value]

    @property
    def _transposed(self) -> bool:
        return isinstance(self.module, Conv1D)

    def _weight(self) -> torch.Tensor:
        parameter = self._parameter
        if self.is_trained and is_partitioned(parameter):
            raise ValueError(
                "A dense weight is trained beside its scales, and DeepSpeed ZeRO-3 has it in parts, expected it whole "
                "or frozen; freeze it with `requires_grad_(False)`, or use ZeRO-2."
            )
        weight = parameter if self.is_trained else whole(parameter)
        return weight.t() if self._transposed else weight  # (N, K)

    @property
    def is_trained(self) -> bool:
        return self._parameter.requires_grad

    def round_to_storage(self, scales: torch.Tensor) -> torch.Tensor:
        # The weight is what is stored; it is rounded when it is made.
        return scales

    def scales(self) -> torch.Tensor:
        return torch.ones(self.scales_shape, dtype=torch.float32, device=self.device)

    def codes_of_rows(self, units: torch.Tensor | None, dtype: torch.dtype, rows: slice) -> torch.Tensor:
        return self.select_codes(self._weight()[rows], units).to(dtype)

    def dequantize_columns(self, scales: torch.Tensor, dtype: torch.dtype, columns: slice) -> torch.Tensor:
        groups = slice(columns.start // self.group_size, -(-columns.stop // self.group_size))
        return apply_scales(self._weight()[:, columns], scales[:, groups], self.group_size).to(dtype)

    def prepare(self, scales: torch.Tensor) -> torch.Tensor:
        weight = apply_scales(self._weight(), scales, self.group_size)
        return weight.t().contiguous() if self._transposed else weight

    def linear(self, x: torch.Tensor, prepared: torch.Tensor) -> torch.Tensor:
        if self._transposed:
            y = torch.addmm(self.module.bias, x.view(-1, x.shape[-1]), prepared)  # type: ignore[arg-type]
            return y.view(*x.shape[:-1], self.out_features)
        return F.linear(x, prepared, self.bias)

    def changed(self, scales: torch.Tensor) -> tuple[nn.Parameter]:
        # A new parameter, not new data in the old one: a weight tied to the embedding must not change there.
        return (nn.Parameter(self.prepare(scales), requires_grad=self._parameter.requires_grad),)

    def fingerprint_tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return digest_tensors(whole(self._parameter))

    def quantization(self) -> dict[str, Any] | None:
        return None


def apply_scales(weight: torch.Tensor, scales: torch.Tensor, group_size: int) -> torch.Tensor:
    """A dense weight `[N, K]` with its columns scaled by group, rounded to its dtype; `scales` is `[N, groups]`."""
    columns = scales.repeat_interleave(group_size, dim=1)[:, : weight.shape[1]]  # (N, K)
    return (weight * columns).to(weight.dtype)


def digest_tensors(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What identifies a dense weight: samples of it, and no scales.

    bfloat16 makes the digest the same for a checkpoint loaded in float32 or bfloat16.
    """
    step = max(1, weight.numel() // 65536) | 1
    return weight.reshape(-1)[::step].to(torch.bfloat16), torch.empty(0, dtype=torch.uint8)
