"""The weights a model had before it was quantized."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from peft_sgrq.files.hub import check_source
from peft_sgrq.formats.scaled_weight import ScaledWeight


def original_weights(
    original: nn.Module | str | os.PathLike[str], model: nn.Module, names: Collection[str]
) -> Callable[[str, ScaledWeight], torch.Tensor]:
    """A function from a layer to its weight before quantization, float32 `[N, K]` on the layer's device.

    Args:
        original (`nn.Module`, `str` or path): The model before quantization, or the checkpoint of it (a directory, or
            a name on the Hub), which is loaded on the CPU as the same class.
        model (`nn.Module`): The quantized model.
        names (`Collection[str]`): Names of the layers that will be asked for.

    Raises:
        ValueError: If the original lacks a layer, or has it in another shape.
        TypeError: If it is neither a model nor a path.
    """
    from peft_sgrq.layer.base_layers import named_base_layers, scaled_weight_of

    if isinstance(original, (str, os.PathLike)):
        cls: Any = type(model)
        if not hasattr(cls, "from_pretrained"):
            raise TypeError(
                f"`original` is a path and the model a {cls.__name__}, which cannot be loaded from one, expected a "
                "class with `from_pretrained`; give the original model itself."
            )
        check_source(original, "original")
        original = cls.from_pretrained(os.fspath(original), dtype="auto")
    if not isinstance(original, nn.Module):
        raise TypeError(
            f"`original` is a {type(original).__name__}, expected the model before quantization or its checkpoint."
        )
    layers = dict(named_base_layers(original))
    missing = [name for name in names if name not in layers]
    if missing:
        raise ValueError(
            f"`original` has no layer {missing[0]!r} ({len(missing)} are missing), expected the layers of the "
            "quantized model under the same names; give the model that was quantized."
        )

    def weight_of(name: str, scaled_weight: ScaledWeight) -> torch.Tensor:
        before = scaled_weight_of(name, layers[name], scaled_weight.group_size)
        if (before.out_features, before.in_features) != (scaled_weight.out_features, scaled_weight.in_features):
            raise ValueError(
                f"Layer {name!r} of `original` has shape {(before.out_features, before.in_features)}, expected "
                f"{(scaled_weight.out_features, scaled_weight.in_features)}; give the model that was quantized."
            )
        return before.dequantize(before.scales(), torch.float32).to(scaled_weight.device)

    return weight_of
