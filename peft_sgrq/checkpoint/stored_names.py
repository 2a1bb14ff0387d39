"""The names a checkpoint has for what an adapter changes, and the tensors it holds once that are several in memory."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import cached_property

import transformers

from peft_sgrq.adapter.stored import StoredAdapter
from peft_sgrq.base.loading import AUTO_CLASS_OF_TASK
from peft_sgrq.files import architecture
from peft_sgrq.files.architecture import Architecture
from peft_sgrq.files.folder import CheckpointFolder
from peft_sgrq.files.names import Names


class StoredNames:
    """A checkpoint's names, as the model has them that an adapter was trained on.

    transformers is asked for that model only when a name is not found verbatim, or ties matter: its class is the one
    that has the layers of the adapter.

    Args:
        folder (`CheckpointFolder`): The checkpoint.
        stored (`StoredAdapter`): The adapter.
        classes (`Iterable[str]`): Classes of transformers to ask first.
    """

    def __init__(self, folder: CheckpointFolder, stored: StoredAdapter, classes: Iterable[str] = ()) -> None:
        self._folder = folder
        self._stored = stored
        self._classes = tuple(classes)
        prefixes: dict[str, str] = {}
        self.layers = Names(
            {layer for key in folder for layer in layers_of(key)}, lambda: self._layers_by_name, prefixes
        )
        self.tensors = Names(folder.where, lambda: self.keys, prefixes)

    @cached_property
    def architecture(self) -> Architecture | None:
        """The model the adapter was trained on, `None` if transformers does not know it."""
        config = self._folder.config
        recorded, task = self._trained_classes
        classes = [*self._classes, *recorded, *(config.get("architectures") or ()), *task]
        return architecture.build(config, classes, self._stored.deltas)

    def of(self, folder: CheckpointFolder) -> StoredNames:
        """The names of another checkpoint, for the same adapter."""
        return StoredNames(folder, self._stored, self._classes)

    @property
    def trained_classes(self) -> list[str]:
        """The classes of transformers that the adapter's config says it may have been trained on."""
        return [name for names in self._trained_classes for name in names]

    @property
    def _trained_classes(self) -> list[list[str]]:
        """Those by the class it records, and those by its task."""
        config, found = self._stored.config, []
        recorded = config.auto_mapping.get("base_model_class") if isinstance(config.auto_mapping, dict) else None
        for name in (recorded, AUTO_CLASS_OF_TASK.get(config.task_type or "")):
            # An auto class knows the class it makes of a model type, or the classes.
            known = getattr(getattr(transformers, name or "", None), "_model_mapping", None)
            made = name if known is None else known._model_mapping.get(self._folder.config.get("model_type"))
            found.append([one for one in (made if isinstance(made, (list, tuple)) else [made]) if one])
        return found

    @cached_property
    def in_memory(self) -> dict[str, str]:
        """Names in the checkpoint -> names in memory."""
        known = self.architecture
        return {key: key for key in self._folder} if known is None else known.in_memory(self._folder)

    @cached_property
    def keys(self) -> dict[str, str]:
        """Names in memory -> names in the checkpoint."""
        return {name: key for key, name in self.in_memory.items()}

    @cached_property
    def _layers_by_name(self) -> dict[str, str]:
        return {
            layer: prefix
            for key, name in self.in_memory.items()
            for layer, prefix in zip(layers_of(name), layers_of(key), strict=False)
            if name[len(layer) :] == key[len(prefix) :]
        }

    @cached_property
    def ties(self) -> dict[str, tuple[str, ...]]:
        """Names in memory of tensors that are one there -> all names of that tensor, itself among them."""
        groups: dict[str, set[str]] = {}
        held = dict(self.keys)
        for target, source in self._pairs():
            one, other = held.get(target), held.get(source)
            if one and other and one != other and not self._folder.same_bytes(one, self._folder, other):
                continue  # transformers does not tie what a checkpoint holds with different values
            key = other or one
            if key is None:
                continue
            held.setdefault(target, key)
            held.setdefault(source, key)
            group = groups.get(target, {target}) | groups.get(source, {source})
            groups |= dict.fromkeys(group, group)
        return {name: tuple(sorted(group)) for name, group in groups.items()}

    def _pairs(self) -> list[tuple[str, str]]:
        if self.architecture is not None:
            return list(self.architecture.ties.items())
        # Some writers note in a file which tensors they left out, being the same as others.
        shards = self._folder.shards.values()
        noted = [(name, kept) for shard in shards for name, kept in shard.metadata.items() if kept in self._folder]
        return [(name, kept) for name, kept in noted if name not in self._folder]

    def of_group(self, group: Collection[str]) -> list[str]:
        """The checkpoint's names of those of some tensors that it holds."""
        return [self.keys[name] for name in group if name in self.keys]

    def may_be_tied(self, key: str) -> bool:
        """Whether a tensor may be another one as well, as far as can be told where transformers knows nothing."""
        config, entry = self._folder.config, self._folder.entry(key)
        levels = [config, *(value for value in config.values() if isinstance(value, dict))]
        if len(entry.shape) != 2 or entry.shape[0] not in {level.get("vocab_size") for level in levels}:
            return False
        if any(level.get("tie_word_embeddings") is False for level in levels):
            return False
        return sum(self._folder.entry(other).shape == entry.shape for other in self._folder) < 2


def layers_of(key: str) -> list[str]:
    """The names of the layers that a tensor may be of, by its own."""
    return [key.rpartition(".")[0], key.rpartition(".weight.")[0]]
