"""Adapters of a model whose layers had other names when they were trained.

transformers renames the modules of an architecture now and then, and maps the names of its checkpoints; PEFT maps
those of an adapter's tensors (`key_mapping=` of `from_pretrained`). The layers that an SGRQ adapter's config names go
the same way. So they do where something (activation checkpointing, FSDP) has wrapped parts of the model, and put a
name of its own into those within.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from peft_sgrq.choices import without_wrapper_names
from peft_sgrq.config import SGRQConfig
from peft_sgrq.files.architecture import renamed_as_loaded
from peft_sgrq.files.names import Names
from peft_sgrq.formats.scaled_weight import ScaledWeight
from peft_sgrq.layer.base_layers import named_base_layers, scaled_weight_of

_PREFIX = "base_model.model."


def rename_layers(config: SGRQConfig, model: nn.Module) -> dict[str, str]:
    """Gives a saved adapter's config the names that the layers have in a model.

    A name is changed only if the model has no such layer, and the layer it then names is, by its digest, the one the
    adapter was trained on.

    Args:
        config (`SGRQConfig`): The config of the adapter; changed in place.
        model (`nn.Module`): The model it is to be loaded on.

    Returns:
        `dict[str, str]`: Old name -> new name, of the layers that were renamed.
    """
    layers = {name: module for name, module in named_base_layers(model) if name}
    targets = config.target_modules if isinstance(config.target_modules, set) else set()
    named = {*(config.selection or ()), *(config.base_fingerprint or ())}
    absent = sorted(name for name in named if name not in layers)
    if not absent:
        return {}
    found = _find(absent, layers, config, model)
    if not found or len({*found.values()}) < len(found) or not named.isdisjoint(found.values()):
        return {}
    if config.selection is not None:
        config.selection = {found.get(name, name): mask for name, mask in config.selection.items()}
    if config.base_fingerprint is not None:
        config.base_fingerprint = {found.get(name, name): digest for name, digest in config.base_fingerprint.items()}
    if targets:
        config.target_modules = {found.get(name, name) for name in targets}
        reached = {name for name in found.values() if any(f".{name}".endswith(f".{end}") for end in targets)}
        # Ends of names that were renamed themselves reach nothing any more.
        config.target_modules |= set(found.values()) - reached
    return found


def _find(absent: list[str], layers: Mapping[str, nn.Module], config: SGRQConfig, model: nn.Module) -> dict[str, str]:
    by_transformers = renamed_as_loaded(model, [f"{name}.weight" for name in absent])
    by_end = Names(layers)
    by_wrapper = {without_wrapper_names(name): name for name in layers}
    found = {}
    for name in absent:
        expected = (config.base_fingerprint or {}).get(name)

        def is_right(other: str, expected: str | None = expected) -> bool:
            scaled_weight = _scaled_weight(other, layers, config)
            return scaled_weight is not None and (expected is None or scaled_weight.fingerprint() == expected)

        renamed = by_transformers[f"{name}.weight"].removesuffix(".weight")
        likely = (renamed, *(by_wrapper.get(other, other) for other in (name, renamed)))
        new = next((other for other in likely if other in layers), None)
        if new is None and expected is not None:
            try:
                new = by_end.find(name, is_right)
            except ValueError:
                continue
        if new is not None and (any(tensor.is_meta for tensor in layers[new].parameters()) or is_right(new)):
            found[name] = new
    return found


def _scaled_weight(name: str, layers: Mapping[str, nn.Module], config: SGRQConfig) -> ScaledWeight | None:
    try:
        return scaled_weight_of(name, layers[name], config.group_size)
    except ValueError:
        return None


def rename_tensors(tensors: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """The tensors of an adapter file, under the names their layers have now.

    Args:
        tensors (`Mapping[str, Any]`): By name in the file.
        renamed (`Mapping[str, str]`): What `rename_layers` returned.
    """
    return {_renamed(key, renamed): tensor for key, tensor in tensors.items()}


def _renamed(key: str, renamed: Mapping[str, str]) -> str:
    layer, delta, rest = key.removeprefix(_PREFIX).partition(".sgrq_")  # deltas, and moves of zero points
    if not delta or layer not in renamed:
        return key
    return f"{_PREFIX if key.startswith(_PREFIX) else ''}{renamed[layer]}{delta}{rest}"
