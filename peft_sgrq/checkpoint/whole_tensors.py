"""Tensors that an adapter brings whole or in rows, and what becomes of tensors that the checkpoint ties.

A checkpoint holds tied tensors once: the input embedding and the output head, say. An adapter may change one of them
(`modules_to_save`), or both alike (`trainable_token_indices`). If they differ afterwards the merged checkpoint holds
all of them, and its config does not tie them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from peft_sgrq.adapter.stored import StoredAdapter
from peft_sgrq.checkpoint.stored_names import StoredNames
from peft_sgrq.files.folder import CheckpointFolder
from peft_sgrq.files.tensors import Change, Changes
from peft_sgrq.formats.stored_weight import StoredWeight


class WholeTensors:
    """Collects what becomes of tensors in memory, and plans what is written for it.

    Args:
        folder (`CheckpointFolder`): The base.
        names (`StoredNames`): Its names.
        stored (`StoredAdapter`): The adapter.
        in_memory (`bool`): Plan what a merge in memory writes: tensors that the base does not have, or in another
            shape, too.

    Attributes:
        untied (`bool`): Whether tensors that the base ties differ from each other; known once all is planned.
        brought (`bool`): Whether the adapter brings tensors that the base does not have, or has in another shape.
    """

    def __init__(self, folder: CheckpointFolder, names: StoredNames, stored: StoredAdapter, in_memory: bool) -> None:
        self._folder = folder
        self._names = names
        self._stored = stored
        self._in_memory = in_memory
        self._changes: Changes = {}
        self._tied: dict[str, Change] = {}  # by name in memory
        self._followers: dict[str, Change] = {}  # changed only if nothing else changes them
        self.untied = False
        self.brought = False

    def add_layer(self, name: str, layer: StoredWeight, changes: Changes) -> None:
        """Adds the changed scales of a layer; a layer that is not quantized may be tied."""
        key = layer.key("weight")
        change = changes.get(key)
        tied = None if change is None else self._tied_name(f"{name}.weight", key)
        if change is not None and tied is not None:
            self._tied[tied] = change
        else:
            self._changes |= changes

    def plan(self) -> tuple[Changes, dict[str, Any]]:
        """All changes, and the config of the merged checkpoint.

        Raises:
            ValueError: If the adapter brings a tensor that does not fit the base.
        """
        layers = set(self._changes) | set(self._tied)
        whole = dict(self._stored.whole)
        for name, tensor in self._stored.copies.items():
            if name in self._stored.rows and not self._is_of_base(name, tensor):
                whole[name] = tensor  # resized, then trained in rows
            elif not self._is_of_base(name, tensor):
                raise ValueError(
                    f"The adapter was trained with another {name!r}, of shape {tuple(tensor.shape)}, than the "
                    "checkpoint has (a resized vocabulary?), expected that of the base; load the model as it was "
                    "trained, and merge in memory with `merge_and_unload`. Nothing was written."
                )
        for name, tensor in whole.items():
            if name not in self._stored.rows:
                self._set(name, _constant(tensor), layers)
        for name, (indices, rows) in self._stored.rows.items():
            self._set_rows(name, indices, rows, whole.get(name), layers)
        return self._changes, self._resolve_ties()

    def _set(self, name: str, change: Change, layers: set[str]) -> None:
        key = self._key(name)
        if key is None:
            if not self._in_memory:
                raise ValueError(
                    f"The adapter brings {name!r} (`modules_to_save`), which the checkpoint does not have (a new task "
                    "head, or rows of a resized vocabulary); load the model, and merge in memory with "
                    "`merge_and_unload`. Nothing was written."
                )
            self.brought = True
            self._changes[name] = change
            return
        if key in layers or name in layers:
            raise ValueError(
                f"The adapter brings {name!r} whole and changes its scales, expected one of them; the file is "
                "broken, save the adapter again. Nothing was written."
            )
        shape = self._folder.entry(key).shape
        if change.shape != shape:
            if not self._in_memory:
                raise ValueError(
                    f"The adapter brings {name!r} of shape {change.shape}, the checkpoint has {shape} (a resized "
                    "vocabulary?); load the model, and merge in memory with `merge_and_unload`. Nothing was written."
                )
            self.brought = True
        tied = self._tied_name(name, key)
        if tied is not None:
            self._tied[tied] = change
            return
        known = self._names.architecture is not None
        if not known and not self._in_memory and self._names.may_be_tied(key):
            raise ValueError(
                f"The adapter brings {name!r}, which the checkpoint may tie to another tensor: transformers does not "
                "know this model, and config.json does not say. Set `tie_word_embeddings` there, or load the model "
                "and merge in memory with `merge_and_unload`. Nothing was written."
            )
        self._changes[key] = change

    def _set_rows(
        self, name: str, indices: list[int], rows: torch.Tensor, whole: torch.Tensor | None, layers: set[str]
    ) -> None:
        key = self._key(name)
        weight = whole if key is None or whole is not None else self._folder.tensor(key)
        if weight is None:
            raise ValueError(
                f"The adapter brings rows of {name!r} (`trainable_token_indices`), which the checkpoint does not "
                "have; load the model, and merge in memory with `merge_and_unload`. Nothing was written."
            )
        if len(indices) != len(rows) or rows.shape[1:] != weight.shape[1:]:
            raise ValueError(
                f"The adapter brings {len(rows)} rows of {name!r} for {len(indices)} `trainable_token_indices`, "
                "expected one for each; save the adapter again. Nothing was written."
            )
        if max(indices, default=-1) >= len(weight):
            raise ValueError(
                f"The adapter brings row {max(indices)} of {name!r}, of which the checkpoint has {len(weight)} (a "
                "resized vocabulary?); load the model, and merge in memory with `merge_and_unload`. Nothing was "
                "written."
            )
        change = Change(weight.dtype, tuple(weight.shape), _with_rows(weight, indices, rows))
        self._set(name, change, layers)
        tied = self._tied_name(name, key)
        if tied is None or not self._is_input_embedding(tied):
            return
        # PEFT has all of them learn the same rows, unless other rows are named for one of them.
        group = self._names.ties[tied]
        if not layers.isdisjoint(group):
            raise ValueError(
                f"The adapter brings rows of {name!r} and changes the scales of a layer that is tied to it, expected "
                "one of them; load the model, and merge in memory with `merge_and_unload`. Nothing was written."
            )
        others = (other for other in self._stored.rows if other != name)
        if all(self._tied_name(other, self._key(other)) not in group for other in others):
            self._followers |= dict.fromkeys(group, change)

    def _is_input_embedding(self, name: str) -> bool:
        known = self._names.architecture
        return not name.endswith("lm_head.weight") if known is None else name == known.input_embedding

    def _key(self, name: str) -> str | None:
        """The checkpoint's name of a tensor, or of one that is tied to it."""
        try:
            key = self._names.tensors.find(name)
        except ValueError as error:
            raise ValueError(f"The adapter brings {name!r}; {error}. Nothing was written.") from None
        held = self._names.of_group(self._names.ties.get(name, ()))
        return key if key is not None or not held else held[0]

    def _tied_name(self, name: str, key: str | None) -> str | None:
        """The name in memory of a tensor that is tied to others; `None` of one that is not."""
        known = name if name in self._names.ties else self._names.in_memory.get(key or "", "")
        return known if known in self._names.ties else None

    def _is_of_base(self, name: str, tensor: torch.Tensor) -> bool:
        key = self._key(name)
        if not tensor.is_floating_point() or tensor.dim() != 2 or key is None:
            return True  # codes and scales of a quantized layer: the fingerprint looks at those
        stored = self._folder.tensor(key)
        return stored.shape == tensor.shape and torch.equal(stored.to(tensor.dtype), tensor)

    def _resolve_ties(self) -> dict[str, Any]:
        groups = {self._names.ties[name] for name in self._tied}
        targets: set[str] = set()
        for group in groups:
            values = {name: self._tied.get(name, self._followers.get(name)) for name in group}
            changes = [change for change in values.values() if change is not None]
            if len(changes) == len(group) and all(_same(changes[0], change) for change in changes):
                self._changes |= dict.fromkeys(self._names.of_group(group), changes[0])
            else:
                self._hold_all(group, values)
                targets |= set(group)
        if not targets:
            return self._folder.config
        self.untied = True
        known = self._names.architecture
        if known is None:
            return _without_ties(self._folder.config)
        untied = known.untied(self._folder.config, targets & set(known.ties))
        if untied is None:
            return self._folder.config
        config, others = untied
        for group in {self._names.ties[name] for name in others if name in self._names.ties} - groups:
            self._hold_all(group, {})
        for group in groups:
            if not targets.issuperset(group) and others & set(group):
                self._hold_all(group, dict.fromkeys(group, self._tied[next(n for n in group if n in self._tied)]))
        return config

    def _hold_all(self, group: tuple[str, ...], values: dict[str, Change | None]) -> None:
        """Has the checkpoint hold each of some tied tensors, by itself."""
        kept = self._names.of_group(group)[0]
        entry = self._folder.entry(kept)
        old = Change(self._folder.tensor(kept).dtype, entry.shape, lambda: self._folder.tensor(kept))
        for name in group:
            key = self._names.keys.get(name)
            change = values.get(name)
            if key is None:
                known = self._names.architecture
                # In the spelling of the checkpoint, which may be that of an older version of transformers.
                verbatim = known is None or self._names.in_memory[kept] == kept
                key = name if known is None or verbatim else known.on_disk(name)
                change = old if change is None else change
            if change is not None:
                self._changes[key] = change._replace(beside=kept)


def _constant(tensor: torch.Tensor) -> Change:
    return Change(tensor.dtype, tuple(tensor.shape), lambda: tensor)


def _with_rows(weight: torch.Tensor, indices: list[int], rows: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: weight.clone().index_copy_(0, torch.tensor(indices), rows.to(weight.dtype))


def _same(one: Change, other: Change) -> bool:
    return one is other or (one[:2] == other[:2] and torch.equal(one.make(), other.make()))


def _without_ties(config: dict[str, Any]) -> dict[str, Any]:
    changed = copy.deepcopy(config)
    for level in (changed, *(value for value in changed.values() if isinstance(value, dict))):
        if level is changed or level.get("tie_word_embeddings"):
            level["tie_word_embeddings"] = False
    return changed
