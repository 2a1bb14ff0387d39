"""A packed matrix as codes and scales, and a linear layer that has one."""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from peft_sgrq.formats.gguf.block_scales import BlockScales, Factors
from peft_sgrq.formats.gguf.layers import GGUFLinear
from peft_sgrq.formats.gguf.product import product
from peft_sgrq.formats.gguf.sub_block_scales import scales_of
from peft_sgrq.formats.scale_matrix import ScaleMatrix
from peft_sgrq.formats.scaled_weight import ScaledWeight, WeightAndCodes


class GGUFScales(ScaleMatrix):
    """The scales of a packed matrix, wherever it is."""

    @property
    @abstractmethod
    def held(self) -> BlockScales:
        """The blocks and their scales."""

    def set_kind(self, held: BlockScales) -> None:
        """Takes over what blocks of the type are like, of this matrix or any other."""
        self.group_size, self.movable_zero_points = held.group_size, held.movable_zero_points
        self.name = f"gguf-{held.kind.name}-{held.group_size}"

    @property
    def storage_dtype(self) -> torch.dtype:
        return torch.float16

    def scales(self) -> torch.Tensor:
        return self.held.scales()

    def round_to_storage(self, scales: torch.Tensor) -> torch.Tensor:
        return self.held.round(scales)

    def fingerprint_tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        held = self.held
        others = [byte for byte in range(held.kind.nbytes) if byte not in set(held.scale_bytes)]
        return held.blocks[:, others], held.blocks[:, held.scale_bytes]


class GGUFWeight(GGUFScales, ScaledWeight):
    """`GGUFLinear`: a scale for each block of 32 columns, each sub-block of a K-quant, or each block of 256."""

    in_parts: ClassVar[bool] = True
    codes_follow: ClassVar[bool] = True
    stored_fields = ("packed",)
    saved_by = "`peft_sgrq.save_gguf(model, file)`"
    module: GGUFLinear
    _read: BlockScales | None = None

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.in_features, self.out_features = self.module.in_features, self.module.out_features
        self.set_kind(self.held)

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return isinstance(module, GGUFLinear)

    @classmethod
    def known_class(cls, module: nn.Module) -> type[nn.Module]:
        return GGUFLinear

    @property
    def held(self) -> BlockScales:
        return self._read or self.module.scales()

    def read_once(self) -> GGUFWeight:
        weight = copy.copy(self)
        weight._read = self.module.scales()
        return weight

    def _part(self, rows: slice, blocks: slice) -> BlockScales:
        """The scales of some rows and some blocks of columns."""
        module = self.module
        size = module.kind.nbytes
        packed = module.packed.detach()[rows, blocks.start * size : blocks.stop * size]
        return scales_of(module.kind, packed, module.sub_blocks)

    @property
    def columns_at_once(self) -> int:
        return self.module.kind.size

    @property
    def device(self) -> torch.device:
        return self.module.packed.device

    def prepare(self, scales: torch.Tensor) -> torch.Tensor:
        factors = self.held.changed_factors(scales)
        made = torch.stack([factor for factor in factors if factor is not None])  # (1 or 2, blocks, sub-blocks)
        return made.half() if self.module.kind.sub is None else made  # half floats they are, and kept as such

    @property
    def keeps_prepared(self) -> bool:
        return self.module.kind.sub is None or self.module.sub_blocks  # else a factor is no scale, and easily made

    def prepared_scales(self, prepared: torch.Tensor) -> torch.Tensor:
        return prepared[0].float().view(self.scales_shape)

    def linear(self, x: torch.Tensor, prepared: torch.Tensor) -> torch.Tensor:
        dense = self.module.dense
        if dense.kept and not torch.is_grad_enabled() and not self.module.training:
            weight = dense.get(
                [prepared, self.module.packed], x.dtype, lambda: self.held.weight(_factors(prepared), x.dtype)
            )
            return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))
        return product(x, self.held, _factors(prepared), self.bias)

    def cast_input(self, x: torch.Tensor) -> torch.Tensor:
        kind = x.device.type
        return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x

    def codes_of_rows(self, units: torch.Tensor | None, dtype: torch.dtype, rows: slice) -> torch.Tensor:
        held = self._part(rows, slice(0, self.in_features // self.module.kind.size))
        codes = held.weight(held.unit_factors(), dtype)
        return self.select_codes(codes, units)

    def dequantize_columns(self, scales: torch.Tensor, dtype: torch.dtype, columns: slice) -> torch.Tensor:
        size = self.columns_at_once
        whole = slice(columns.start // size * size, -(-columns.stop // size) * size)  # blocks that hold the columns
        held, changed = self._columns(scales, whole)
        weight = held.weight(held.changed_factors(changed), dtype)
        return weight[:, columns.start - whole.start : columns.stop - whole.start]

    def columns_in_effect(
        self, scales: torch.Tensor, prepared: torch.Tensor | None, dtype: torch.dtype, columns: slice
    ) -> torch.Tensor:
        if prepared is None:
            return self.dequantize_columns(scales, dtype, columns)
        held, _ = self._columns(scales, columns)
        return held.weight(self._prepared_columns(prepared, columns), dtype)

    def weight_and_codes(
        self, scales: torch.Tensor, prepared: torch.Tensor | None, dtype: torch.dtype, columns: slice
    ) -> WeightAndCodes:
        held, changed = self._columns(scales, columns)
        factors = held.changed_factors(changed) if prepared is None else self._prepared_columns(prepared, columns)
        return WeightAndCodes(held.weight(factors, dtype), *held.to_codes(changed, factors))

    def _columns(self, scales: torch.Tensor, columns: slice) -> tuple[BlockScales, torch.Tensor]:
        """The scales of some columns, of whole blocks, as they are stored and as they are to be."""
        size = self.columns_at_once
        held = self._part(slice(0, self.out_features), slice(columns.start // size, columns.stop // size))
        return held, scales[..., columns.start // self.group_size : columns.stop // self.group_size]

    def _prepared_columns(self, prepared: torch.Tensor, columns: slice) -> Factors:
        size, sub_blocks = self.columns_at_once, prepared.shape[2]
        by_row = prepared.view(len(prepared), self.out_features, -1, sub_blocks)
        own = by_row[:, :, columns.start // size : columns.stop // size]  # (1 or 2, N, blocks of the columns, s)
        return _factors(own.reshape(len(prepared), -1, sub_blocks))

    def changed(self, scales: torch.Tensor) -> tuple[nn.Parameter]:
        return (nn.Parameter(self.held.with_scales(scales), requires_grad=False),)

    def quantization(self) -> dict[str, Any] | None:
        found: dict[str, Any] = {"quant_method": "gguf"}
        source = self.module.source
        return found if source is None else {**found, "gguf_file": source.file.replace("\\", "/").rpartition("/")[2]}


def _factors(prepared: torch.Tensor) -> Factors:
    return Factors(prepared[0].float(), prepared[1].float() if len(prepared) == 2 else None)
