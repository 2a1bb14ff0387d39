"""Integer codes with integer zero points and half-precision scales: `W[o, c] = (q[o, c] - z[o, k(c)]) s[o, k(c)]`.

The family of GPTQ, AWQ and AutoRound. All of them keep the matrices transposed (scales are `[groups, N]`) and multiply
by a weight `[K, N]` that is made anew at each forward pass. How codes and zero points are packed is the subclasses'
business, as are the dtypes in which the weight is made.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from peft_sgrq.formats.int32_packed.columns import ColumnGroups
from peft_sgrq.formats.scale_arithmetic import gather_groups
from peft_sgrq.formats.scaled_weight import ScaledWeight

# Scales may be kept in float16 in the file and in bfloat16 in memory or the other way round; rounded to bfloat16 they
# are the same. Zero points are in no digest: GPTQ's are others in the file than in memory.
DIGEST_DTYPE = torch.bfloat16


class Int32PackedWeight(ScaledWeight):
    """A layer with buffers `qweight`, `qzeros`, `scales` and `g_idx` or some of them.

    Attributes:
        bits (`int`): Bits a code.
        family, method (`str`): The method, as fingerprints name it, and as transformers does.
    """

    family: str
    method: str
    splittable = True
    stored_fields = ("scales",)
    digest_dtype = DIGEST_DTYPE

    def __init__(self, module: nn.Module, in_features: int, out_features: int, bits: int, group_size: int) -> None:
        super().__init__(module)
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        self.group_size = in_features if group_size in (-1, 0) else min(group_size, in_features)
        self.name = format_name(self.family, bits, self.group_size)
        self._columns = ColumnGroups(in_features, self.group_size)
        expected = (self.scales_shape[1], out_features)
        if tuple(self._stored.shape) != expected:
            raise ValueError(
                f"its scales have shape {tuple(self._stored.shape)}, expected (groups, out_features) = {expected} for "
                f"group size {self.group_size}; leave it out with `exclude_modules`"
            )

    @property
    def _stored(self) -> torch.Tensor:
        return self.module.scales  # type: ignore[return-value]

    @property
    def _index(self) -> torch.Tensor | None:
        """The group of each column, int32 `[K]`; `None` if groups are consecutive columns by definition."""
        return None

    # geometry

    @property
    def columns(self) -> ColumnGroups:
        """Which columns belong to which group, as the module says now."""
        if not torch.compiler.is_compiling():  # which has seen them before
            self._columns.update(self._index, self.device)
        return self._columns

    def select_columns(self, x: torch.Tensor, units: torch.Tensor | None) -> torch.Tensor:
        x = x.reshape(-1, x.shape[-1])  # (T, K)
        table = self.columns.table(x.device)
        if table is None:
            return gather_groups(x, units, self.scales_shape[1], self.group_size)
        table = table if units is None else table.index_select(0, units)  # (n, g)
        if self.columns.padded:
            x = F.pad(x, (0, 1))  # the column that pads incomplete groups
        return x.index_select(1, table.flatten())

    # numbers

    @property
    def stored_codes(self) -> torch.Tensor:
        return self.module.qweight  # type: ignore[return-value]

    def scales(self) -> torch.Tensor:
        return self._stored.t().float()

    @abstractmethod
    def unpack_codes(self) -> torch.Tensor:
        """The codes `q` of all columns, int8 or int16 `[K, N]`."""

    @abstractmethod
    def unpack_zeros(self) -> torch.Tensor:
        """The zero points `z` the layer computes with, int8 or int16 `[groups, N]`."""

    def unpack_columns(self, columns: torch.Tensor) -> torch.Tensor:
        """The codes `q` of some columns (int64 `[n]`), int8 or int16 `[n, N]`."""
        return self.unpack_codes().index_select(0, columns)

    def unpack_groups(self, units: torch.Tensor) -> torch.Tensor:
        """The codes `q` of the columns of some groups (int64 `[n]`), int8 or int16 `[n * g, N]`.

        Where a group is incomplete, the rest is codes of another column: the input is zero there.
        """
        table = self.columns.indices(self.device).index_select(0, units)  # (n, g)
        return self.unpack_columns(table.flatten().clamp(max=self.in_features - 1))

    def codes(self, units: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        zeros = self.unpack_zeros()  # (G, N)
        if units is None and self.columns.group_of_column(self.device) is None:
            codes = self.unpack_codes()  # (K, N)
        else:
            units = torch.arange(len(zeros), device=zeros.device) if units is None else units
            codes, zeros = self.unpack_groups(units), zeros.index_select(0, units)
        levels = codes.view(len(zeros), self.group_size, -1) - zeros.unsqueeze(1)  # (n, g, N)
        return levels.flatten(0, 1).t().to(dtype)  # (N, n * g)

    def weight(self, stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The weight as the layer makes it, `[K, N]`, contiguous.

        Args:
            stored (`torch.Tensor`): Scales as they are stored, `[groups, N]` in the storage dtype.
            dtype (`torch.dtype`): The dtype of the product.
        """
        levels = self._by_group(torch.sub, self.unpack_codes(), self.unpack_zeros())
        return self._by_group(torch.mul, levels, stored).to(dtype)

    def _by_group(
        self, operation: Callable[..., torch.Tensor], matrix: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """`operation` on a matrix `[K, N]` and the values of each column's group `[groups, N]`."""
        groups = self.columns.group_of_column(matrix.device)
        if groups is not None:
            return operation(matrix, values.index_select(0, groups))
        count = values.shape[0]
        return operation(matrix.view(count, self.group_size, -1), values.unsqueeze(1)).view(matrix.shape)

    def dequantize(self, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self.weight(self.prepare(scales), dtype).t()

    def prepare(self, scales: torch.Tensor) -> torch.Tensor:
        return scales.t().to(self.storage_dtype).contiguous()  # (G, N)

    def product(self, x: torch.Tensor, prepared: torch.Tensor) -> torch.Tensor:
        """The layer's output without bias: `x W^T` as the layer computes it, `[..., N]`."""
        weight = self.weight(prepared, x.dtype)
        return torch.matmul(x.reshape(-1, self.in_features), weight).view(*x.shape[:-1], self.out_features)

    # state

    def split_obstacle(self, group_size: int) -> str | None:
        sizes = getattr(type(self.module), "SUPPORTS_GROUP_SIZE", None)  # GPTQModel's layers say which they load
        if sizes and group_size not in sizes:
            known = ", ".join(str(size) for size in sizes if size > 0)
            return f"GPTQModel loads no groups of {group_size}, expected one of {known}; pass one of these"
        found, expected = int(self.columns.split(group_size)[1].sum()), -(-self.in_features // group_size)
        if found == expected:
            return None
        return (
            f"its g_idx leaves several groups incomplete, so there would be {found} groups of {group_size}, expected "
            f"{expected}; pass a size that divides the columns of each group"
        )

    def split(self, group_size: int) -> None:
        layer: Any = self.module
        index, repeats = self.columns.split(group_size)
        repeats = repeats.to(self.device)
        layer.scales = layer.scales.repeat_interleave(repeats, 0)
        layer.qzeros = layer.qzeros.repeat_interleave(repeats, 0)
        if self._index is not None:
            layer.g_idx = index.to(self._index)
        layer.group_size = group_size
        if hasattr(layer, "requested_group_size"):  # GPTQModel's, which may be -1
            layer.requested_group_size = group_size
        if hasattr(layer, "clear_weight_cache"):
            layer.clear_weight_cache()

    def quantization(self) -> dict[str, Any] | None:
        dtype = str(self.storage_dtype).removeprefix("torch.")
        return {"quant_method": self.method, "bits": self.bits, "group_size": self.group_size, "scale_dtype": dtype}


def format_name(family: str, bits: int, group_size: int) -> str:
    """A format of the family as it stands in fingerprints, e.g. `"gptq-w4g128"`."""
    return f"{family}-w{bits}g{group_size}"
