"""Mixtures of experts, which transformers 5 keeps as parameters of three dimensions that no linear layer has."""

from __future__ import annotations

from torch import nn


def find_experts(model: nn.Module) -> str | None:
    """The name of a parameter that holds the weights of several experts; `None` if there is none."""
    for name, module in model.named_modules():
        if "Conv" not in type(module).__name__:
            for own, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3:
                    return f"{name}.{own}"
    return None
