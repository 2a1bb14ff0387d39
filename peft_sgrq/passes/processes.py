"""Several processes work on parts of the data: what they found is summed, and all of them go on alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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
            whole = tensor.contiguous()  # a transposed one would be added to others element by element in memory
            distributed.all_reduce(whole)
            if whole is not tensor:
                tensor.copy_(whole)


def copy_from_first(tensors: Iterable[torch.Tensor]) -> None:
    """Gives each contiguous tensor the values it has on the first process, in place."""
    if process_count() > 1:
        for tensor in tensors:
            distributed.broadcast(tensor, 0)


def from_first(value: T) -> T:
    """The value of the first process."""
    values = [value]
    if process_count() > 1:
        distributed.broadcast_object_list(values, 0)
    return values[0]


def gather(value: T) -> list[T]:
    """The values of all processes, in their order, so that sums of them have the same bits on each."""
    if process_count() == 1:
        return [value]
    values: list[T | None] = [None] * process_count()
    distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]


@contextmanager
def together() -> Iterator[None]:
    """A ValueError or OSError that is raised inside of this on any process is raised at its end on all of them.

    Inside of it no process may wait for the others.
    """
    error: ValueError | OSError | None = None
    try:
        yield
    except (ValueError, OSError) as raised:
        error = raised
    found = gather(None if error is None else (OSError if isinstance(error, OSError) else ValueError, str(error)))
    if error is not None:
        raise error
    for of_another in found:
        if of_another is not None:
            kind, text = of_another
            raise kind(text)
