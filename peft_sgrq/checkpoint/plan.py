"""What merging an adapter into a checkpoint changes: found and checked before anything is written."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from peft_sgrq.adapter.stored import StoredAdapter, StoredDelta, read_adapter
from peft_sgrq.base.check import check_base
from peft_sgrq.checkpoint.stored_names import StoredNames
from peft_sgrq.checkpoint.whole_tensors import WholeTensors
from peft_sgrq.files.folder import CheckpointFolder
from peft_sgrq.files.tensors import Changes
from peft_sgrq.formats.registry import find_layer, stored_formats
from peft_sgrq.formats.scale_matrix import ScaleMatrix
from peft_sgrq.formats.stored_weight import StoredWeight
from peft_sgrq.layer.functional import effective_scales


class MergePlan(NamedTuple):
    """The changes of a merge.

    Attributes:
        base (`CheckpointFolder`): What is merged into; to be closed by who asked for the plan.
        names (`StoredNames`): Its names, and those in memory.
        layers (`dict[str, StoredWeight]`): The layers whose scales change, by their names in memory.
        changes (`Changes`): Tensors to write or to drop, by name.
        config (`dict` or `None`): The changed `config.json`, `None` if it stays as it is.
        untied (`bool`): Whether tensors that the base ties differ from each other.
        brought (`bool`): Whether the adapter brings tensors that the base does not have, or has in another shape.
    """

    base: CheckpointFolder
    names: StoredNames
    layers: dict[str, StoredWeight]
    changes: Changes
    config: dict[str, Any] | None
    untied: bool
    brought: bool


def plan_merge(base: Path, adapter: Path, check: bool = True, merged: CheckpointFolder | None = None) -> MergePlan:
    """Reads an adapter and the headers of a checkpoint, checks that they belong together, and plans the changes.

    Args:
        base (`Path`): The folder of the base.
        adapter (`Path`): The folder of the adapter.
        check (`bool`): Compare the base with the fingerprints of the adapter.
        merged (`CheckpointFolder` or `None`): A checkpoint that was merged already, in memory perhaps. What it should
            be is planned, which may be what only a merge in memory can write: a new head, a resized vocabulary.

    Raises:
        ValueError: If either is broken, or the adapter does not fit the base.
    """
    stored, folder = read_adapter(adapter), CheckpointFolder(base)
    try:
        return _plan(folder, stored, adapter, check, merged)
    except BaseException:
        folder.close()
        raise


def _plan(
    folder: CheckpointFolder, stored: StoredAdapter, adapter: Path, check: bool, merged: CheckpointFolder | None
) -> MergePlan:
    if not stored.deltas:
        raise ValueError(f"{adapter} changes no scales, expected the deltas of at least one layer; nothing to merge.")
    names = StoredNames(folder, stored, () if merged is None else merged.config.get("architectures") or ())
    layers = _find_layers(folder, names, stored)
    if check and stored.config.base_fingerprint is not None:
        check_fingerprints(stored, layers)
    whole = WholeTensors(folder, names, stored, in_memory=merged is not None)
    for name, layer in layers.items():
        whole.add_layer(name, layer, layer.changes(changed_scales(name, layer, stored.deltas[name])))
    changes, config = whole.plan()
    changed = _changed_config(folder, changes, config)
    return MergePlan(folder, names, layers, changes, changed, whole.untied, whole.brought)


def _find_layers(folder: CheckpointFolder, names: StoredNames, stored: StoredAdapter) -> dict[str, StoredWeight]:
    layers: dict[str, StoredWeight] = {}
    for last in (False, True):  # what is found of others may tell
        for name in [name for name in stored.deltas if name not in layers]:
            try:
                layers[name] = _find_layer(folder, names, stored, name)
            except ValueError as error:
                if last:
                    raise ValueError(
                        f"Layer {name!r} cannot be merged in {folder.path}: {error}. Nothing was written."
                    ) from None
    return {name: layers[name] for name in stored.deltas}


def _find_layer(folder: CheckpointFolder, names: StoredNames, stored: StoredAdapter, name: str) -> StoredWeight:
    expected = (stored.config.base_fingerprint or {}).get(name)

    def is_right(prefix: str) -> bool:
        try:
            layer = find_layer(folder, prefix, stored.config)
        except ValueError:
            return False
        return layer is not None and layer.fingerprint() == expected

    prefix = names.layers.find(name, is_right if expected else None)
    if prefix is None:
        held = names.of_group(names.ties.get(f"{name}.weight", ()))
        prefix = held[0].removesuffix(".weight") if held else None
    layer = None if prefix is None else find_layer(folder, prefix, stored.config)
    if layer is None:
        raise ValueError(_why_missing(name))
    if name.rpartition(".")[2] == "lm_head" and _is_tied(folder) and names.architecture is None:
        raise ValueError(
            "the checkpoint ties it to the input embedding, which its scales must not change; save the base "
            "with `tie_word_embeddings=False`, or train without it"
        )
    return layer


def _is_tied(folder: CheckpointFolder) -> bool:
    config = folder.config
    return bool(config.get("tie_word_embeddings", (config.get("text_config") or {}).get("tie_word_embeddings", False)))


def _why_missing(name: str) -> str:
    tied = " (it may be tied to the input embedding)" if name.rpartition(".")[2] == "lm_head" else ""
    return (
        f"the checkpoint has no weights for it in a format peft-sgrq knows{tied}, expected those of the base the "
        "adapter names; or load the model, and merge in memory with `merge_and_unload`"
    )


def check_fingerprints(stored: StoredAdapter, layers: Mapping[str, ScaleMatrix]) -> None:
    """Compares layers on the disk with the fingerprints an adapter carries.

    Raises:
        ValueError: If they are not those of the base it was trained on.
    """
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


def changed_scales(name: str, layer: ScaleMatrix, delta: StoredDelta) -> Callable[[], torch.Tensor]:
    """What makes the scales of a layer with the deltas of an adapter; that they fit is checked at once.

    Raises:
        ValueError: If the deltas have another shape; when called, if they make scales that are not finite.
    """
    count = len(delta.units)
    shape = tuple(delta.values.shape)
    moves = delta.zero_points
    if not delta.fits(layer):
        raise ValueError(
            f"The deltas of layer {name!r} have shape {shape} for {count} selected groups, expected "
            f"{layer.delta_shape(count)} for a layer of {layer.name} with {layer.selectable} of them; the adapter was "
            "made for another base. Nothing was written."
        )
    if moves is not None and (not layer.movable_zero_points or tuple(moves.shape) != layer.scales_shape):
        raise ValueError(
            f"The adapter moves {tuple(moves.shape)} zero points of layer {name!r}, which cannot be written into "
            f"{layer.name} with {layer.scales_shape} scales on the disk; load the model, and merge in memory with "
            "`merge_and_unload`. Nothing was written."
        )
    units = None if count == layer.selectable else delta.units

    def scales() -> torch.Tensor:
        made = effective_scales(layer, delta.values, units, zero_points=moves)
        if not torch.isfinite(made).all():
            raise ValueError(
                f"Merging would write NaN or infinite scales for layer {name!r}, expected finite ones: the adapter "
                "seems to be broken; use an earlier checkpoint of it."
            )
        return made

    return scales


def _changed_config(folder: CheckpointFolder, changes: Changes, config: dict[str, Any]) -> dict[str, Any] | None:
    names = {name for name in folder if changes.get(name, True)}
    config = copy.deepcopy(config)
    for layout in stored_formats():
        layout.adjust_config(config, names)
    return None if config == folder.config else config
