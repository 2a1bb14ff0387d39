"""What modules were called with and returned, kept for as long as a context is open."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass
class Call:
    """The first tensor a module was called with, and what it returned."""

    x: torch.Tensor
    y: torch.Tensor


@contextmanager
def recorded_calls(model: nn.Module, wanted: Callable[[str, nn.Module], bool]) -> Iterator[dict[str, list[Call]]]:
    """While this is open, inputs and outputs of modules are kept, by name; those called several times have several."""
    calls: dict[str, list[Call]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = args[0] if args else kwargs.get("hidden_states", kwargs.get("input"))
            y = output[0] if isinstance(output, (tuple, list)) else output
            if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
                calls.setdefault(name, []).append(Call(x, y))

        return hook

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if wanted(name, module):
                stack.callback(module.register_forward_hook(keep(name), with_kwargs=True).remove)
        yield calls


def same_tensor(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are views of the same numbers, all of them."""
    return (
        one.numel() == other.numel()
        and one.data_ptr() == other.data_ptr()
        and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    )
