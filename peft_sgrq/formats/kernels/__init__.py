"""Reductions of the backward pass, used by the scaled weights alone: a Triton kernel on GPUs, compiled code on CPUs.

`group_reduce` picks by device and size. Set `PEFT_SGRQ_COMPILE=0` to have plain torch on CPUs.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch

from peft_sgrq.formats.kernels import cpu
from peft_sgrq.formats.kernels.plain import multiply_and_sum

_WORTH_COMPILING = 1 << 18  # numbers; below, a call costs less than looking up the compiled code


@functools.cache
def _gpu() -> ModuleType | None:
    # Triton comes with torch where torch was built for GPUs, and takes a while to import.
    try:
        from peft_sgrq.formats.kernels import gpu
    except ImportError:
        return None
    return gpu


def group_reduce(product: torch.Tensor, codes: torch.Tensor, group_size: int) -> torch.Tensor:
    """Sums `product * codes` over the columns of each group, in float32.

    Args:
        product (`torch.Tensor`): `dy^T x` at the selected columns, `[N, n * group_size]`.
        codes (`torch.Tensor`): Unit-scale values at the same columns, same shape and dtype.
        group_size (`int`): Columns per group.

    Returns:
        `torch.Tensor`: float32 `[N, n]`.
    """
    if torch.compiler.is_compiling():  # the compiler makes one loop of it
        return multiply_and_sum(product, codes, group_size)
    if product.is_cuda and (gpu := _gpu()) is not None:
        return gpu.group_reduce(product, codes, group_size)
    if product.device.type == "cpu" and product.numel() >= _WORTH_COMPILING:
        return cpu.group_reduce(product, codes, group_size)
    return multiply_and_sum(product, codes, group_size)


def decodes_4bit(product: torch.Tensor) -> bool:
    """Whether `group_reduce_4bit` is there for a product on this device; the compiler fuses plain torch by itself."""
    return product.is_cuda and not torch.compiler.is_compiling() and _gpu() is not None


def group_reduce_4bit(
    product: torch.Tensor, packed: torch.Tensor, units: torch.Tensor | None, table: torch.Tensor
) -> torch.Tensor:
    """`group_reduce` for codes packed two to a byte, decoded on the way; only where `decodes_4bit` says so.

    Args:
        product (`torch.Tensor`): `dy^T x` at the selected columns, `[N, n * group_size]`; the group size is a power of
            two.
        packed (`torch.Tensor`): Codes of all groups, uint8 `[N, G, group_size / 2]`, the high half of a byte first.
        units (`torch.Tensor` or `None`): The selected groups, int64 `[n]`; `None` for all.
        table (`torch.Tensor`): The value of each code, float32 `[16]`.

    Returns:
        `torch.Tensor`: float32 `[N, n]`.
    """
    gpu = _gpu()
    if gpu is None:
        raise RuntimeError("Triton was not found, expected it where `decodes_4bit` is true; install triton.")
    return gpu.group_reduce_4bit(product, packed, units, table)
