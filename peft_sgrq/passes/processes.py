"""Several processes calibrate on parts of the data: what they found is summed, and all of them go on alike."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import distributed

T = TypeVar("T")


def process_count() -> int:
    """How many processes there are; 1 without `torch.distributed`."""
    return distributed.get_world_size() if _running() else 1


def process_index() -> int:
    """Which of them this is."""
    return distributed.get_rank() if _running() else 0


def _running() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def sum_over_processes(tensors: Iterable[torch.Tensor]) -> None:
    """Adds up each tensor over all processes, in place; the same bits on each."""
    if process_count() > 1:
        for tensor in tensors:
            distributed.all_reduce(tensor)


def gather(value: T) -> list[T]:
    """The values of all processes, in their order."""
    if process_count() == 1:
        return [value]
    values: list[T | None] = [None] * process_count()
    distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]
