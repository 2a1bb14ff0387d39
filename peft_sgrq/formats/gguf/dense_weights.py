"""Keeping dequantized weights while a model generates: as fast as a dense model, in a dense model's memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from peft_sgrq.formats.gguf.layers import GGUFLinear, GGUFTiedHead


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
    layers = [module for module in model.modules() if isinstance(module, (GGUFLinear, GGUFTiedHead))]
    before = [layer.dense.kept for layer in layers]
    for layer in layers:
        layer.dense.kept = True
    try:
        yield
    finally:
        for layer, kept in zip(layers, before, strict=True):
            layer.dense.kept = kept
            layer.dense.clear()
