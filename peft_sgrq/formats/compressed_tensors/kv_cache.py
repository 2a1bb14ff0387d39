"""What compressed-tensors' quantized KV caches lack: a gradient, and copies that are whole.

Its `fake_quantize` is under `torch.no_grad()`. Linear layers of an adapted model call it inside a straight-through
function; the modules that quantize what attention works on (`kv_cache_scheme`, attention as a target) call it plainly:
https://github.com/vllm-project/compressed-tensors/blob/main/src/compressed_tensors/modeling/kvcache.py. The key and
value projections then get no gradient, and everything before them a wrong one.
`test_compressed_tensors_still_loses_the_gradient_of_keys_and_values` fails once this is not needed any more.

A `QuantizedKVCache` knows its attention module by a weak reference, which `copy.deepcopy` keeps as it is: copies of a
model ask the original how to round, and round nothing when that is gone.
`test_compressed_tensors_still_ties_copies_of_caches_to_the_original` fails once this is not needed any more.
"""

from __future__ import annotations

import copy
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_CACHE = ("compressed_tensors.modeling.kvcache", "QuantizedKVCache")
_CLASSES = (_CACHE, ("compressed_tensors.modeling.attention", "QuantizedAttentionImpl"))


class StraightThrough(torch.autograd.Function):
    """Applies a function that rounds; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, fn: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return fn(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


def pass_gradients(model: nn.Module) -> None:
    """Lets the gradient pass where compressed-tensors quantizes keys, values and queries; the values stay.

    The forward pass of such a module is bound to it anew: the library's own code, which finds a `forward_quantize`
    that is straight-through.

    Args:
        model (`nn.Module`): The model; modules of other libraries are left alone.
    """
    for module_name, class_name in _CLASSES:
        library: Any = sys.modules.get(module_name)
        if library is None:
            continue
        cls, quantize = getattr(library, class_name), library.forward_quantize

        def forward_quantize(module: Any, x: Any, *args: Any, _quantize: Any = quantize) -> Any:
            return StraightThrough.apply(x, lambda values: _quantize(module, values, *args))

        own = cls.forward
        names = {**own.__globals__, "forward_quantize": forward_quantize}
        forward = types.FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
        forward.__kwdefaults__ = own.__kwdefaults__
        for module in model.modules():
            if type(module) is cls and "forward" not in module.__dict__:
                module.forward = types.MethodType(forward, module)


def let_caches_be_copied(model: nn.Module) -> None:
    """Has copies of the quantized caches of a model belong to the copies of their attention modules."""
    library = sys.modules.get(_CACHE[0])
    if library is not None:
        for module in model.modules():
            if type(module) is getattr(library, _CACHE[1]):
                module.__deepcopy__ = types.MethodType(_copy, module)  # type: ignore[assignment]


def _copy(self: Any, memo: dict[int, Any]) -> Any:
    copied: Any = object.__new__(type(self))
    memo[id(self)] = copied
    kept = {key: value for key, value in self.__dict__.items() if key != "__deepcopy__"}
    copied.__dict__.update(copy.deepcopy(kept, memo))
    attention = memo.get(id(self.attn_module()))
    if attention is not None:  # it is copied, too
        copied.__dict__["attn_module"] = weakref.ref(attention)
    copied.__dict__["__deepcopy__"] = types.MethodType(_copy, copied)
    return copied
