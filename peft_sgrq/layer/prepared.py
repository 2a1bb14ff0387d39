"""What inference looks up once: the scales of a set of adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch


class _Entry(NamedTuple):
    sources: list[torch.Tensor]
    versions: list[int]
    prepared: torch.Tensor


class PreparedScales:
    """Prepared scales by adapter names, forgotten as soon as a tensor they were made of changes.

    A change shows in the storage of the tensor or in its version counter. A write through `.data`, as optimizers and
    averaging callbacks make it, shows in neither: `reuse=False` is for the places where one may have been made. Copies
    and pickles of a layer start empty.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[str, ...], _Entry] = {}

    def get(
        self,
        names: tuple[str, ...],
        sources: Sequence[torch.Tensor],
        make: Callable[[], torch.Tensor],
        reuse: bool = True,
    ) -> torch.Tensor:
        """What `make` returned when it was last called for these names and the sources as they are now.

        Args:
            names (`tuple[str, ...]`): The adapters in effect.
            sources (`Sequence[torch.Tensor]`): The tensors that what `make` returns is made of.
            make (`Callable`): Computes the prepared scales.
            reuse (`bool`): Whether to return what is there; `False` computes it anew.
        """
        entry = self._entries.get(names)
        if any(source.is_inference() for source in sources):  # these count no versions
            return make()
        versions = [source._version for source in sources]
        if reuse and entry is not None and entry.versions == versions:
            # The entry's aliases keep their storages alive, so that an equal address means the same storage.
            same = (old.data_ptr() == new.data_ptr() for old, new in zip(entry.sources, sources, strict=True))
            if all(same):
                return entry.prepared
        prepared = make()
        self._entries[names] = _Entry([source.detach() for source in sources], versions, prepared)
        return prepared

    def clear(self) -> None:
        self._entries.clear()

    def __getstate__(self) -> dict[str, object]:
        return {"_entries": {}}
