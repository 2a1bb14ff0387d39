"""Keeping dequantized weights while a model generates: as fast as a dense model, in a dense model's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class DenseWeight:
    """A weight that is kept dequantized for as long as the tensors it was made of are the same.

    Attributes:
        kept (`bool`): Whether it is kept.
    """

    def __init__(self) -> None:
        self.kept = False
        self.clear()

    def clear(self) -> None:
        """Drops it."""
        self._weight: torch.Tensor | None = None
        self._made_of: tuple[Any, ...] = ()

    def get(
        self, made_of: Sequence[torch.Tensor], dtype: torch.dtype, make: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """The weight in a dtype, made anew if a tensor has changed, which its storage or its version counter shows."""
        state = [(tensor, tensor.data_ptr(), None if tensor.is_inference() else tensor._version) for tensor in made_of]
        known = len(state) == len(self._made_of) and all(
            now[0] is then[0] and now[1:] == then[1:] for now, then in zip(state, self._made_of, strict=True)
        )
        if self._weight is None or self._weight.dtype != dtype or not known:
            self._weight, self._made_of = make(), tuple(state)
        return self._weight

    def __deepcopy__(self, memo: Any) -> DenseWeight:
        return DenseWeight()

    def __reduce__(self) -> tuple[Any, ...]:
        return DenseWeight, ()


@contextmanager
def keep_dense(model: nn.Module) -> Iterator[None]:
    """While this is open, packed layers keep their weights dequantized where no gradient is asked for.

    Otherwise a layer dequantizes its weight for each token, which takes many times as long as multiplying by it. The
    model takes the memory of one that is not quantized then. Changes of scales, by training or another adapter, are
    seen. Weights are dropped when it closes.

    Args:
        model (`nn.Module`): A model that `load_gguf` loaded, with adapters or without.

    Example:
        ```py
        >>> with peft_sgrq.keep_dense(model):
        ...     model.generate(**inputs)
        ```
    """
    found: Any = (getattr(module, "dense", None) for module in model.modules())
    weights = [(dense, dense.kept) for dense in found if isinstance(dense, DenseWeight)]
    for dense, _ in weights:
        dense.kept = True
    try:
        yield
    finally:
        for dense, kept in weights:
            dense.kept = kept
            dense.clear()
