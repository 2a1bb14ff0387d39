"""What a model was, to be put back bit for bit when a rotation of it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from peft_sgrq.passes.untouched import configs_of, kept_spaces, put_back


@contextmanager
def restored_on_failure(model: nn.Module) -> Iterator[None]:
    """If the body raises, or is interrupted, the model has its parameters, parts, hooks and configs again.

    A copy of all parameters is kept in the memory of the CPU meanwhile.
    """
    kept = [space for module in model.modules() for space in kept_spaces(module, "_parameters")]
    values = [(parameter, parameter.detach().to("cpu", copy=True)) for parameter in model.parameters()]
    configs = [(config, dict(vars(config))) for config in configs_of(model)]
    try:
        yield
    except BaseException:
        for space, before in kept:
            put_back(space, before)
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
