"""The tensors of an adapter file: written in the dtype of the adapter, checked before any of them is loaded."""

from __future__ import annotations

import torch
from torch import nn

from peft_sgrq.choices import ADAPTER_DTYPES, without_wrapper_names
from peft_sgrq.config import SGRQConfig
from peft_sgrq.layer.delta import Delta
from peft_sgrq.layer.masks import encode_mask, mask_of, pack_mask, read_mask


def adapter_tensors(
    model: nn.Module, state: dict[str, torch.Tensor], config: SGRQConfig, suffix: str
) -> dict[str, torch.Tensor]:
    """The tensors of an adapter as its file holds them: deltas in the adapter's dtype, selections packed to bits.

    Args:
        model (`nn.Module`): The model.
        state (`dict[str, torch.Tensor]`): Its state dict; that of a sharded model is empty on all processes but one.
        config (`SGRQConfig`): The config of the adapter.
        suffix (`str`): What the names of the adapter's modules end with, `.sgrq_delta.<name>`.
    """
    dtype = getattr(torch, config.adapter_dtype)
    stored = {}
    for module_name, delta in _trained(model, suffix).items():
        # State dicts leave out the names of some wrappers.
        names = (module_name, without_wrapper_names(module_name))
        name = next((name for name in names if name + ".weight" in state), None)
        if name is not None:
            mask = state.get(name + ".selection")
            units = delta.units if mask is None else read_mask(mask, delta.selectable)
            stored[name + ".weight"] = state[name + ".weight"].to(dtype)
            stored[name + ".selection"] = pack_mask(units, delta.selectable)
    return stored


def _trained(model: nn.Module, suffix: str) -> dict[str, Delta]:
    """The deltas of an adapter, and its moves of zero points."""
    ends = (suffix, suffix.replace("sgrq_delta", "sgrq_zero_points"))
    return {
        name: module for name, module in model.named_modules() if isinstance(module, Delta) and name.endswith(ends)
    }


def further_names(model: nn.Module) -> set[str]:
    """The names of deltas that a model has under a name before: of layers it has under several."""
    found = {name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, Delta)}
    return found - {name for name, module in model.named_modules() if isinstance(module, Delta)}


def named_for(adapter_name: str, key: str, in_peft_model: bool) -> str:
    """The name in a model of a tensor that an adapter file has, where PEFT, which asks a state dict, found none.

    State dicts leave out the names that activation checkpointing puts into those of modules, by which PEFT looks.
    """
    layer, found, rest = key.rpartition(".sgrq_")
    kind, _, tensor = rest.partition(".")
    if not found or kind not in ("delta", "zero_points") or tensor not in ("weight", "selection"):
        return key
    return (
        f"{layer if in_peft_model else layer.removeprefix('base_model.model.')}{found}{kind}.{adapter_name}.{tensor}"
    )


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
    trained = _trained(model, suffix)
    errors = [error for name, delta in trained.items() for error in delta.find_errors(tensors, name + ".")]
    if errors:
        raise ValueError(f"The adapter file does not fit ({len(errors)} tensors, the first:) {errors[0]}")
    converted = dict(tensors)
    # PEFT does not read the config of an adapter that replaces another in place.
    for name, delta in trained.items():
        mask, weight = tensors.get(name + ".selection"), tensors.get(name + ".weight")
        layer_name = name.removesuffix(suffix).removeprefix("base_model.model.")
        if mask is not None:
            units = read_mask(mask, delta.selectable)
            converted[name + ".selection"] = mask_of(units, delta.selectable)
            if config.selection and layer_name in config.selection:
                config.selection[layer_name] = encode_mask(units, delta.selectable)
        if weight is not None and str(weight.dtype).removeprefix("torch.") in ADAPTER_DTYPES:
            delta.dtype = weight.dtype
            config.adapter_dtype = str(weight.dtype).removeprefix("torch.")
    return converted
