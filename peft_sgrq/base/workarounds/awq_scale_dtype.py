"""GPTQModel 7.7 rounds the scales of an AWQ layer in place, to the dtype of whatever input comes first.

`AwqTorchLinear.forward` replaces the float16 buffer by its cast to the dtype of the input. After one bfloat16 batch
the scales have lost three bits, a model saved then differs from its checkpoint, and what an adapter computes would
depend on whether the base ran before.

The layer still computes with the cast, as it does without us; it gets its own tensors back afterwards. What a forward
pass before the adapter was added has rounded stays rounded, and a warning says so.
`tests/base/test_upstream_gptqmodel.py::test_gptqmodel_still_rounds_awq_scales_in_place` fails once this is not needed
any more.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

from torch import nn

logger = logging.getLogger(__name__)

_KEPT = "_sgrq_kept_tensors"
_FIELDS = ("scales", "bias")


def keep_awq_scales(model: nn.Module) -> None:
    """Makes every AWQ layer of `model` keep its scales and its bias as they are."""
    awq: Any = sys.modules.get("gptqmodel.nn_modules.qlinear.torch_awq")
    if awq is None:
        return
    rounded = []
    for name, module in model.named_modules():
        if type(module) is awq.AwqTorchLinear and _take not in module._forward_pre_hooks.values():
            if module.scales.dtype != module.compute_dtype and not module.scales.is_meta:
                rounded.append(name)
            module.register_forward_pre_hook(_take)
            module.register_forward_hook(_put_back, always_call=True)
    if rounded:
        logger.warning(
            "GPTQModel has rounded the scales of %d AWQ layers (the first: %s) in place at an earlier forward pass. "
            "An adapter trained now fits the rounded scales; to have the stored ones, load the base anew and add the "
            "adapter before its first forward pass.",
            len(rounded),
            rounded[0],
        )


def _take(module: nn.Module, args: Any) -> None:
    module.__dict__[_KEPT] = {field: getattr(module, field) for field in _FIELDS}


def _put_back(module: nn.Module, args: Any, output: Any) -> None:
    for field, tensor in module.__dict__.pop(_KEPT, {}).items():
        setattr(module, field, tensor)
