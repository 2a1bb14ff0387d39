"""Which tokens of a layer's input are padding."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from peft_sgrq.passes.data import Batch


class Padding:
    """Takes padding out of the inputs of the layers of a model.

    In an encoder-decoder the layers of the decoder have tokens of their own, but those of its cross-attention that
    take what the encoder returned have the encoder's.

    Args:
        model (`nn.Module`): The model.
    """

    def __init__(self, model: nn.Module) -> None:
        config: Any = getattr(model, "config", None)
        encoder = model.get_encoder() if getattr(config, "is_encoder_decoder", False) else None  # type: ignore[operator]
        self._encoder: Any = encoder
        self._inside = set() if encoder is None else set(encoder.modules())
        self._encoded: dict[int, weakref.ref[torch.Tensor]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While this is open what the encoder returns is recognised."""
        if self._encoder is None:
            yield
            return
        handle = self._encoder.register_forward_hook(lambda module, args, output: self._remember(output[0]))
        try:
            yield
        finally:
            handle.remove()

    def _remember(self, encoded: torch.Tensor) -> None:
        self._encoded = {key: ref for key, ref in self._encoded.items() if ref() is not None}
        self._encoded[id(encoded)] = weakref.ref(encoded)

    def counted(self, block: nn.Module, batch: Batch) -> torch.Tensor:
        """Which tokens of a block's hidden states count, bool `[B, T]`: in a decoder with inputs of its own, those."""
        if batch.decoder_counted is None or self._encoder is None or block in self._inside:
            return batch.counted
        return batch.decoder_counted

    def remove(self, x: torch.Tensor, module: nn.Module, batch: Batch) -> torch.Tensor:
        """The tokens of a layer's input that count, `[n, K]`.

        Args:
            x (`torch.Tensor`): `[B, T, K]`, `[T, B, K]` or `[B * T, K]`. Of other tokens (those sent to an expert,
                say) it cannot be told which are padding, and all count.
            module (`nn.Module`): The layer.
            batch (`Batch`): The batch it is of.
        """
        counted = batch.counted
        if batch.decoder_counted is not None and self._encoder is not None and module not in self._inside:
            ref = self._encoded.get(id(x))
            if ref is None or ref() is not x:
                counted = batch.decoder_counted
        rows = x.reshape(-1, x.shape[-1])
        if rows.shape[0] != counted.numel() or bool(counted.all()):
            return rows
        if x.dim() > 2 and x.shape[:2] != counted.shape and x.shape[:2] == counted.t().shape:
            counted = counted.t()
        return rows[counted.reshape(-1).to(x.device)]
