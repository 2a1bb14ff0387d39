"""Where K-quants keep the small integers that scale their sub-blocks, read and written.

A super-block of 256 columns is `W = d * scale[j] * q - dmin * minimum[j]` with a scale (and a minimum) for each
sub-block `j` of 16 or 32 columns. Layouts are those of `ggml-quants.c` of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch


class Sub(NamedTuple):
    """Scales and minimums of the sub-blocks, integers `[n, sub-blocks]`; `None` where a type has no minimums."""

    scales: torch.Tensor
    minimums: torch.Tensor | None


class SubScales(NamedTuple):
    """How a block type stores them.

    Attributes:
        size (`int`): Columns of a sub-block.
        lowest, highest (`int`): The range of a scale; minimums go from 0 to `highest`.
        at (`slice`): The bytes of the block they are in.
        read (`Callable`): Reads them from those bytes, uint8 `[n, bytes]`.
        write (`Callable`): Makes those bytes.
    """

    size: int
    lowest: int
    highest: int
    at: slice
    read: Callable[[torch.Tensor], Sub]
    write: Callable[[Sub], torch.Tensor]


def _read_q2_k(packed: torch.Tensor) -> Sub:
    return Sub(packed & 15, packed >> 4)


def _write_q2_k(sub: Sub) -> torch.Tensor:
    minimums = cast(torch.Tensor, sub.minimums)
    return (sub.scales | (minimums << 4)).to(torch.uint8)


def _read_q3_k(packed: torch.Tensor) -> Sub:
    low = torch.cat([packed[:, :8] & 15, packed[:, :8] >> 4], 1)
    high = torch.cat([(packed[:, 8:] >> shift) & 3 for shift in (0, 2, 4, 6)], 1)
    return Sub((low | (high << 4)).view(torch.int8) - 32, None)


def _write_q3_k(sub: Sub) -> torch.Tensor:
    raw = sub.scales + 32  # (n, 16)
    low = (raw[:, :8] & 15) | ((raw[:, 8:] & 15) << 4)
    high = raw >> 4
    packed = high[:, :4] | (high[:, 4:8] << 2) | (high[:, 8:12] << 4) | (high[:, 12:] << 6)
    return torch.cat([low, packed], 1).to(torch.uint8)


def _read_q4_k(packed: torch.Tensor) -> Sub:
    words = packed.view(torch.int32).t().contiguous()  # (3, n): four bytes at a time, blocks are multiples of that
    first, rest = words[:2], words[2]
    low = torch.stack([rest & 0x0F0F0F0F, (rest >> 4) & 0x0F0F0F0F])
    both = torch.stack([first & 0x3F3F3F3F, low | ((first >> 2) & 0x30303030)], 2).view(torch.uint8)  # (2, n, 8)
    return Sub(both[0], both[1])


def _write_q4_k(sub: Sub) -> torch.Tensor:
    scales, minimums = sub.scales, cast(torch.Tensor, sub.minimums)  # (n, 8)
    first = scales[:, :4] | ((scales[:, 4:] >> 4) << 6)
    second = minimums[:, :4] | ((minimums[:, 4:] >> 4) << 6)
    rest = (scales[:, 4:] & 15) | ((minimums[:, 4:] & 15) << 4)
    return torch.cat([first, second, rest], 1).to(torch.uint8)


def _read_q6_k(packed: torch.Tensor) -> Sub:
    return Sub(packed.view(torch.int8), None)


def _write_q6_k(sub: Sub) -> torch.Tensor:
    return sub.scales.to(torch.int8).view(torch.uint8)


def _read_iq4_xs(packed: torch.Tensor) -> Sub:
    low = torch.stack([packed[:, 2:] & 15, packed[:, 2:] >> 4], -1).flatten(1)  # (n, 8)
    high = torch.cat([(packed[:, byte, None] >> shift) & 3 for byte in (0, 1) for shift in (0, 2, 4, 6)], 1)
    return Sub((low | (high << 4)).view(torch.int8) - 32, None)


def _write_iq4_xs(sub: Sub) -> torch.Tensor:
    raw = sub.scales + 32  # (n, 8)
    pairs = raw.unflatten(1, (4, 2)) & 15
    high = (raw >> 4).unflatten(1, (2, 4))
    packed = high[..., 0] | (high[..., 1] << 2) | (high[..., 2] << 4) | (high[..., 3] << 6)
    return torch.cat([packed, pairs[..., 0] | (pairs[..., 1] << 4)], 1).to(torch.uint8)


Q2_K = SubScales(16, 0, 15, slice(0, 16), _read_q2_k, _write_q2_k)
Q3_K = SubScales(16, -32, 31, slice(96, 108), _read_q3_k, _write_q3_k)
Q4_K = SubScales(32, 0, 63, slice(4, 16), _read_q4_k, _write_q4_k)
Q6_K = SubScales(16, -128, 127, slice(192, 208), _read_q6_k, _write_q6_k)
IQ4_XS = SubScales(32, -32, 31, slice(2, 8), _read_iq4_xs, _write_iq4_xs)
