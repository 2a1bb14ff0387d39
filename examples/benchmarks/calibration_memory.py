"""The memory of the tensors that are made while something runs."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class PeakMemory(TorchDispatchMode):
    """The most bytes that the tensors made while it is open took at once.

    Each result of an operation counts until its storage is freed, so what the allocator keeps does not blur it. The
    model's own tensors do not count, views of them neither.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.peak = self.now = 0
        own = (tensor for tensors in (model.parameters(), model.buffers()) for tensor in tensors)
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in own}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._sizes:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        self._sizes[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, storage._cdata)

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
