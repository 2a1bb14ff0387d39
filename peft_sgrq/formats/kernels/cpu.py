"""The reduction compiled for CPUs: one pass over its inputs, which plain torch makes three of."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable

import torch

from peft_sgrq.formats.kernels.plain import multiply_and_sum

logger = logging.getLogger(__name__)


def _reduce(product: torch.Tensor, codes: torch.Tensor, group_size: int) -> torch.Tensor:
    return multiply_and_sum(product.float(), codes.float(), group_size)  # one loop: the float32 copies are never made


@functools.cache
def compiled_reduce() -> Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor] | None:
    """The compiled reduction, or `None` where there is no compiler or the environment says not to use it."""
    if os.environ.get("PEFT_SGRQ_COMPILE", "1") == "0":
        return None
    reduce = torch.compile(_reduce, dynamic=True)
    try:
        reduce(torch.ones(2, 8), torch.ones(2, 8), 4)
    except Exception as error:  # no C++ compiler, a broken one, no place to write: plain torch does as well
        logger.info("peft_sgrq computes without compiled code: %s", error)
        return None
    return reduce


def group_reduce(product: torch.Tensor, codes: torch.Tensor, group_size: int) -> torch.Tensor:
    """`multiply_and_sum`, compiled if it can be."""
    reduce = compiled_reduce() or multiply_and_sum
    return reduce(product, codes, group_size)
