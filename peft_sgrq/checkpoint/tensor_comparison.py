"""Comparing the tensors of a merged checkpoint with those it should have, whatever it calls them."""

from __future__ import annotations

import math
from functools import cached_property

from peft_sgrq.checkpoint.plan import MergePlan
from peft_sgrq.checkpoint.stored_names import StoredNames
from peft_sgrq.files.folder import CheckpointFolder
from peft_sgrq.files.tensors import Change

_FLOAT = ("F64", "F32", "F16", "BF16")


class TensorComparison:
    """Compares every tensor of a checkpoint with what a plan says of it.

    Args:
        plan (`MergePlan`): What the checkpoint should be.
        result (`CheckpointFolder`): The checkpoint.

    Attributes:
        same (`int`): Tensors with the bytes of the base.
        merged (`int`): Tensors with the values the adapter makes.
        errors (`list[str]`): What is wrong, a sentence each.
        notes (`list[str]`): What is missing and does no harm.
    """

    def __init__(self, plan: MergePlan, result: CheckpointFolder) -> None:
        self._plan = plan
        self._result = result
        self.same = 0
        self.merged = 0
        self.errors: list[str] = []
        self.notes: list[str] = []

    def run(self) -> None:
        """Compares all tensors."""
        seen, left_out = set(), []
        for name in {**dict.fromkeys(self._plan.base), **self._plan.changes}:
            change = self._plan.changes.get(name)
            key = self._find(name)
            if name in self._plan.changes and change is None:
                if key is not None:
                    self.errors.append(f"{name} is there, expected it to be dropped (its scales are un-nested).")
            elif key is None:
                found = self._names.architecture
                if change is None and found is not None and found.not_loaded([name]):  # it has no use for it
                    left_out.append(name)
                else:
                    self.errors.append(f"{name} is missing.")
            else:
                self._compare(name, key, change)
            seen.add(key)
        self.errors.extend(f"{key} is not in the base." for key in self._result if not self._is_known(key, seen))
        if left_out:
            found, more = self._names.architecture, f" and {len(left_out) - 4} more" if len(left_out) > 4 else ""
            names = ", ".join(left_out[:4]) + more
            self.notes.append(f"Not in the merged checkpoint, as {found and found.name} has none: {names}.")
        if self._plan.brought or self._result.config.get("id2label") != self._plan.base.config.get("id2label"):
            self._check_shapes()

    def _compare(self, name: str, key: str, change: Change | None) -> None:
        base, result = self._plan.base, self._result
        called = key if key == name else f"{key} ({name} in the base)"
        if change is not None:
            if result.has(key, change.tensor()):
                self.merged += 1
            elif name in base and base.same_bytes(name, result, key):
                self.errors.append(f"{called} is that of the base, expected the adapter merged into it.")
            else:
                self.errors.append(f"{called} holds other values than the base with the adapter merged.")
        elif base.same_bytes(name, result, key):
            self.same += 1
        else:
            found, expected = result.entry(key).dtype, base.entry(name).dtype
            dtypes = f" Its dtype is {found}, expected {expected}: load the base in the dtype of its file."
            differs = f"{called} differs from the base, which the adapter does not change."
            self.errors.append(differs + (dtypes if found != expected else ""))

    @cached_property
    def _names(self) -> StoredNames:
        return self._plan.names.of(self._result)

    def _find(self, name: str) -> str | None:
        """The checkpoint's name of a tensor, or of the one that it is tied to there."""
        if name in self._result:
            return name
        in_memory = self._in_memory(name)
        if in_memory in self._names.keys:
            return self._names.keys[in_memory]
        held = self._names.of_group(self._names.ties.get(in_memory, ()))
        return held[0] if held else None

    def _in_memory(self, name: str) -> str:
        names = self._plan.names
        if name in names.in_memory or names.architecture is None:
            return names.in_memory.get(name, name)
        return names.architecture.in_memory([name])[name]

    def _is_known(self, key: str, seen: set[str | None]) -> bool:
        """Whether a tensor was compared, or is held once more under the name of one that is tied to it."""
        if key in seen:
            return True
        names = self._plan.names
        held = names.of_group(names.ties.get(self._names.in_memory[key], ()))
        if not held:
            return False
        change = self._plan.changes.get(held[0])
        if change is not None:
            return self._result.has(key, change.tensor())
        return self._plan.base.same_bytes(held[0], self._result, key)

    def _check_shapes(self) -> None:
        """Whether the config describes the tensors: their sizes may be new."""
        found = self._names.architecture
        for name, shape in ({} if found is None else found.shapes).items():
            key = self._names.keys.get(name)
            entry = None if key is None else self._result.entry(key)
            if entry is not None and entry.dtype in _FLOAT and entry.shape != shape and math.prod(shape):
                self.errors.append(f"{key} has shape {entry.shape}, config.json says {shape}.")
