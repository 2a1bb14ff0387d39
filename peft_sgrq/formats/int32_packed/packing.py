"""Integer codes packed into 32-bit words as one little-endian bit stream: the one place that takes them apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch

WORD = 32


def unpack(packed: torch.Tensor, bits: int, dim: int, order: Sequence[int] | None = None) -> torch.Tensor:
    """All codes of a packed matrix, 32 codes to `bits` words.

    Args:
        packed (`torch.Tensor`): int32 `[W, M]` or `[M, W]`.
        bits (`int`): Bits a code, 1 to 8. Codes of 3, 5, 6 and 7 bits straddle words, and `W` is a multiple of `bits`.
        dim (`int`): The dimension `W` along which codes are packed, 0 or 1.
        order (`Sequence[int]`, *optional*): Position in its word of each code, where that is not its own; only for
            codes that do not straddle words.

    Returns:
        `torch.Tensor`: The codes, int8 (int16 for 8 bits), the size of `dim` being `W * 32 // bits`.
    """
    dtype, mask = _dtype(bits), (1 << bits) - 1
    if WORD % bits == 0:
        shifts = torch.arange(0, WORD, bits, dtype=torch.int32, device=packed.device)
        if order is not None:
            shifts = shifts[torch.tensor(order, device=packed.device)]
        codes = packed.unsqueeze(dim + 1) >> _along(shifts, dim)
        return (codes.to(dtype) & mask).flatten(dim, dim + 1)
    words = packed.unflatten(dim, (-1, bits))
    word, shift = _place(torch.arange(WORD, device=packed.device), bits)
    codes = (words.index_select(dim + 1, word) >> _along(shift, dim)).to(dtype) & mask
    for code in range(WORD):
        first, start = divmod(code * bits, WORD)
        room = WORD - start  # bits of the code that are in its first word
        if room < bits:
            low = (words.select(dim + 1, first) >> start) & ((1 << room) - 1)
            high = words.select(dim + 1, first + 1) << room
            codes.select(dim + 1, code).copy_((low | high) & mask)
    return codes.flatten(dim, dim + 1)


def unpack_rows(packed: torch.Tensor, bits: int, rows: torch.Tensor) -> torch.Tensor:
    """Some codes of a matrix that is packed along dimension 0.

    Args:
        packed (`torch.Tensor`): int32 `[W, M]`.
        bits (`int`): Bits a code, 1 to 8.
        rows (`torch.Tensor`): Which codes of each column of `packed`, int64 `[n]`.

    Returns:
        `torch.Tensor`: The codes, int8 (int16 for 8 bits), `[n, M]`.
    """
    word, shift = _place(rows, bits)
    shift = shift.unsqueeze(1)
    low = packed.index_select(0, word)
    if WORD % bits == 0:
        return (low >> shift).to(_dtype(bits)) & ((1 << bits) - 1)
    high = packed.index_select(0, (word + 1).clamp(max=packed.shape[0] - 1))
    inside = shift + bits <= WORD
    room = torch.where(inside, bits, WORD - shift)  # bits of the code that are in its first word
    codes = ((low >> shift) & ((1 << room) - 1)) | torch.where(inside, 0, high << room)
    return (codes & ((1 << bits) - 1)).to(_dtype(bits))


def _dtype(bits: int) -> torch.dtype:
    # A code less its zero point must fit, too.
    return torch.int16 if bits > 6 else torch.int8


def _place(codes: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    return codes * bits // WORD, (codes * bits % WORD).to(torch.int32)


def _along(values: torch.Tensor, dim: int) -> torch.Tensor:
    return values.view(1, -1, 1) if dim == 0 else values.view(1, 1, -1)
