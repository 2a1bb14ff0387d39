"""What merging an adapter into a checkpoint changes: found and checked before anything is written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from peft_sgrq.adapter.stored import StoredAdapter, StoredDelta, read_adapter
from peft_sgrq.base.check import check_base
from peft_sgrq.files.folder import Change, Changes, CheckpointFolder
from peft_sgrq.files.names import Names
from peft_sgrq.formats.registry import find_layer, stored_formats
from peft_sgrq.formats.stored_weight import StoredWeight
from peft_sgrq.layer.functional import effective_scales


class MergePlan(NamedTuple):
    """The changes of a merge.

    Attributes:
        base (`CheckpointFolder`): What is merged into.
        layers (`dict[str, StoredWeight]`): The layers whose scales change, by their names in memory.
        changes (`Changes`): Tensors to write or to drop, by name.
        config (`dict` or `None`): The changed `config.json`, `None` if it stays as it is.
    """

    base: CheckpointFolder
    layers: dict[str, StoredWeight]
    changes: Changes
    config: dict[str, Any] | None


def plan_merge(base: Path, adapter: Path, check: bool = True) -> MergePlan:
    """Reads an adapter and the headers of a checkpoint, checks that they belong together, and plans the changes.

    Args:
        base (`Path`): The folder of the base.
        adapter (`Path`): The folder of the adapter.
        check (`bool`): Compare the base with the fingerprints of the adapter.

    Raises:
        ValueError: If either is broken, or the adapter does not fit the base.
    """
    stored, folder = read_adapter(adapter), CheckpointFolder(base)
    if not stored.deltas:
        raise ValueError(f"{adapter} changes no scales, expected the deltas of at least one layer; nothing to merge.")
    layers = _find_layers(folder, stored)
    if check and stored.config.base_fingerprint is not None:
        _check_fingerprints(stored, layers)
    changes: Changes = {}
    for name, layer in layers.items():
        changes |= _scale_changes(name, layer, stored.deltas[name])
    changes |= _whole_changes(folder, stored, changes)
    return MergePlan(folder, layers, changes, _changed_config(folder, changes))


def _find_layers(folder: CheckpointFolder, stored: StoredAdapter) -> dict[str, StoredWeight]:
    prefixes = {name.rpartition(".")[0] for name in folder} | {name.rpartition(".weight.")[0] for name in folder}
    names = Names(prefixes - {""})
    layers = {}
    for name in stored.deltas:
        try:
            prefix = names.find(name)
            layer = None if prefix is None else find_layer(folder, prefix, stored.config)
            if layer is None:
                raise ValueError(_why_missing(folder, name))
            if name.rpartition(".")[2] == "lm_head" and _is_tied(folder):
                raise ValueError(
                    "the checkpoint ties it to the input embedding, which its scales must not change; save the base "
                    "with `tie_word_embeddings=False`, or train without it"
                )
        except ValueError as error:
            raise ValueError(
                f"Layer {name!r} cannot be merged in {folder.path}: {error}. Nothing was written."
            ) from None
        layers[name] = layer
    return layers


def _why_missing(folder: CheckpointFolder, name: str) -> str:
    tied = " (it may be tied to the input embedding)" if name.rpartition(".")[2] == "lm_head" else ""
    return (
        f"the checkpoint has no weights for it in a format peft-sgrq knows{tied}, expected those of the base the "
        "adapter names; or load the model, and merge in memory with `merge_and_unload`"
    )


def _is_tied(folder: CheckpointFolder) -> bool:
    config = folder.config
    return bool(config.get("tie_word_embeddings", (config.get("text_config") or {}).get("tie_word_embeddings", False)))


def _check_fingerprints(stored: StoredAdapter, layers: dict[str, StoredWeight]) -> None:
    expected = stored.config.base_fingerprint or {}
    found = {name: layer.fingerprint() for name, layer in layers.items()}
    for name, digest in found.items():
        trained_on = expected.get(name, digest).partition(":")[0]
        if digest.startswith("dense-") and not trained_on.startswith("dense-"):
            raise ValueError(
                f"Layer {name!r} is not quantized in the checkpoint ({digest.partition(':')[0]}), expected "
                f"{trained_on}: the adapter was trained on a base that was quantized while it was loaded. Save that "
                "base with `save_pretrained` and merge into the result, or merge in memory with `merge_and_unload`."
            )
    try:
        check_base(stored.config, found, known=layers)
    except ValueError as error:
        raise ValueError(f"{error} (On files: `check_base=False`, or `--no-check`.) Nothing was written.") from None


def _scale_changes(name: str, layer: StoredWeight, delta: StoredDelta) -> Changes:
    count = len(delta.groups)
    shape = tuple(delta.values.shape)
    fits = count and int(delta.groups[-1]) < layer.selectable and shape == layer.delta_shape(count)
    if not fits:
        raise ValueError(
            f"The deltas of layer {name!r} have shape {shape} for {count} selected groups, expected "
            f"{layer.delta_shape(count)} for a layer of {layer.name} with {layer.selectable} of them; the adapter was "
            "made for another base. Nothing was written."
        )
    groups = None if count == layer.selectable else delta.groups

    def scales() -> torch.Tensor:
        made = effective_scales(layer, delta.values, groups)
        if not torch.isfinite(made).all():
            raise ValueError(
                f"Merging would write NaN or infinite scales for layer {name!r}, expected finite ones: the adapter "
                "seems to be broken; use an earlier checkpoint of it."
            )
        return made

    return layer.changes(scales)


def _whole_changes(folder: CheckpointFolder, stored: StoredAdapter, taken: Changes) -> Changes:
    names = Names(folder.where)
    changes: Changes = {}
    for name, tensor in stored.whole.items():
        key = _existing(names, name, taken)
        shape = folder.entry(key).shape
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"The adapter brings {name!r} of shape {tuple(tensor.shape)}, the checkpoint has {shape} (a resized "
                "vocabulary?); load the model, and merge in memory with `merge_and_unload`. Nothing was written."
            )
        changes[key] = Change(tensor.dtype, shape, _constant(tensor))
    for name, (indices, rows) in stored.rows.items():
        key = _existing(names, name, taken)
        weight = folder.tensor(key)
        if len(indices) != len(rows) or rows.shape[1:] != weight.shape[1:]:
            raise ValueError(
                f"The adapter brings {len(rows)} rows of {name!r} for {len(indices)} `trainable_token_indices`, "
                "expected one for each; save the adapter again. Nothing was written."
            )
        changes[key] = Change(weight.dtype, tuple(weight.shape), _with_rows(weight, indices, rows))
    return changes


def _constant(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: tensor


def _with_rows(weight: torch.Tensor, indices: list[int], rows: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: weight.clone().index_copy_(0, torch.tensor(indices), rows.to(weight.dtype))


def _existing(names: Names, name: str, taken: Changes) -> str:
    try:
        key = names.find(name)
    except ValueError as error:
        raise ValueError(f"The adapter brings {name!r}; {error}. Nothing was written.") from None
    if key is None or key in taken:
        raise ValueError(
            f"The adapter brings {name!r} (`modules_to_save`), which the checkpoint does not have (a new task head, "
            "or a tied output head); load the model, and merge in memory with `merge_and_unload`. Nothing was written."
        )
    return key


def _changed_config(folder: CheckpointFolder, changes: Changes) -> dict[str, Any] | None:
    names = {name for name in folder if changes.get(name, True)}
    config = copy.deepcopy(folder.config)
    for layout in stored_formats():
        layout.adjust_config(config, names)
    return None if config == folder.config else config
