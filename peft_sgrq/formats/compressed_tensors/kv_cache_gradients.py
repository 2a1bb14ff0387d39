"""compressed-tensors quantizes keys, values and queries without a gradient; here it passes straight through.

Its `fake_quantize` is under `torch.no_grad()`. Linear layers of an adapted model call it inside a straight-through
function; the modules that quantize what attention works on (`kv_cache_scheme`, attention as a target) call it plainly:
https://github.com/vllm-project/compressed-tensors/blob/main/src/compressed_tensors/modeling/kvcache.py. The key and
value projections then get no gradient, and everything before them a wrong one.
`test_compressed_tensors_still_loses_the_gradient_of_keys_and_values` fails once this is not needed any more.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_CLASSES = {
    "compressed_tensors.modeling.kvcache": "QuantizedKVCache",
    "compressed_tensors.modeling.attention": "QuantizedAttentionImpl",
}


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
    for module_name, class_name in _CLASSES.items():
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
