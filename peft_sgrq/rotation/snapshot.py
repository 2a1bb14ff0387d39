"""What a model was, to be put back bit for bit when a change of it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from peft_sgrq.passes.untouched import configs_of, kept_spaces, put_back


@contextmanager
def restored_on_failure(model: nn.Module, overwritten: bool = True) -> Iterator[None]:
    """If the body raises, or is interrupted, the model has its parameters, parts, hooks and configs again.

    Args:
        model (`nn.Module`): The model.
        overwritten (`bool`): Whether the body writes into parameters, so that a copy of all is kept in the memory of
            the CPU meanwhile; parameters that are replaced are kept as they are.
    """
    kept = [space for module in model.modules() for space in kept_spaces(module, "_parameters")]
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    values = [(parameter, parameter.detach().to("cpu", copy=True)) for parameter, _ in required if overwritten]
    configs = [(config, dict(vars(config))) for config in configs_of(model)]
    try:
        yield
    except BaseException:
        for space, before in kept:
            put_back(space, before)
        with torch.no_grad():
            for parameter, value in values:
                parameter.copy_(value)
        for parameter, needed in required:
            parameter.requires_grad_(needed)
        implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
        for config, fields in configs:
            vars(config).clear()
            vars(config).update(fields)
        before_it = getattr(getattr(model, "config", None), "_attn_implementation", None)
        if implementation != before_it:
            model.set_attn_implementation(before_it)  # type: ignore[operator]
        raise
