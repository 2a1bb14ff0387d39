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

FIELD = "backend"


def quantization_configs(model: nn.Module) -> list[Any]:
    """The quantization configs of a model and of its quantizer, which may be one: objects or dicts."""
    holders = (getattr(model, "config", None), getattr(model, "hf_quantizer", None))
    found = {id(config): config for holder in holders if (config := getattr(holder, "quantization_config", None))}
    return list(found.values())


def forget_loading_attributes(model: nn.Module) -> None:
    """Has the quantization config of `model` say nothing of the kernel it was loaded with."""
    for config in quantization_configs(model):
        if isinstance(config, dict):
            config.pop(FIELD, None)
        elif hasattr(config, FIELD) and hasattr(config, "bits"):
            with suppress(TypeError, ValueError):  # a config that cannot be made of its bits keeps what it has
                setattr(config, FIELD, getattr(type(config)(bits=config.bits), FIELD))
