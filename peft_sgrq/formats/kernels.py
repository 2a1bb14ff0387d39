"""The reduction of the backward pass: a product times codes, added up by group, three passes in plain torch.

`torch.compile` makes one of them, for CPUs and GPUs, where a compiler is there and the product is large enough to pay.
Set `PEFT_SGRQ_COMPILE=0` to have plain torch.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable

import torch

logger = logging.getLogger(__name__)

_COMPILED_ON = ("cpu", "cuda")
_WORTH_COMPILING = 1 << 18  # numbers; below, a call costs less than looking up the compiled code


def group_reduce(product: torch.Tensor, codes: torch.Tensor, group_size: int) -> torch.Tensor:
    """Sums `product * codes` over the columns of each group, in float32.

    Args:
        product (`torch.Tensor`): `dy^T x` at the selected columns, `[N, n * group_size]`.
        codes (`torch.Tensor`): Unit-scale values at the same columns, same shape and dtype.
        group_size (`int`): Columns per group.

    Returns:
        `torch.Tensor`: float32 `[N, n]`.
    """
    reduce = None
    if not torch.compiler.is_compiling() and product.numel() >= _WORTH_COMPILING:  # else the compiler makes one loop
        reduce = compiled_reduce(product.device.type)
    return (reduce or multiply_and_sum)(product, codes, group_size)


def multiply_and_sum(product: torch.Tensor, codes: torch.Tensor, group_size: int) -> torch.Tensor:
    """The reduction in plain torch: what the compiled one is held against."""
    terms = (product * codes).view(product.shape[0], -1, group_size)  # (N, n, g)
    return terms.sum(-1, dtype=torch.float32)


def _reduce(product: torch.Tensor, codes: torch.Tensor, group_size: int) -> torch.Tensor:
    return multiply_and_sum(product.float(), codes.float(), group_size)  # one loop: the float32 copies are never made


@functools.cache
def compiled_reduce(device: str) -> Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor] | None:
    """The compiled reduction, or `None` where there is no compiler or the environment says not to use it."""
    if device not in _COMPILED_ON or os.environ.get("PEFT_SGRQ_COMPILE", "1") == "0":
        return None
    reduce = torch.compile(_reduce, dynamic=True)
    try:
        reduce(torch.ones(2, 8, device=device), torch.ones(2, 8, device=device), 4)
    except Exception as error:  # no compiler, a broken one, no place to write: plain torch does as well
        logger.info("peft_sgrq computes without compiled code: %s", error)
        return None
    return reduce
