"""transformers 5.23 saves the zero points of a GPTQ model in another format than the config it writes says.

Files of the format `gptq` hold zero points less one, `gptq_v2` holds them as they are. GPTQModel converts them when it
loads a file; `save_pretrained` of transformers writes the converted ones beside `"checkpoint_format": "gptq"`, and who
loads that adds one again: every weight is off by its scale. https://github.com/vllm-project/vllm/issues/38966 is the
same confusion.

A merged (or unloaded) model of the format `gptq` hands out zero points in its state dict as its file had them, byte by
byte, and takes them in that form.
`tests/base/test_upstream_gptqmodel.py::test_transformers_still_saves_wrong_zero_points` fails once this is not needed
any more.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def save_zero_points_as_loaded(model: nn.Module) -> None:
    """Makes the state dict of `model` hold the zero points that its quantization config promises."""
    qlinear: Any = sys.modules.get("gptqmodel.nn_modules.qlinear")
    if qlinear is None or _checkpoint_format(model) != "gptq":
        return
    for module in model.modules():
        if isinstance(module, qlinear.GPTQQuantLinear) and _hand_out not in module._state_dict_hooks.values():
            module.register_state_dict_post_hook(_hand_out)
            module.register_load_state_dict_pre_hook(_take_in)


def _checkpoint_format(model: nn.Module) -> str | None:
    config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        return None
    fields = config if isinstance(config, dict) else config.to_dict()
    name = fields.get("checkpoint_format") or fields.get("format")
    return str(getattr(name, "value", name)) if fields.get("quant_method") == "gptq" else None


def _hand_out(module: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    key = prefix + "qzeros"
    # GPTQModel's own way of saving has turned them back already.
    if key in state_dict and module.qzero_format() == 2:
        from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

        state_dict[key] = _converted(module, state_dict[key], convert_gptq_v2_to_v1_format_module, module)


def _take_in(module: Any, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    key = prefix + "qzeros"
    if key in state_dict and module.qzero_format() == 2:
        from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

        state_dict[key] = _converted(
            module, state_dict[key], convert_gptq_v1_to_v2_format_module, module.bits, module.pack_dtype
        )


def _converted(module: Any, zeros: torch.Tensor, convert: Callable[..., Any], *args: Any) -> torch.Tensor:
    """GPTQModel's conversion, which works on a layer in place, of a tensor of its own."""
    kept, before = module.qzeros, module.qzero_format()
    module.qzeros = zeros.detach().clone()
    try:
        convert(module, *args)
        return module.qzeros
    finally:
        module.qzeros = kept
        module.qzero_format(before)
