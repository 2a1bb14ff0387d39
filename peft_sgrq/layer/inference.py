"""Inference token by token: all that a layer needs for one token, looked up once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn


def is_one_token(layer: nn.Module, x: torch.Tensor) -> bool:
    """Whether a layer in inference gets one token of each sequence: `[..., 1, K]`."""
    if layer.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return x.dim() > 1 and x.shape[-2] == 1


class Decoder:
    """The forward pass of a layer for one token, valid as long as nothing it was made of changes.

    A token takes so little arithmetic that looking up adapters, scales and codes anew would show. A change is seen in
    the storage of a tensor or in its version counter. A write through `.data`, as averaging callbacks make it, shows
    in neither: deltas count how often they handed it out, and inputs of more than one token, training steps, `train()`
    and `eval()` end a decoder.

    Args:
        run (`Callable`): Takes the input and returns the output.
        state (`tuple`): What is compared as a whole: flags and names.
        sources (`Sequence[torch.Tensor]`): The tensors it was made of.
    """

    __slots__ = ("run", "sources", "state")

    def __init__(
        self,
        run: Callable[[torch.Tensor], torch.Tensor],
        state: tuple[object, ...],
        sources: Sequence[torch.Tensor],
    ) -> None:
        self.run = run
        self.state = state
        self.sources = [(source, *_seen(source)) for source in sources]

    def is_current(self, state: tuple[object, ...], sources: Sequence[torch.Tensor]) -> bool:
        """Whether it may run, given what state and sources are now."""
        if state != self.state or len(sources) != len(self.sources):
            return False
        for now, (then, *seen) in zip(sources, self.sources, strict=True):
            if now is not then or _seen(now) != seen:
                return False
        return True


def _seen(source: torch.Tensor) -> list[int]:
    return [source.data_ptr(), source._version, getattr(source, "times_handed_out", 0)]
