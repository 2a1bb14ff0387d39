"""The block types of GGUF, and the weights they stand for.

All of them are `W = S q + M`: integers `q` that the bytes of a block hold, a scale `S` and, in some types, an offset
`M` for each block or sub-block. A block holds half floats `d` and `m` at fixed bytes. In blocks of 32 columns `S = d`
and `M = m`; in super-blocks of 256, `S[j] = d * scale[j]` and `M[j] = -m * minimum[j]` for each sub-block `j`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from peft_sgrq.formats.gguf import codes, sub_scales
from peft_sgrq.formats.gguf.sub_scales import SubScales

# Blocks decoded at a time on CPUs: what is made of them stays in the cache.
_PART_COLUMNS = 1 << 17


class BlockType(NamedTuple):
    """One type of blocks.

    Attributes:
        name (`str`): Its name in llama.cpp.
        id (`int`): Its number in a file (`enum ggml_type`).
        size (`int`): Columns of a block.
        nbytes (`int`): Bytes of a block.
        scale_at (`int`): The byte at which the half float `d` begins.
        offset_at (`int` or `None`): The byte at which the half float `m` begins; `None` in types without an offset.
        unpack (`Callable`): The integers `q` of blocks.
        sub (`SubScales` or `None`): The scales of sub-blocks, in types that store some.
    """

    name: str
    id: int
    size: int
    nbytes: int
    scale_at: int
    offset_at: int | None
    unpack: codes.Unpack
    sub: SubScales | None = None

    @property
    def scale_bytes(self) -> list[int]:
        """Which bytes of a block hold `d` and `m`, ascending."""
        starts = [self.scale_at, *([] if self.offset_at is None else [self.offset_at])]
        return sorted(byte for start in starts for byte in (start, start + 1))

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of a matrix."""
        return columns // self.size * self.nbytes


_TYPES = (
    BlockType("Q4_0", 2, 32, 18, 0, None, codes.q4_0),
    BlockType("Q4_1", 3, 32, 20, 0, 2, codes.q4_1),
    BlockType("Q5_0", 6, 32, 22, 0, None, codes.q5_0),
    BlockType("Q5_1", 7, 32, 24, 0, 2, codes.q5_1),
    BlockType("Q8_0", 8, 32, 34, 0, None, codes.q8_0),
    BlockType("Q2_K", 10, 256, 84, 80, 82, codes.q2_k, sub_scales.Q2_K),
    BlockType("Q3_K", 11, 256, 110, 108, None, codes.q3_k, sub_scales.Q3_K),
    BlockType("Q4_K", 12, 256, 144, 0, 2, codes.q4_k, sub_scales.Q4_K),
    BlockType("Q5_K", 13, 256, 176, 0, 2, codes.q5_k, sub_scales.Q4_K),
    BlockType("Q6_K", 14, 256, 210, 208, None, codes.q6_k, sub_scales.Q6_K),
    BlockType("IQ2_XXS", 16, 256, 66, 0, None, codes.from_table(16)),
    BlockType("IQ2_XS", 17, 256, 74, 0, None, codes.from_table(17)),
    BlockType("IQ3_XXS", 18, 256, 98, 0, None, codes.from_table(18)),
    BlockType("IQ1_S", 19, 256, 50, 0, None, codes.from_table(19)),
    BlockType("IQ4_NL", 20, 32, 18, 0, None, codes.iq4_nl),
    BlockType("IQ3_S", 21, 256, 110, 0, None, codes.from_table(21)),
    BlockType("IQ2_S", 22, 256, 82, 0, None, codes.from_table(22)),
    BlockType("IQ4_XS", 23, 256, 136, 0, None, codes.iq4_xs, sub_scales.IQ4_XS),
    BlockType("TQ1_0", 34, 256, 54, 52, None, codes.tq1_0),
    BlockType("TQ2_0", 35, 256, 66, 64, None, codes.tq2_0),
)
TYPES: dict[int, BlockType] = {kind.id: kind for kind in _TYPES}  # by number
BY_NAME: dict[str, BlockType] = {kind.name: kind for kind in _TYPES}


def read_half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """A half float of each block as float32, `[n, 1]`."""
    return blocks.view(torch.float16)[:, at // 2, None].float()  # blocks are of even size, `at` is even


def write_half(blocks: torch.Tensor, at: int, values: torch.Tensor) -> None:
    """Writes float32 values `[n, 1]` that are half floats into the blocks."""
    blocks[:, at : at + 2] = values.to(torch.float16).view(torch.uint8)


def scale_codes(
    kind: BlockType,
    blocks: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The weights `S q + M`: computed in float32 and rounded once, as llama.cpp does it.

    Args:
        kind (`BlockType`): The type of the blocks.
        blocks (`torch.Tensor`): uint8 `[n, kind.nbytes]`.
        scales (`torch.Tensor`): `S`, float32 `[n, s]`: one for each of the `s` sub-blocks.
        offsets (`torch.Tensor` or `None`): `M`, float32 `[n, s]`.
        dtype (`torch.dtype`): Of the result.

    Returns:
        `torch.Tensor`: `[n, kind.size]`.
    """
    count = blocks.shape[0]
    step = max(1, count)
    if blocks.device.type == "cpu" and not torch.compiler.is_compiling():
        step = _PART_COLUMNS // kind.size
    if count <= step:
        return _scaled(kind, blocks, scales, offsets).to(dtype)
    weight = torch.empty(count, kind.size, dtype=dtype, device=blocks.device)
    for start in range(0, count, step):
        part = slice(start, start + step)
        weight[part] = _scaled(kind, blocks[part], scales[part], None if offsets is None else offsets[part])
    return weight


def _scaled(kind: BlockType, blocks: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
    unpacked = kind.unpack(blocks)
    weight = unpacked.float().unflatten(1, (scales.shape[1], -1))  # (n, s, g)
    # Types with tables unpack to float32 themselves: their result is theirs to change, too.
    weight = weight.mul_(scales.unsqueeze(-1))
    if offsets is not None:
        weight = weight.add_(offsets.unsqueeze(-1))
    return weight.flatten(1)
