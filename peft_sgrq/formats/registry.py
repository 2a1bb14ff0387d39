"""The weight formats whose scales can be tuned. A new one is a folder here and a line in `FORMATS`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import nn

from peft_sgrq.config import SGRQConfig
from peft_sgrq.files.folder import CheckpointFolder
from peft_sgrq.formats.code import Code
from peft_sgrq.formats.scaled_weight import ScaledWeight
from peft_sgrq.formats.stored_weight import StoredWeight

# Folder -> the libraries one of which makes its layers. The first format that knows a layer is taken. A folder's
# `WEIGHTS` are its formats in memory, its `STORED` those in checkpoints. Where its library quantizes models that are
# loaded, it bears the name of that method, and `QUANTIZING_CODE` makes the code that does it.
FORMATS: dict[str, tuple[str, ...]] = {
    "bnb_4bit": ("bitsandbytes",),
    "bnb_int8": ("bitsandbytes",),
    "compressed_tensors": ("compressed_tensors",),
    "fp8_blocks": ("transformers",),
    "int32_packed": ("gptqmodel", "auto_round", "auto_round_extension"),
    "torchao": ("torchao",),
    "hqq": ("hqq",),
    "quanto": ("optimum",),
    "gguf": ("peft_sgrq.formats.gguf.layers",),
    "dense": ("torch",),
}
SUPPORTED_LAYERS = (
    "torch.nn.Linear (dense, or with a torchao weight), transformers' Conv1D, bitsandbytes' Linear4bit and "
    "Linear8bitLt, the GPTQ and AWQ layers of GPTQModel, AutoRound's QuantLinear, HQQLinear, quanto's QLinear, "
    "compressed-tensors' layers, fine-grained fp8 and GGUF layers loaded by peft_sgrq"
)


@cache
def _format(folder: str) -> ModuleType:
    return import_module(f"{__package__}.{folder}")


def _weights() -> Iterator[type[ScaledWeight]]:
    for folder, libraries in FORMATS.items():
        if any(library in sys.modules for library in libraries):  # one that is not imported has made no layers
            yield from _format(folder).WEIGHTS


def _class_of(module: nn.Module) -> type[ScaledWeight] | None:
    return next((weight for weight in _weights() if weight.matches(module)), None)


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is a layer of a supported quantized format."""
    found = _class_of(module)
    return found is not None and found.quantized


def is_supported(module: nn.Module) -> bool:
    """Whether a module is a layer of any supported format, quantized or dense."""
    found = _class_of(module)
    return found is not None and (found.quantized or found.obstacle(module) is None)


def runs_on_trainable_kernel(module: nn.Module) -> bool:
    """Whether scales can be trained through the kernel a module computes with; of no format, it has no other."""
    found = _class_of(module)
    return found is None or found.is_trainable(module)


def resolve_weight(module: nn.Module, group_size: int) -> ScaledWeight:
    """The scaled weight of a layer.

    Args:
        module (`nn.Module`): A linear layer, quantized or dense.
        group_size (`int`): Columns per scale in a dense layer; a quantized one has its own.

    Raises:
        ValueError: If the layer is of no supported format, or of one but cannot be tuned. The sentence is a clause
            about the layer ("its weight is ..."), for the caller to put the layer's name in front of.
    """
    found = _class_of(module)
    if found is None:
        raise ValueError(
            f"it is a {type(module).__module__}.{type(module).__qualname__}, expected one of {SUPPORTED_LAYERS}; name "
            "only such layers in `target_modules`, or list this one in `exclude_modules`"
        )
    scaled_weight = found.of(module, group_size)
    obstacle = found.obstacle(module)
    if obstacle is not None:
        raise ValueError(obstacle)
    return scaled_weight


def stored_formats() -> Iterator[type[StoredWeight]]:
    """The formats of layers in checkpoints; the first that knows one is taken."""
    for folder in FORMATS:
        yield from _format(folder).STORED


def find_layer(folder: CheckpointFolder, prefix: str, config: SGRQConfig) -> StoredWeight | None:
    """The layer whose tensors have names with this prefix; `None` if no format knows it.

    Raises:
        ValueError: If its format is known but its scales cannot be tuned; a clause about the layer.
    """
    found = (stored.find(folder, prefix, config) for stored in stored_formats())
    return next((layer for layer in found if layer is not None), None)


def quantizing_code(method: str) -> Callable[[Mapping[str, Any]], Code | None] | None:
    """What makes the code that quantizes a loaded model by a method; `None` if transformers does it while loading."""
    return getattr(_format(method), "QUANTIZING_CODE", None) if method in FORMATS else None
