"""A model is run to look at it, and is afterwards what it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Puts the model in eval mode without a cache, and everything back at the end, also when interrupted.

    Restored are the modes of all modules, what forward passes put on them (attributes, and buffers put in place of
    others), the hooks of forward passes, `use_cache` of the configs, and the state of the random number generators of
    torch, numpy and Python. Each is put back by itself, and only where it differs. Parameters and gradients are not
    written to by what runs inside. Of adapters, which may be trained inside, only the modes are restored.
    """
    modules = list(model.modules())
    adapters = _parts_of_adapters(modules)
    modes = [module.training for module in modules]
    kept = [(space, dict(space)) for module in modules if module not in adapters for space in _spaces(module)]
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
        for space, before in kept:
            _put_back(space, before)
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for config, use_cache in caches:
            config.use_cache = use_cache
        random.setstate(python_state)
        np.random.set_state(numpy_state)


_SPACES = (
    "_buffers",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
)


def _spaces(module: nn.Module) -> list[dict[str, Any]]:
    """The dicts of a module that a forward pass may write to: its attributes, and those of `_SPACES`."""
    return [module.__dict__, *(space for name in _SPACES if isinstance(space := module.__dict__.get(name), dict))]


def _put_back(space: dict[str, Any], before: dict[str, Any]) -> None:
    for name in [name for name in space if name not in before]:
        del space[name]
    for name, value in before.items():
        if name not in space or space[name] is not value:
            space[name] = value


def _parts_of_adapters(modules: list[nn.Module]) -> set[nn.Module]:
    """Layers with adapters and what they add to their base layers, which are not among them."""
    found: set[nn.Module] = set()
    for layer in modules:
        if isinstance(layer, BaseTunerLayer):
            parts = [getattr(layer, name, None) for name in layer.adapter_layer_names]
            found |= {layer, *(part for own in parts if isinstance(own, nn.Module) for part in own.modules())}
    return found


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
