"""Formats whose scales are a frozen parameter of the layer, beside the codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from peft_sgrq.formats.scaled_weight import ScaledWeight


class ParameterScales(ScaledWeight):
    """A layer whose scales are one `nn.Parameter`, in any shape that has `rows x groups` numbers.

    A merge replaces the parameter, not its data, so that `restore_scales` puts the very same one back.

    Attributes:
        scale_name (`str`): The name of the parameter in the layer.
    """

    scale_name: str

    @property
    def _stored(self) -> nn.Parameter:
        return getattr(self.module, self.scale_name)

    @property
    def device(self) -> torch.device:
        return self._stored.device

    @property
    def storage_dtype(self) -> torch.dtype:
        return self._stored.dtype

    def scales(self) -> torch.Tensor:
        return self._stored.detach().float().reshape(self.scales_shape)

    def sources(self) -> list[torch.Tensor]:
        return [self._stored]

    def _to_stored(self, scales: torch.Tensor) -> torch.Tensor:
        return scales.to(self.storage_dtype).reshape(self._stored.shape)

    def write_scales(self, scales: torch.Tensor) -> Any:
        return self.restore_scales(nn.Parameter(self._to_stored(scales), requires_grad=False))

    def restore_scales(self, stored: Any) -> Any:
        replaced = self._stored
        setattr(self.module, self.scale_name, stored)
        return replaced

    def convert_stored(self, stored: Any, fn: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        converted = fn(stored.data)
        return stored if converted is stored.data else nn.Parameter(converted, requires_grad=False)
