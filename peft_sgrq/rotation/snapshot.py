"""What a model was, to be put back bit for bit when a rotation of it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_SPACES = (
    "_parameters",
    "_modules",
    "_buffers",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
)


@contextmanager
def restored_on_failure(model: nn.Module) -> Iterator[None]:
    """If the body raises, or is interrupted, the model has its parameters, parts, hooks and configs again.

    A copy of all parameters is kept in the memory of the CPU meanwhile.
    """
    modules = list(model.modules())
    # Parts of modules are dicts, which the modules themselves keep: their contents are put back, not they.
    kept = [(space, dict(space)) for module in modules for space in _spaces(module)]
    values = [(parameter, parameter.detach().to("cpu", copy=True)) for parameter in model.parameters()]
    configs = [(config, dict(vars(config))) for config in _configs(model)]
    try:
        yield
    except BaseException:
        for space, before in kept:
            space.clear()
            space.update(before)
        with torch.no_grad():
            for parameter, value in values:
                parameter.copy_(value)
        implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
        for config, fields in configs:
            vars(config).clear()
            vars(config).update(fields)
        before_it = getattr(getattr(model, "config", None), "_attn_implementation", None)
        if implementation != before_it:
            model.set_attn_implementation(before_it)  # type: ignore[operator]
        raise


def _spaces(module: nn.Module) -> list[dict[str, Any]]:
    return [module.__dict__, *(module.__dict__[name] for name in _SPACES if name in module.__dict__)]


def _configs(model: nn.Module) -> list[Any]:
    config: Any = getattr(model, "config", None)
    if config is None:
        return []
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return [config] if text is config else [config, text]
