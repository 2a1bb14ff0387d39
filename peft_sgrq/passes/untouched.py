"""A model is run to look at it, and is afterwards what it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Puts the model in eval mode without a cache, and everything back at the end, also when interrupted.

    Restored are the attributes of all modules (mode, replaced `forward`s, what a forward pass remembers in them), the
    hooks of forward and backward passes, `use_cache` of the configs, and the state of the random number generators of
    torch, numpy and Python. Parameters, gradients and buffers are not written to by what runs inside.
    """
    modules = list(model.modules())
    attributes = [dict(module.__dict__) for module in modules]
    hooks = [{name: dict(getattr(module, name)) for name in _HOOKS} for module in modules]
    caches = [(config, config.use_cache) for config in _configs(modules)]
    devices = sorted({tensor.device.index for tensor in model.parameters() if tensor.device.type == "cuda"})
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            for config, _ in caches:
                config.use_cache = False
            model.eval()
            yield
    finally:
        for module, before, hooked in zip(modules, attributes, hooks, strict=True):
            module.__dict__.clear()
            module.__dict__.update(before)
            for name, registered in hooked.items():
                found = getattr(module, name)
                if dict(found) != registered:
                    found.clear()
                    found.update(registered)
        for config, use_cache in caches:
            config.use_cache = use_cache
        random.setstate(python_state)
        np.random.set_state(numpy_state)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")


def _configs(modules: list[nn.Module]) -> list[Any]:
    found: list[Any] = []
    for module in modules:
        config: Any = getattr(module, "config", None)
        if config is None:
            continue
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        for one in (config, text):
            if hasattr(one, "use_cache") and not any(one is known for known in found):
                found.append(one)
    return found
