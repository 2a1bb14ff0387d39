"""What inference looks up once: the scales of a set of adapters, and all that a layer needs to decode a token."""

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


class Decoder:
    """The forward pass of a layer for one token, valid as long as nothing it was made of changes.

    A token takes so little arithmetic that looking up adapters, scales and codes anew would show. As with
    `PreparedScales`, a change through `.data` that keeps the storage goes unseen.

    Args:
        run (`Callable`): Takes the input and returns the output.
        state (`tuple`): What is compared as a whole: flags and names.
        sources (`Sequence[torch.Tensor]`): The tensors it was made of.
    """

    __slots__ = ("run", "sources", "state")

    def __init__(
        self,
        run: Callable[[torch.Tensor], torch.Tensor],
        state: tuple[object, ...],
        sources: Sequence[torch.Tensor],
    ) -> None:
        self.run = run
        self.state = state
        self.sources = [(source, source.data_ptr(), source._version) for source in sources]

    @classmethod
    def of(
        cls,
        run: Callable[[torch.Tensor], torch.Tensor],
        state: tuple[object, ...],
        sources: Sequence[torch.Tensor],
    ) -> Decoder | None:
        """A decoder, or `None` where changes cannot be seen: tensors made in inference mode count no versions."""
        return None if any(source.is_inference() for source in sources) else cls(run, state, sources)

    def is_current(self, state: tuple[object, ...], sources: Sequence[torch.Tensor]) -> bool:
        """Whether it may run, given what state and sources are now."""
        if state != self.state or len(sources) != len(self.sources):
            return False
        for now, (then, pointer, version) in zip(sources, self.sources, strict=True):
            if now is not then or now.data_ptr() != pointer or now._version != version:
                return False
        return True
