"""Scales made ready for inference: computed once for a set of adapters, not at every token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch


class _Entry(NamedTuple):
    sources: list[torch.Tensor]
    versions: list[int]
    prepared: torch.Tensor


class PreparedScales:
    """Prepared scales by adapter names, forgotten as soon as a delta they were made of changes.

    A change shows in the storage of the delta or in its version counter. Only a write through `.data` into the same
    storage shows in neither; training and `train()` or `eval()` clear everything, so none of those goes unseen.
    Copies and pickles of a layer start empty.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[str, ...], _Entry] = {}

    def get(
        self, names: tuple[str, ...], weights: Sequence[torch.Tensor], make: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """What `make` returns, or returned when it was last called for these names and the weights as they are now."""
        entry = self._entries.get(names)
        versions = [weight._version for weight in weights]
        if entry is not None and entry.versions == versions:
            # The entry's aliases keep their storages alive, so that an equal address means the same storage.
            same = (old.data_ptr() == new.data_ptr() for old, new in zip(entry.sources, weights, strict=True))
            if all(same):
                return entry.prepared
        prepared = make()
        self._entries[names] = _Entry([weight.detach() for weight in weights], versions, prepared)
        return prepared

    def clear(self) -> None:
        self._entries.clear()

    def __getstate__(self) -> dict[str, object]:
        return {"_entries": {}}
