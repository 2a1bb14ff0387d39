"""Names of layers and tensors in memory, and their names in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping


class Names:
    """Finds the checkpoint's names for names of the model.

    They usually are the same. Where they are not, transformers' own mapping says what belongs together (`mapped`).
    Where it knows nothing of the model, names that agree at their end do: a checkpoint of the bare model lacks the
    prefix that a model with a head has in memory, or has it where the model in memory does not, and composite models
    are nested in another order. Several may agree equally well, as layers of two towers do; the caller says which one
    is right (the fingerprint of a layer does), or the prefixes of names that were found already.

    Args:
        names (`Collection[str]`): The names there are: those of tensors, or of layers.
        mapped (`Callable`): Gives the names in memory -> names in the checkpoint that are known for sure; called once,
            when the first name is not found verbatim.
        prefixes (`dict[str, str]`): Beginnings of names in memory -> beginnings in the checkpoint; what is found adds
            to them. Give one dict to several `Names` to have what is found by one used by another.
    """

    def __init__(
        self,
        names: Collection[str],
        mapped: Callable[[], Mapping[str, str]] = dict,
        prefixes: dict[str, str] | None = None,
    ) -> None:
        self._names = set(names)
        self._mapped = mapped
        self._prefixes = {} if prefixes is None else prefixes
        self._by_end: dict[str, list[str]] = {}
        for name in self._names:
            self._by_end.setdefault(_end(name), []).append(name)

    def find(self, name: str, is_right: Callable[[str], bool] | None = None) -> str | None:
        """The checkpoint's name, `None` if there is none.

        Args:
            name (`str`): The name in memory.
            is_right (`Callable` or `None`): Whether a name in the checkpoint is the right one; asked where several
                could be.

        Raises:
            ValueError: If several could be; a clause that names them.
        """
        if name in self._names:
            return name
        known = self._mapped().get(name)
        if known in self._names:
            return known
        agreeing = self._agreeing(name)
        if len(agreeing) > 1 and is_right is not None:
            agreeing = {other: agreed for other, agreed in agreeing.items() if is_right(other)} or agreeing
        best = max(agreeing.values(), default=0)
        found = [other for other, agreed in agreeing.items() if agreed == best]
        if len(found) != 1:
            by_prefix = self._by_prefix(name)
            if found and by_prefix not in found:
                raise ValueError(f"it could be any of {sorted(found)[:4]} in the checkpoint")
            return by_prefix
        self._learn(name, found[0])
        return found[0]

    def _agreeing(self, name: str) -> dict[str, int]:
        """Names that agree with it from some dot on -> over how many parts."""
        parts = name.split(".")
        found = {}
        for candidate in self._by_end.get(_end(name), []):
            agreed, shorter = _agreed(parts, candidate.split("."))
            # Half a name is not enough: `lm_head.weight` is not any other `weight`.
            if agreed == shorter > 1 or agreed >= 3:
                found[candidate] = agreed
        return found

    def _by_prefix(self, name: str) -> str | None:
        begin = name
        while begin := begin.rpartition(".")[0]:
            if begin in self._prefixes:
                other = f"{self._prefixes[begin]}{name[len(begin) :]}".lstrip(".")
                if other in self._names:
                    return other
        return None

    def _learn(self, name: str, found: str) -> None:
        parts, others = name.split("."), found.split(".")
        agreed, _ = _agreed(parts, others)
        begin = ".".join(parts[: len(parts) - agreed])
        if begin:
            self._prefixes.setdefault(begin, ".".join(others[: len(others) - agreed]))


def _agreed(parts: list[str], others: list[str]) -> tuple[int, int]:
    """Over how many parts at their end two names agree, and how many the shorter one has."""
    shorter = min(len(parts), len(others))
    pairs = zip(reversed(parts), reversed(others), strict=False)
    return next((count for count, (a, b) in enumerate(pairs) if a != b), shorter), shorter


def _end(name: str) -> str:
    return name.rpartition(".")[2]
