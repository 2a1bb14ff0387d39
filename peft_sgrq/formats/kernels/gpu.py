"""The reduction as Triton kernels: the product is read once, and codes of 4-bit layers are decoded on the way.

Each program sums some cells. A cell is one row of one selected group: `group_size` numbers of the product that lie
side by side, so that they are read in whole lines.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_TILE = 4096  # numbers of the product a program holds


@triton.jit
def _reduce_kernel(  # type: ignore[no-untyped-def]
    product_ptr, codes_ptr, sums_ptr, cells, group_size, CELLS: tl.constexpr, WIDTH: tl.constexpr
):
    cell = tl.program_id(0).to(tl.int64) * CELLS + tl.arange(0, CELLS)
    column = tl.arange(0, WIDTH)
    inside = (cell < cells)[:, None] & (column < group_size)[None, :]  # (CELLS, WIDTH)
    offsets = cell[:, None] * group_size + column[None, :]
    product = tl.load(product_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    codes = tl.load(codes_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(sums_ptr + cell, tl.sum(product * codes, axis=1), mask=cell < cells)


@triton.jit
def _reduce_4bit_kernel(  # type: ignore[no-untyped-def]
    product_ptr,
    packed_ptr,
    groups_ptr,
    table_ptr,
    sums_ptr,
    cells,
    selected,
    row_bytes,
    CELLS: tl.constexpr,
    HALF: tl.constexpr,
    ALL_GROUPS: tl.constexpr,
):
    cell = tl.program_id(0).to(tl.int64) * CELLS + tl.arange(0, CELLS)
    there = cell < cells
    row, group = cell // selected, cell % selected
    if not ALL_GROUPS:
        group = tl.load(groups_ptr + group, mask=there, other=0)
    byte = tl.arange(0, HALF)
    inside = there[:, None] & (byte >= 0)[None, :]  # (CELLS, HALF)
    packed = tl.load(packed_ptr + (row * row_bytes + group * HALF)[:, None] + byte[None, :], mask=inside, other=0).to(
        tl.int32
    )
    first = cell[:, None] * (2 * HALF) + 2 * byte[None, :]
    even = tl.load(product_ptr + first, mask=inside, other=0.0).to(tl.float32)
    odd = tl.load(product_ptr + first + 1, mask=inside, other=0.0).to(tl.float32)
    terms = even * tl.load(table_ptr + (packed >> 4)) + odd * tl.load(table_ptr + (packed & 15))
    tl.store(sums_ptr + cell, tl.sum(terms, axis=1), mask=there)


def group_reduce(product: torch.Tensor, codes: torch.Tensor, group_size: int) -> torch.Tensor:
    """What `kernels.group_reduce` describes, for groups of any size."""
    product, codes = product.contiguous(), codes.contiguous()
    sums = product.new_empty(product.shape[0], product.shape[1] // group_size, dtype=torch.float32)
    width = triton.next_power_of_2(group_size)
    held = max(1, _TILE // width)
    if sums.numel():
        _reduce_kernel[(triton.cdiv(sums.numel(), held),)](
            product, codes, sums, sums.numel(), group_size, CELLS=held, WIDTH=width
        )
    return sums


def group_reduce_4bit(
    product: torch.Tensor, packed: torch.Tensor, units: torch.Tensor | None, table: torch.Tensor
) -> torch.Tensor:
    """What `kernels.group_reduce_4bit` describes."""
    product, packed = product.contiguous(), packed.contiguous()
    rows, count, half = packed.shape
    selected = count if units is None else units.shape[0]
    sums = product.new_empty(rows, selected, dtype=torch.float32)
    held = max(1, _TILE // (2 * half))
    if sums.numel():
        _reduce_4bit_kernel[(triton.cdiv(sums.numel(), held),)](
            product,
            packed,
            packed if units is None else units,
            table,
            sums,
            sums.numel(),
            selected,
            count * half,
            CELLS=held,
            HALF=half,
            ALL_GROUPS=units is None,
        )
    return sums
