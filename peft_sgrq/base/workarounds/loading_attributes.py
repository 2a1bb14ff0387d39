"""transformers writes how a model was loaded into the config it is saved with.

`GPTQConfig(backend="torch")` and its like choose a kernel on this machine. transformers copies that field into the
model's own quantization config, and saves it: whoever loads the saved model gets the kernel of its training, and vLLM
refuses an AutoRound model that names it ("Unsupported backend: torch").

The field is set back to what it is by default in models that are adapted or split; the layers keep the kernel they
have. `tests/base/test_upstream_gptqmodel.py::test_transformers_still_saves_the_kernel_a_model_was_loaded_with` fails
once this is not needed any more.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import nn

FIELDS = ("backend",)


def forget_loading_attributes(model: nn.Module) -> None:
    """Has the quantization config of `model` say nothing of the kernel it was loaded with."""
    holders = (getattr(model, "config", None), getattr(model, "hf_quantizer", None))
    for holder in holders:
        config: Any = getattr(holder, "quantization_config", None)
        if isinstance(config, dict):
            for field in FIELDS:
                config.pop(field, None)
        elif config is not None and all(hasattr(config, field) for field in (*FIELDS, "bits")):
            with suppress(TypeError, ValueError):  # a config that cannot be made of its bits keeps what it has
                default = type(config)(bits=config.bits)
                for field in FIELDS:
                    setattr(config, field, getattr(default, field))
