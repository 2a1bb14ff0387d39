"""AutoRound's own layers: the tensors of GPTQ without activation order, computed by AutoRound's torch kernels.

Its packing `auto_round:auto_gptq` stores zero points less one, `auto_round:gptqmodel` stores them as they are. Its
packing `auto_round:auto_awq` is loaded into GPTQModel's AWQ layer, see `awq.py`.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from peft_sgrq.formats.int32_packed.gptq import GPTQLayout

_KERNELS = {  # the torch kernels, and what they add to stored zero points
    "auto_round_extension.torch.qlinear_torch": 0,
    "auto_round_extension.torch.qlinear_torch_zp": 1,
}
_PACKAGES = ("auto_round_extension.", "auto_round_kernel.")


class AutoRoundWeight(GPTQLayout):
    """AutoRound's `QuantLinear` on its torch kernels, 2 to 8 bits."""

    family, method = "autoround", "auto-round"

    def __init__(self, module: nn.Module) -> None:
        layer: Any = module
        kernel = type(module).__module__
        if kernel not in _KERNELS:
            raise ValueError(
                f"it runs on AutoRound's kernel {kernel}.{type(module).__name__}, which is not one that scales can be "
                "trained through; load the model with the torch kernel: "
                'quantization_config=AutoRoundConfig(backend="torch")'
            )
        self._offset = _KERNELS[kernel]
        super().__init__(module, layer.infeatures, layer.outfeatures, layer.bits, layer.group_size)
        if self.columns.padded:
            raise ValueError(
                f"in_features={self.in_features} is not a multiple of its group size {self.group_size}, which "
                "AutoRound's kernel does not compute either; leave it out with `exclude_modules`"
            )

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return type(module).__module__.startswith(_PACKAGES) and hasattr(module, "qweight")

    @classmethod
    def is_trainable(cls, module: nn.Module) -> bool:
        return type(module).__module__ in _KERNELS

    @classmethod
    def known_class(cls, module: nn.Module) -> type[nn.Module]:
        return sys.modules[type(module).__module__].QuantLinear

    @property
    def _index(self) -> torch.Tensor | None:
        return getattr(self.module, "g_idx", None)

    def unpack_zeros(self) -> torch.Tensor:
        return super().unpack_zeros() + self._offset

    def linear(self, x: torch.Tensor, prepared: torch.Tensor) -> torch.Tensor:
        y, bias = self.product(x, prepared).to(x.dtype), self.bias
        return y if bias is None else (y + bias).to(x.dtype)
