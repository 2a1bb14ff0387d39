"""The tensors of an adapter file: written in the dtype of the adapter, checked before any of them is loaded."""

from __future__ import annotations

import torch
from torch import nn

from peft_sgrq.choices import ADAPTER_DTYPES
from peft_sgrq.config import SGRQConfig
from peft_sgrq.layer.delta import Delta
from peft_sgrq.layer.masks import encode_mask, mask_of, pack_mask, read_mask


def in_adapter_dtype(
    tensors: dict[str, torch.Tensor], config: SGRQConfig, adapter_name: str, prefix: str
) -> dict[str, torch.Tensor]:
    """The tensors of an adapter as its file holds them: deltas in the adapter's dtype, selections packed to bits.

    Args:
        tensors (`dict[str, torch.Tensor]`): By parameter name, as in the state dict of the model.
        config (`SGRQConfig`): The config of the adapter.
        adapter_name (`str`): Its name.
        prefix (`str`): What the names of a tuner's own modules start with.
    """
    dtype = getattr(torch, config.adapter_dtype)
    stored = {}
    for key, value in tensors.items():
        own = f".{prefix}" in f".{key}"
        if own and key.endswith(f".{adapter_name}.weight"):
            value = value.to(dtype)
        elif own and key.endswith(f".{adapter_name}.selection") and value.is_floating_point():
            value = pack_mask(read_mask(value, len(value)), len(value))
        stored[key] = value
    return stored


def take_over(
    model: nn.Module, config: SGRQConfig, tensors: dict[str, torch.Tensor], suffix: str
) -> dict[str, torch.Tensor]:
    """Checks the tensors of an adapter file, and makes the config say what they hold.

    Args:
        model (`nn.Module`): The model they are to be loaded into.
        config (`SGRQConfig`): The config of the adapter; its selection and its dtype become those of the file.
        tensors (`dict[str, torch.Tensor]`): By parameter name in the model.
        suffix (`str`): What the names of the adapter's modules end with, `.sgrq_delta.<name>`.

    Returns:
        The tensors, selections in the form of the model's state dict.

    Raises:
        ValueError: If a tensor does not fit the layer it is for.
    """
    deltas = {
        name: module for name, module in model.named_modules() if isinstance(module, Delta) and name.endswith(suffix)
    }
    moves = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Delta) and name.endswith(suffix.replace("sgrq_delta", "sgrq_zero_points"))
    }
    errors = [error for name, delta in {**deltas, **moves}.items() for error in delta.find_errors(tensors, name + ".")]
    if errors:
        raise ValueError(f"The adapter file does not fit ({len(errors)} tensors, the first:) {errors[0]}")
    converted = dict(tensors)
    # PEFT does not read the config of an adapter that replaces another in place.
    for name, delta in deltas.items():
        mask, weight = tensors.get(name + ".selection"), tensors.get(name + ".weight")
        layer_name = name.removesuffix(suffix).removeprefix("base_model.model.")
        if mask is not None:
            groups = read_mask(mask, delta.selectable)
            converted[name + ".selection"] = mask_of(groups, delta.selectable)
            if config.selection and layer_name in config.selection:
                config.selection[layer_name] = encode_mask(groups, delta.selectable)
        if weight is not None and str(weight.dtype).removeprefix("torch.") in ADAPTER_DTYPES:
            delta.dtype = weight.dtype
            config.adapter_dtype = str(weight.dtype).removeprefix("torch.")
    for move in moves.values():
        move.dtype = getattr(torch, config.adapter_dtype)
    return converted
