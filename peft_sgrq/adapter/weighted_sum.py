"""Adapters that are sums of others: what can be added up, and the config of the sum."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from peft_sgrq.config import SGRQConfig
from peft_sgrq.layer.linear import SGRQLinear
from peft_sgrq.layer.masks import encode_mask


def check_sum(configs: Mapping[str, SGRQConfig], adapters: list[str], weights: list[float], adapter_name: str) -> None:
    """Refuses a sum of adapters that cannot be made.

    Args:
        configs (`Mapping[str, SGRQConfig]`): The adapters of the model, by name.
        adapters (`list[str]`): Names of those to add up.
        weights (`list[float]`): A weight for each.
        adapter_name (`str`): Name of the sum.

    Raises:
        ValueError: If an adapter does not exist or trains more than scales, the new name does exist, or the lengths
            differ.
    """
    if not adapters:
        raise ValueError(f"Found no adapters to add up, expected some of {sorted(configs)}; name them.")
    unknown = [name for name in adapters if name not in configs]
    if unknown:
        raise ValueError(
            f"Adapter(s) {unknown} do not exist, expected names among {sorted(configs)}; load them first."
        )
    if len(adapters) != len(weights):
        raise ValueError(f"Found {len(adapters)} adapters and {len(weights)} weights; give one weight for each.")
    if adapter_name in configs:
        raise ValueError(f"Adapter {adapter_name!r} exists already; choose another name or delete it first.")
    for name in adapters:
        if configs[name].modules_to_save or configs[name].trainable_token_indices:
            raise ValueError(
                f"Adapter {name!r} also trains `modules_to_save` or `trainable_token_indices`, expected adapters "
                "of scales alone: whole weights have no weighted sum here; add up the others."
            )


def config_of_sum(model: nn.Module, configs: Mapping[str, SGRQConfig], adapters: list[str]) -> SGRQConfig:
    """The config of an adapter that selects, layer by layer, what any of the summands does.

    Args:
        model (`nn.Module`): The model.
        configs (`Mapping[str, SGRQConfig]`): Its adapters, by name.
        adapters (`list[str]`): Names of the summands.
    """
    selection: dict[str, str] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, SGRQLinear):
            units = [layer.delta(adapter).units for adapter in adapters if adapter in layer.sgrq_delta]
            if units:
                selection[name] = encode_mask(torch.cat(units).unique(), layer.scaled_weight.selectable)
    return replace(
        configs[adapters[0]],
        zero_points=any(configs[adapter].zero_points for adapter in adapters),
        target_modules="|".join(map(re.escape, selection)),  # a list would also match by the ends of names
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        adapter_dtype="float32",  # a sum of bfloat16 numbers is not one
        init_weights=True,
        selection=selection,
        base_fingerprint=None,
    )
