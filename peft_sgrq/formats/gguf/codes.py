"""The codes of a GGUF block, unpacked: integers in the order of the columns, scales not applied.

Layouts are those of `ggml-common.h` and `ggml-quants.c` of llama.cpp (https://github.com/ggml-org/llama.cpp). Blocks
are uint8 `[n, bytes]`; codes are `[n, columns]`, int8 or uint8, or float32 where a table holds fractions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Unpack = Callable[[torch.Tensor], torch.Tensor]

_IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_TABLES: dict[torch.device, torch.Tensor] = {}


def _fields(packed: torch.Tensor, width: int, bits: int, fields: int | None = None) -> torch.Tensor:
    """Small fields of bytes, `[n, k * width]` to `[n, k * fields * width]`: of `width` bytes the low fields first."""
    fields = 8 // bits if fields is None else fields
    runs = packed.unflatten(1, (-1, width))  # (n, k, width)
    out = packed.new_empty(packed.shape[0], runs.shape[1], fields, width)
    for field in range(fields):
        torch.bitwise_right_shift(runs, bits * field, out=out[:, :, field])
    return out.flatten(1).bitwise_and_((1 << bits) - 1)


def _bits(packed: torch.Tensor) -> torch.Tensor:
    """The bits of bytes, the lowest first, `[n, k]` to `[n, 8 k]`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & 1).flatten(1)


def _signed(codes: torch.Tensor, zero: int) -> torch.Tensor:
    return codes.view(torch.int8).sub_(zero)


def _levels(nibbles: torch.Tensor) -> torch.Tensor:
    table = _TABLES.get(nibbles.device)
    if table is None:
        table = _TABLES[nibbles.device] = torch.tensor(_IQ4_LEVELS, dtype=torch.int8, device=nibbles.device)
    return table[nibbles.int()]


# 32 columns


def q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return _signed(_fields(blocks[:, 2:18], 16, 4), 8)


def q4_1(blocks: torch.Tensor) -> torch.Tensor:
    return _fields(blocks[:, 4:20], 16, 4)


def q5_0(blocks: torch.Tensor) -> torch.Tensor:
    return _signed(_fields(blocks[:, 6:22], 16, 4).bitwise_or_(_bits(blocks[:, 2:6]) << 4), 16)


def q5_1(blocks: torch.Tensor) -> torch.Tensor:
    return _fields(blocks[:, 8:24], 16, 4).bitwise_or_(_bits(blocks[:, 4:8]) << 4)


def q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return blocks[:, 2:34].view(torch.int8)


def iq4_nl(blocks: torch.Tensor) -> torch.Tensor:
    return _levels(_fields(blocks[:, 2:18], 16, 4))


# 256 columns


def q2_k(blocks: torch.Tensor) -> torch.Tensor:
    return _fields(blocks[:, 16:80], 32, 2)


def q3_k(blocks: torch.Tensor) -> torch.Tensor:
    high = _fields(blocks[:, :32], 32, 1)  # set where 4 is not taken away
    return _signed(_fields(blocks[:, 32:96], 32, 2).bitwise_or_(high << 2), 4)


def q4_k(blocks: torch.Tensor) -> torch.Tensor:
    return _fields(blocks[:, 16:144], 32, 4)


def q5_k(blocks: torch.Tensor) -> torch.Tensor:
    return _fields(blocks[:, 48:176], 32, 4).bitwise_or_(_fields(blocks[:, 16:48], 32, 1) << 4)


def q6_k(blocks: torch.Tensor) -> torch.Tensor:
    high = _fields(blocks[:, 128:192], 32, 2)
    return _signed(_fields(blocks[:, :128], 64, 4).bitwise_or_(high << 4), 32)


def iq4_xs(blocks: torch.Tensor) -> torch.Tensor:
    return _levels(_fields(blocks[:, 8:136], 16, 4))


def tq1_0(blocks: torch.Tensor) -> torch.Tensor:
    # Five base-3 digits a byte; a digit is what multiplying by 3 carries out of eight bits.
    powers = (1, 3, 9, 27, 81)
    runs = (blocks[:, :32], powers), (blocks[:, 32:48], powers), (blocks[:, 48:52], powers[:4])
    shifted = torch.cat([run * power for run, digits in runs for power in digits], 1)  # (n, 256), modulo 256
    return ((shifted.short() * 3) >> 8).to(torch.int8).sub_(1)


def tq2_0(blocks: torch.Tensor) -> torch.Tensor:
    return _signed(_fields(blocks[:, :64], 32, 2), 1)


def from_table(ggml_type: int) -> Unpack:
    """The codes of the IQ1, IQ2 and IQ3 types, float32: points of a grid, with their signs and sub-scales.

    transformers has the grids; the codes are what it makes of a block whose scale is one.
    """

    def unpack(blocks: torch.Tensor) -> torch.Tensor:
        from transformers.integrations.gguf.dequant import dequantize

        blocks = blocks.clone()
        blocks[:, :2] = torch.tensor([0x00, 0x3C], dtype=torch.uint8)  # 1.0 in half precision, little-endian
        return dequantize(blocks, ggml_type, torch.float32).view(blocks.shape[0], -1)

    return unpack
