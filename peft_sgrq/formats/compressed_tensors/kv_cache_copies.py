"""Copies of a model with a quantized KV cache ask the original how to round, and round nothing when that is gone.

compressed-tensors' `QuantizedKVCache` knows its attention module by a weak reference, which `copy.deepcopy` keeps as
it is. `test_compressed_tensors_still_ties_copies_of_caches_to_the_original` fails once this is not needed any more.
"""

from __future__ import annotations

import copy
import sys
import types
import weakref
from typing import Any

from torch import nn

_MODULE, _CLASS = "compressed_tensors.modeling.kvcache", "QuantizedKVCache"


def let_caches_be_copied(model: nn.Module) -> None:
    """Has copies of the quantized caches of a model belong to the copies of their attention modules."""
    library = sys.modules.get(_MODULE)
    if library is not None:
        for module in model.modules():
            if type(module) is getattr(library, _CLASS):
                module.__deepcopy__ = types.MethodType(_copy, module)  # type: ignore[assignment]


def _copy(self: Any, memo: dict[int, Any]) -> Any:
    copied: Any = object.__new__(type(self))
    memo[id(self)] = copied
    kept = {key: value for key, value in self.__dict__.items() if key != "__deepcopy__"}
    copied.__dict__.update(copy.deepcopy(kept, memo))
    attention = memo.get(id(self.attn_module()))
    if attention is not None:  # it is copied, too
        copied.__dict__["attn_module"] = weakref.ref(attention)
    copied.__dict__["__deepcopy__"] = types.MethodType(_copy, copied)
    return copied
