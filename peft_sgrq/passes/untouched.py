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

    Restored are the modes of all modules, what forward passes put on them (attributes, and parts and buffers put in
    place of others), the hooks of forward passes, `use_cache` of the configs, and the state of the random number
    generators of torch, numpy and Python. Each is put back by itself, and only where it differs. Parameters and
    gradients are not written to by what runs inside. Of adapters, which may be trained inside, only the modes are
    restored.
    """
    modules = list(model.modules())
    adapters = _parts_of_adapters(modules)
    modes = [module.training for module in modules]
    kept = [space for module in modules if module not in adapters for space in kept_spaces(module)]
    configs = {id(one): one for module in modules for one in configs_of(module) if hasattr(one, "use_cache")}
    caches = [(config, config.use_cache) for config in configs.values()]
    devices = sorted({tensor.device.index for tensor in model.parameters() if tensor.device.type == "cuda"})
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            for config, _ in caches:
                config.use_cache = False
            model.eval()
            yield
    finally:
        for config, use_cache in caches:
            config.use_cache = use_cache
        for space, before in kept:
            put_back(space, before)
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        random.setstate(python_state)
        np.random.set_state(numpy_state)


_SPACES = (
    "_modules",
    "_buffers",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
)


def kept_spaces(module: nn.Module, *further: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The dicts of a module that may be written to (attributes, parts, buffers, hooks, `further`), and copies."""
    own = (module.__dict__.get(name) for name in (*_SPACES, *further))
    return [(space, dict(space)) for space in (module.__dict__, *own) if isinstance(space, dict)]


def put_back(space: dict[str, Any], before: dict[str, Any]) -> None:
    """Has a dict hold what it held before, in the same order: parts and hooks run in it."""
    for name in [name for name in space if name not in before]:
        del space[name]
    for name, value in before.items():
        if name not in space or space[name] is not value:
            space[name] = value
    if list(space) != list(before):
        space.clear()
        space.update(before)


def _parts_of_adapters(modules: list[nn.Module]) -> set[nn.Module]:
    """Layers with adapters and what they add to their base layers, which are not among them."""
    found: set[nn.Module] = set()
    for layer in modules:
        if isinstance(layer, BaseTunerLayer):
            parts = [getattr(layer, name, None) for name in layer.adapter_layer_names]
            found |= {layer, *(part for own in parts if isinstance(own, nn.Module) for part in own.modules())}
    return found


def configs_of(module: nn.Module) -> list[Any]:
    """The config of a model, and that of its language model where that is another; none where it has none."""
    config: Any = getattr(module, "config", None)
    if config is None:
        return []
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return [config] if text is config else [config, text]
