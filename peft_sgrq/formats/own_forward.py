"""Whose forward pass a module has, and calling a module with another one in place of its own.

An adapter computes in place of a layer's own forward pass, so that must be the one the format's library wrote: a class
derived from it, or a function put onto the module, may compute something else. What surrounds a forward pass, hooks of
torch and of accelerate, is called as around the layer's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

_MISSING = object()


def forward_obstacle(module: nn.Module, known: type[nn.Module]) -> str | None:
    """Why a module does not compute as a class does, as a clause; `None` if it does.

    Args:
        module (`nn.Module`): A layer, an instance of the class.
        known (`type`): The class whose forward pass a scaled weight stands for.
    """
    cls = type(module)
    name = f"{cls.__module__}.{cls.__qualname__}"
    if any(getattr(cls, method) is not getattr(known, method) for method in ("forward", "__call__", "_call_impl")):
        return (
            f"its class {name} has a forward pass of its own, which need not be that of {known.__qualname__}, "
            f"expected a plain {known.__qualname__}; leave it out with `exclude_modules`"
        )
    home = _defined_in(inspect.unwrap(known.forward))
    if home not in (known.__module__.partition(".")[0], "torch"):  # torch compiles some
        return (
            f"the forward pass of {known.__qualname__} was replaced by one of {home or 'unknown origin'}, which an "
            "adapter would pass by, expected that of its library; put the replacement off until the adapter is "
            "merged, or use hooks, which are called"
        )
    own = _own_function(module)
    if own is None or own is known.forward or _defined_in(own) in ("compressed_tensors", "peft_sgrq"):
        return None
    return (
        f"a forward function was put onto it ({getattr(own, '__qualname__', own)!s}), which an adapter would pass by, "
        f"expected that of {known.__qualname__}; use hooks, which are called, or leave the layer out with "
        "`exclude_modules`"
    )


def computed_weight(module: nn.Module) -> str | None:
    """Why the weight of a dense layer is no parameter of it, as a clause; `None` if it is one."""
    if module._parameters.get("weight") is not None:
        return None
    return (
        "its weight is no parameter but computed at each forward pass (a parametrization, weight_norm, pruning), "
        "expected an nn.Parameter; make it one, e.g. with torch.nn.utils.parametrize.remove_parametrizations, or "
        "leave the layer out with `exclude_modules`"
    )


def _own_function(module: nn.Module) -> Any:
    """The function somebody put onto the module as its forward pass; what accelerate does to it is looked through."""
    own = module.__dict__.get("forward")
    if own is not None and "_hf_hook" in module.__dict__:
        own = module.__dict__.get("_old_forward", own)
    return getattr(own, "__func__", own)


def _defined_in(function: Any) -> str:
    names = getattr(function, "__globals__", {})
    return str(names.get("__name__", "")).partition(".")[0]


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module is more than its forward pass; hooks of this package surround the layer's own alone."""
    spaces = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if any(spaces) and any(_defined_in(hook) != "peft_sgrq" for hooks in spaces for hook in hooks.values()):
        return True
    return bool(_has_any_global_hook())


def call_as(module: nn.Module, forward: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    """What a module returns when called with a forward pass that is not its own: its hooks are called around that."""
    forward = within_accelerate(module, forward)
    if not has_hooks(module):
        return forward(*args, **kwargs)
    return _call_with_hooks(module, forward, *args, **kwargs)


@torch.compiler.disable  # a function that is put onto a module for a while cannot be traced
def _call_with_hooks(
    module: nn.Module, forward: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
) -> torch.Tensor:
    with forward_replaced(module, forward):
        return nn.Module._call_impl(module, *args, **kwargs)


def within_accelerate(module: nn.Module, forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A forward pass with the module's accelerate hook (offloading, device maps), which wraps the module's own."""
    hook = module.__dict__.get("_hf_hook")
    if hook is None:
        return forward

    def hooked(*args: Any, **kwargs: Any) -> torch.Tensor:
        args, kwargs = hook.pre_forward(module, *args, **kwargs)
        with torch.no_grad() if hook.no_grad else nullcontext():
            y = forward(*args, **kwargs)
        return hook.post_forward(module, y)

    return hooked


@contextmanager
def forward_replaced(module: nn.Module, forward: Any) -> Iterator[None]:
    """While this is open a module computes with another forward function."""
    own = module.__dict__.get("forward", _MISSING)  # accelerate puts one there
    module.forward = forward
    try:
        yield
    finally:
        if own is _MISSING:
            del module.forward
        else:
            module.forward = own
