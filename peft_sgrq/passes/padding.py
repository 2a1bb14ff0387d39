"""Which tokens of a layer's input are padding."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from peft_sgrq.passes.data import Batch


class Padding:
    """Takes padding out of the inputs of the layers of a model.

    In an encoder-decoder the layers of the decoder have tokens of their own, except those of its cross-attention that
    take the encoder's output.

    Args:
        model (`nn.Module`): The model.
    """

    def __init__(self, model: nn.Module) -> None:
        config: Any = getattr(model, "config", None)
        encoder = model.get_encoder() if getattr(config, "is_encoder_decoder", False) else None  # type: ignore[operator]
        self._encoder: Any = encoder
        self._inside = set() if encoder is None else set(encoder.modules())
        self._encoded: list[weakref.ref[torch.Tensor]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While this is open the encoder's output is recognised."""
        with ExitStack() as stack:
            if self._encoder is not None:
                hook = self._encoder.register_forward_hook(lambda module, args, output: self._remember(output[0]))
                stack.callback(hook.remove)
            yield

    def _remember(self, encoded: torch.Tensor) -> None:
        self._encoded = [ref for ref in self._encoded if ref() is not None] + [weakref.ref(encoded)]

    def _is_decoders(self, module: nn.Module, batch: Batch) -> bool:
        return batch.decoder_counted is not None and self._encoder is not None and module not in self._inside

    def counted(self, block: nn.Module, batch: Batch) -> torch.Tensor:
        """Which tokens of a block's hidden states count, bool `[B, T]`: in a decoder with inputs of its own, those."""
        return batch.decoder_counted if self._is_decoders(block, batch) else batch.counted  # type: ignore[return-value]

    def remove(self, x: torch.Tensor, module: nn.Module, batch: Batch) -> torch.Tensor:
        """The tokens of a layer's input that count, `[n, K]`.

        Args:
            x (`torch.Tensor`): `[B, T, K]`, `[T, B, K]` or `[B * T, K]`. In other shapes, such as the tokens sent to
                an expert, padding cannot be told apart, and all count.
            module (`nn.Module`): The layer.
            batch (`Batch`): The batch it is of.
        """
        counted = batch.counted
        if self._is_decoders(module, batch) and not any(ref() is x for ref in self._encoded):
            counted = batch.decoder_counted  # type: ignore[assignment]
        rows = x.reshape(-1, x.shape[-1])
        if rows.shape[0] != counted.numel() or bool(counted.all()):
            return rows
        if x.dim() > 2 and x.shape[:2] != counted.shape and x.shape[:2] == counted.t().shape:
            counted = counted.t()
        return rows[counted.reshape(-1).to(x.device)]
