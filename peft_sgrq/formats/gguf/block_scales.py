"""The scales of a packed matrix: one for each block, its half float `d`.

In super-blocks of 256 columns the scales of the sub-blocks stay as they are then, and `d` and `m` change together, so
that `W'` is the weight times `1 + delta`.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch

from peft_sgrq.formats.gguf.blocks import BlockType, read_half, scale_codes, write_half
from peft_sgrq.formats.scale_arithmetic import inverse_or_zero, rescaled_offset
from peft_sgrq.formats.scale_matrix import split_zero_points

_LARGEST = torch.finfo(torch.float16).max


class Factors(NamedTuple):
    """What the codes are multiplied by and what is added: `S` and `M`, float32 `[blocks, sub-blocks]`."""

    scales: torch.Tensor
    offsets: torch.Tensor | None


class BlockScales:
    """One scale for each block. What is read of the blocks is kept, so that objects of it are for one use.

    Args:
        kind (`BlockType`): The type of the blocks.
        packed (`torch.Tensor`): The matrix as the file has it, uint8 `[N, bytes of a row]`. It is not written to.
    """

    def __init__(self, kind: BlockType, packed: torch.Tensor) -> None:
        self.kind = kind
        self.rows = packed.shape[0]
        self.blocks = packed.reshape(-1, kind.nbytes)

    @property
    def group_size(self) -> int:
        """Columns per scale."""
        return self.kind.size

    @property
    def movable_zero_points(self) -> bool:
        """Whether each scale has an offset of its own that is a float."""
        return self.kind.offset_at is not None and self.kind.sub is None

    @property
    def scale_bytes(self) -> list[int]:
        """Which bytes of a block a change of scales may change, ascending."""
        return self.kind.scale_bytes

    @cached_property
    def _scale(self) -> torch.Tensor:
        """`d`, float32 `[blocks, 1]`."""
        return read_half(self.blocks, self.kind.scale_at)

    @cached_property
    def _offset(self) -> torch.Tensor | None:
        """`m`, float32 `[blocks, 1]`."""
        return None if self.kind.offset_at is None else read_half(self.blocks, self.kind.offset_at)

    def scales(self) -> torch.Tensor:
        """The scales, float32 `[N, groups]`."""
        return self._scale.view(self.rows, -1)

    def offsets(self) -> torch.Tensor | None:
        """The stored offsets that belong to the scales, float32 `[N, groups]`; `None` in types without."""
        offset = self._offset
        return None if offset is None else offset.view(self.rows, -1)

    def round(self, scales: torch.Tensor) -> torch.Tensor:
        """Rounds scales, float32 `[N, groups]`, to what the file can hold."""
        return scales.to(torch.float16).float()

    def changed_offsets(self, scales: torch.Tensor, moves: torch.Tensor | None = None) -> torch.Tensor | None:
        """The offsets that go with other scales, as the file can hold them, float32 `[N, groups]`.

        Args:
            scales (`torch.Tensor`): The scales, float32 `[N, groups]`.
            moves (`torch.Tensor` or `None`): By how many steps the zero points move, same shape.
        """
        offsets = self.offsets()
        if offsets is None:
            return None
        return round_half(rescaled_offset(offsets, scales, self.scales(), moves))

    def changed_factors(self, scales: torch.Tensor) -> Factors:
        """The factors for what `effective_scales` returns: changed scales, and moves of zero points if any."""
        scales, moves = split_zero_points(scales)
        return self.factors(scales, self.changed_offsets(scales, moves))

    def factors(self, scales: torch.Tensor, offsets: torch.Tensor | None) -> Factors:
        """What codes are multiplied by and what is added, for scales and offsets `[N, groups]`."""
        scales = scales.reshape(-1, 1)
        offsets = None if offsets is None else offsets.reshape(-1, 1)
        if self.kind.sub is None:
            return Factors(scales, offsets)
        sub = self.kind.sub.read(self.blocks[:, self.kind.sub.at])
        shifts = None if sub.minimums is None or offsets is None else -(offsets * sub.minimums.float())
        return Factors(scales * sub.scales.float(), shifts)

    def unit_factors(self) -> Factors:
        """The factors at which the weight is the unit-scale values `C`: a scale of one, an offset of `M / S`."""
        scales, offsets = self.scales(), self.offsets()
        if offsets is not None:
            offsets = (offsets / scales).nan_to_num_(0.0, 0.0, 0.0)  # none where a scale is zero
        return self.factors(torch.ones_like(scales), offsets)

    def to_codes(self, scales: torch.Tensor, factors: Factors) -> tuple[torch.Tensor, torch.Tensor | None]:
        """How the unit-scale values `C` follow from a weight: `W' = S' q + M'` and `C = q + M / S`.

        Args:
            scales (`torch.Tensor`): The scales, as `effective_scales` returns them.
            factors (`Factors`): What `changed_factors` made of these.

        Returns:
            `1 / S'` (zero where a scale is), float32 `[N, groups]`, and by how much `W' / S'` is more than `C`, by
            sub-block: `M' / S' - M / S`, float32 `[N, sub-blocks]`; `None` in types without offsets.
        """
        inverse = inverse_or_zero(split_zero_points(scales)[0])
        unit = self.unit_factors().offsets
        if factors.offsets is None or unit is None:
            return inverse, None
        shift = factors.offsets * inverse.reshape(self.blocks.shape[0], -1) - unit  # (blocks, s)
        return inverse, shift.view(self.rows, -1)

    def weight(self, factors: Factors, dtype: torch.dtype) -> torch.Tensor:
        """The matrix for some factors, `[N, K]`."""
        return scale_codes(self.kind, self.blocks, factors.scales, factors.offsets, dtype).view(self.rows, -1)

    def with_scales(self, scales: torch.Tensor) -> torch.Tensor:
        """The packed matrix with what `effective_scales` returned, uint8 `[N, bytes of a row]`."""
        scales, moves = split_zero_points(scales)
        kind, blocks = self.kind, self.blocks.clone()
        write_half(blocks, kind.scale_at, scales.reshape(-1, 1))
        offsets = self.changed_offsets(scales, moves)
        if offsets is not None and kind.offset_at is not None:
            write_half(blocks, kind.offset_at, offsets.reshape(-1, 1))
        return blocks.view(self.rows, -1)


def round_half(values: torch.Tensor) -> torch.Tensor:
    """Rounds float32 values to half floats; what is too large becomes the largest one."""
    return values.clamp(-_LARGEST, _LARGEST).to(torch.float16).float()
