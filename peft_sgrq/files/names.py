"""Names of layers in memory and names in a checkpoint: usually the same, and if not, alike at their end."""

from __future__ import annotations

from collections.abc import Collection


class Names:
    """Finds the checkpoint's name for a name of the model.

    A checkpoint of the bare model lacks the prefix that a model with a head has in memory, or has it where the model
    in memory does not, and composite models are nested in another order: the names then agree from some dot on. What
    is found is checked by the fingerprint of the layer.

    Args:
        names (`Collection[str]`): The names there are: those of tensors, or of layers.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = set(names)
        self._by_end: dict[str, list[str]] = {}
        for name in self._names:
            self._by_end.setdefault(_end(name), []).append(name)

    def find(self, name: str) -> str | None:
        """The name itself, or the one that agrees with it over the most parts at the end; `None` if none does.

        Raises:
            ValueError: If several do; a clause that names them.
        """
        if name in self._names:
            return name
        candidates = self._by_end.get(_end(name), [])
        parts = name.split(".")
        best = 1
        found: list[str] = []
        for candidate in candidates:
            others = candidate.split(".")
            agreed = next(
                (count for count, (a, b) in enumerate(zip(reversed(parts), reversed(others), strict=False)) if a != b),
                min(len(parts), len(others)),
            )
            # Half a name is not enough: `lm_head.weight` is not any other `weight`.
            if agreed < min(len(parts), len(others)) and agreed < 3:
                continue
            if agreed > best:
                best, found = agreed, []
            if agreed == best:
                found.append(candidate)
        if len(found) > 1:
            raise ValueError(f"it could be any of {sorted(found)[:4]} in the checkpoint")
        return found[0] if found else None


def _end(name: str) -> str:
    return name.rpartition(".")[2]
