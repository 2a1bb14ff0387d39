"""What a command or a script passes to `from_pretrained`, so that a checkpoint is fast here and can be trained."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from peft_sgrq.base.precision import fast_dtype
from peft_sgrq.base.trainable_kernels import kernel_config

# Formats whose layers compute in the dtype of their input; kernels of others are made for 16 bits.
_ANY_DTYPE = (None, "bitsandbytes")
_HALVES = (torch.bfloat16, torch.float16)


def loading_arguments(model: str, **kwargs: Any) -> dict[str, Any]:
    """Arguments for loading a checkpoint to tune its scales on this machine.

    Args:
        model (`str`): Folder of the checkpoint, or its name on the Hub.
        kwargs: Further arguments of `AutoConfig.from_pretrained`, such as `revision`.

    Returns:
        `dict[str, Any]`: `dtype`: that of the checkpoint (`"auto"`) where it is fast, or where its format cannot do
        with another; and `quantization_config`, if the format's kernel is chosen at loading.
    """
    config = transformers.AutoConfig.from_pretrained(model, **kwargs)
    quantization = getattr(config, "quantization_config", None) or {}
    fields = quantization if isinstance(quantization, dict) else quantization.to_dict()
    found: dict[str, Any] = {"dtype": "auto"}
    method = fields.get("quant_method")
    stored, fast = getattr(config, "dtype", None), fast_dtype()
    if getattr(method, "value", method) in _ANY_DTYPE and stored in _HALVES and fast not in _HALVES:
        found["dtype"] = fast
    kernel = kernel_config(fields)
    return found if kernel is None else found | {"quantization_config": kernel}
