"""GPTQModel's layers: what is one, and on which kernel its scales can be trained."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

_MODULE = "gptqmodel.nn_modules.qlinear"


def is_gptqmodel_layer(module: nn.Module, method: str) -> bool:
    """Whether a module is a linear layer of GPTQModel for a method, on any of its kernels."""
    layers: Any = sys.modules.get(_MODULE)  # without it imported no module can be one of its layers
    if layers is None or not isinstance(module, layers.BaseQuantLinear):
        return False
    return method in {str(getattr(name, "value", name)) for name in type(module).SUPPORTS_METHODS} and (
        type(module).__name__ != "TorchQuantEmbeddings"
    )


def class_named(name: str, module: nn.Module) -> type[nn.Module]:
    """The class of that name in GPTQModel which a layer is an instance of."""
    return next(cls for cls in type(module).__mro__ if cls.__name__ == name and cls.__module__.startswith(_MODULE))


def check_kernel(module: nn.Module, kernel: str, loading: str) -> None:
    """Refuses a layer on another kernel than the one that can be trained through, or with an adapter of GPTQModel's.

    Args:
        module (`nn.Module`): A linear layer of GPTQModel.
        kernel (`str`): The name of the class that can be trained through.
        loading (`str`): The arguments that load it, for the message.

    Raises:
        ValueError: If the layer is refused; a clause about it.
    """
    layer: Any = module
    found = type(module).__name__
    if found != kernel:
        raise ValueError(
            f"it runs on the kernel {found}, which loses the gradient of the input or changes the layer's tensors; "
            f"load the model with the kernel that can be trained through: {loading}"
        )
    if layer.adapter is not None:
        raise ValueError(
            "it carries an adapter of GPTQModel's own, expected a plain layer; leave it out with `exclude_modules`"
        )
