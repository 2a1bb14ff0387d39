"""The stored scales of a layer in memory: where its tensors are, and how they are replaced and put back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from peft_sgrq.formats.scale_matrix import ScaleMatrix


class StoredScales(ScaleMatrix):
    """The scales of a layer in memory.

    It owns them; nothing else keeps a copy. It holds the wrapped module and reads its tensors anew each time, so the
    module may be moved, copied or loaded into underneath it.

    Attributes:
        module (`nn.Module`): The wrapped layer.
        stored_fields (`tuple[str, ...]`): The attributes of `owner` that hold the scales, and what changes with them.
        keeps_dtype (`bool`): Whether these move with the layer and are never cast.
    """

    stored_fields: tuple[str, ...]
    keeps_dtype: ClassVar[bool] = False

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.stored_codes.device

    @property
    def owner(self) -> Any:
        """What has the stored scales as attributes: the layer, its weight, or a state of it."""
        return self.module

    def stored(self) -> tuple[Any, ...]:
        """The values of `stored_fields`, the scales first."""
        return tuple(getattr(self.owner, field) for field in self.stored_fields)

    @property
    def stored_codes(self) -> torch.Tensor:
        """The tensor that holds the codes."""
        return self.module.weight.data  # type: ignore[return-value]

    @property
    def storage_dtype(self) -> torch.dtype:
        return self.stored()[0].dtype

    def fingerprint_tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.stored_codes, self.stored()[0]

    def sources(self) -> list[torch.Tensor]:
        """The stored tensors that `prepare` and `bind` make something of, so that a change of them can be seen."""
        return list(self.stored())

    def prepare(self, scales: torch.Tensor) -> torch.Tensor:
        """Makes of float32 scales `[rows, groups]` what the kernel of `linear` takes; inference does it once."""
        return scales

    def changed(self, scales: torch.Tensor) -> tuple[Any, ...]:
        """What takes the places of `stored()` for scales as `write_scales` is given them."""
        return (self.prepare(scales).contiguous(),)

    def write_scales(self, scales: torch.Tensor) -> Any:
        """Replaces the stored scales, and nothing else.

        Args:
            scales (`torch.Tensor`): float32 `[rows, groups]`, or with moves of zero points `[2, rows, groups]`, as
                `effective_scales` returns them.

        Returns:
            What `restore_scales` needs to put the replaced tensors back: the same tensors, not equal ones.
        """
        return self.restore_scales(self.changed(scales))

    def restore_scales(self, stored: Any) -> Any:
        """Puts back what `write_scales` returned, and returns what that replaced, in the same form."""
        owner, replaced = self.owner, self.stored()
        for field, value in zip(self.stored_fields, stored, strict=True):
            setattr(owner, field, value)
        return replaced

    def convert_stored(self, stored: Any, fn: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        """Applies to what `write_scales` returned what `nn.Module.to` and the like do by `fn` to the layer itself."""
        return tuple(self._converted(value, fn) for value in stored)

    def _converted(self, value: torch.Tensor, fn: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        if self.keeps_dtype:
            return value.to(fn(torch.empty(0, device=value.device)).device)
        if not isinstance(value, nn.Parameter):
            return fn(value)
        data = value.data
        converted = fn(data)
        return value if converted is data else nn.Parameter(converted, requires_grad=value.requires_grad)


class ParameterScales(StoredScales):
    """A layer whose scales are one `nn.Parameter`, in any shape that has `rows x groups` numbers.

    A merge replaces the parameter, not its data, so that `restore_scales` puts the very same one back.
    """

    @property
    def _stored(self) -> nn.Parameter:
        return self.stored()[0]

    def scales(self) -> torch.Tensor:
        return self._stored.detach().float().reshape(self.scales_shape)

    def _to_stored(self, scales: torch.Tensor) -> torch.Tensor:
        return scales.to(self.storage_dtype).reshape(self._stored.shape)

    def changed(self, scales: torch.Tensor) -> tuple[nn.Parameter]:
        return (nn.Parameter(self._to_stored(scales), requires_grad=False),)
