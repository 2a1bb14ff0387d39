"""bitsandbytes 0.50 repacks 4-bit layers on CPUs with AVX512-BF16 at their first forward pass in eval mode.

`Linear4bit.forward` then rewrites the weight in another nibble order and the scales transposed and rounded to
bfloat16, in place. Afterwards the layer's output is detached from the graph, and leaving the packed layout restores
the codes but not the scales, so `state_dict()`, `save_pretrained` and moving the model give wrong weights.
Related reports: https://github.com/bitsandbytes-foundation/bitsandbytes/issues/2078 and
https://github.com/bitsandbytes-foundation/bitsandbytes/pull/2083.

The repacking is switched off on every 4-bit layer of a model that gets an adapter, the layers without one included.
`tests/base/test_upstream.py::test_bitsandbytes_still_corrupts_packed_layers` fails once this is not needed any more.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)


def disable_cpu_packing(model: nn.Module) -> None:
    """Keeps every bitsandbytes 4-bit layer of `model` in its stored layout, repairing those already repacked.

    A repaired layer has the scales the packed one computed with: bfloat16 numbers. Where the stored scales had more
    bits (nested ones, or a base quantized from float32), these are lost to the repacking and a warning says so.
    """
    bnb = sys.modules.get("bitsandbytes.nn")
    if bnb is None:
        return
    repaired = []
    for name, module in model.named_modules():
        if not isinstance(module, bnb.Linear4bit):
            continue
        state = getattr(module.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            _unpack(module)
            repaired.append(name)
        module.support_avx512bf16_for_cpu = False
    if repaired:
        logger.warning(
            "bitsandbytes had repacked %d 4-bit layers (the first: %s) for inference on this CPU; they are unpacked "
            "again. Their scales were rounded to bfloat16 on the way: load the base anew, or wrap it before its first "
            "forward pass, to have the stored ones.",
            len(repaired),
            repaired[0],
        )


def _unpack(module: Any) -> None:
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    weight = module.weight
    state = weight.quant_state
    absmax = state.absmax.t().reshape(-1).to(torch.float32)  # stored transposed, (G, N)
    state.original_nested = False  # or the inverse would quantize the scales once more
    data, state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
    state.absmax, state.nested, state.offset, state.state2 = absmax.contiguous(), False, None, None
    weight.data, weight.quant_state, module.quant_state = data, state, state
    weight.compress_statistics = False
