"""`torch.compile(module)` wraps a module and puts `_orig_mod.` into the names of everything within it.

An adapter put on a compiled model would be saved under those names, and fit no other model. `module.compile()`
compiles in place and changes no name. A module that was wrapped is unwrapped and compiled in place, by the same
compiler with the same settings. `tests/adapter/test_wrapped_models.py::test_torch_compile_still_changes_names` fails
once this is not needed any more.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn


def compiled_in_place(model: nn.Module) -> nn.Module:
    """The model without wrappers of `torch.compile`, compiled where they were.

    Args:
        model (`nn.Module`): A model, compiled as a whole or in parts, or not at all; wrapped parts are replaced.
    """
    for parent in list(model.modules()):
        if not _is_wrapper(parent):
            for name, child in list(parent.named_children()):
                if _is_wrapper(child):
                    setattr(parent, name, _unwrapped(child))
    return _unwrapped(model)


def _is_wrapper(module: nn.Module) -> bool:
    # Where PyTorch's compiler was not imported nothing is compiled.
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def _unwrapped(module: Any) -> nn.Module:
    while _is_wrapper(module):
        inner = module._orig_mod
        inner._compiled_call_impl = module.dynamo_ctx(inner._call_impl)  # what `nn.Module.compile` does
        module = inner
    return module
