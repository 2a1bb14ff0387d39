"""GPTQModel's layers: what is one, and on which kernel its scales can be trained."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

from torch import nn

from peft_sgrq.formats.int32_packed.weight import Int32PackedWeight

_MODULE = "gptqmodel.nn_modules.qlinear"


class GPTQModelLayer(Int32PackedWeight):
    """A linear layer of GPTQModel, on the one kernel of its method that can be trained through.

    Attributes:
        family (`str`): The method, as GPTQModel names it.
        kernel (`str`): The class of that kernel.
        loading (`str`): The arguments that load it, for messages.
    """

    kernel: ClassVar[str]
    loading: ClassVar[str]

    def __init__(self, module: nn.Module) -> None:
        layer: Any = module
        if not self.is_trainable(module):
            raise ValueError(
                f"it runs on the kernel {type(module).__name__}, which loses the gradient of the input or changes the "
                f"layer's tensors; load the model with the kernel that can be trained through: {self.loading}"
            )
        if layer.adapter is not None:
            raise ValueError(
                "it carries an adapter of GPTQModel's own, expected a plain layer; leave it out with `exclude_modules`"
            )
        super().__init__(module, layer.in_features, layer.out_features, layer.bits, layer.group_size)

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        layers: Any = sys.modules.get(_MODULE)  # without it imported no module can be one of its layers
        if layers is None or not isinstance(module, layers.BaseQuantLinear):
            return False
        methods = {str(getattr(name, "value", name)) for name in type(module).SUPPORTS_METHODS}
        return cls.family in methods and type(module).__name__ != "TorchQuantEmbeddings"

    @classmethod
    def is_trainable(cls, module: nn.Module) -> bool:
        return type(module).__name__ == cls.kernel

    @classmethod
    def known_class(cls, module: nn.Module) -> type[nn.Module]:
        named = (known for known in type(module).__mro__ if known.__name__ == cls.kernel)
        return next(known for known in named if known.__module__.startswith(_MODULE))
