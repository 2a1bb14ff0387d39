"""A check of models: one that computes with the weight of a layer itself passes the layer's adapter by.

`F.linear(x, layer.weight)`, and kernels that take the weights of several layers at once, give the bits of the base
however an adapter was trained, and those of the adapter once it is merged. A layer whose weight is read while the
whole model computes has to run, too, in that pass: models read weights for their dtype as well.
"""

from __future__ import annotations

import warnings
from typing import Any

_NAMED = 10


class ReadWeights:
    """Which layers of a model had their weight read in a forward pass.

    Attributes:
        number (`int`): The forward pass that is open, or was last; layers note it when they run.
    """

    def __init__(self) -> None:
        self.number = 1
        self._open = False
        self._read: dict[str, Any] = {}
        self._told: set[str] = set()

    def begin(self) -> None:
        """A forward pass of the whole model begins."""
        self.number += 1
        self._open = True
        self._read.clear()

    def note(self, name: str, layer: Any) -> None:
        """The weight of an adapted layer is read."""
        if self._open:
            self._read[name] = layer

    def end(self, trains: bool) -> None:
        """The pass ends.

        Args:
            trains (`bool`): Whether it was one of training.

        Raises:
            RuntimeError: In training, if a layer with deltas that are trained was read and has never run.
        """
        self._open = False
        if not self._read:
            return
        passed_by = {name: layer for name, layer in self._read.items() if layer.is_passed_by(self.number)}
        self._read.clear()
        never = [name for name, layer in passed_by.items() if trains and layer.has_never_run()]
        if never:
            raise RuntimeError(_sentence(never))
        new = [name for name in passed_by if name not in self._told]
        if new:
            self._told.update(new)
            warnings.warn(_sentence(new))


def _sentence(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" * (len(names) > _NAMED)
    return (
        f"The model read the weight of {len(names)} layers with an adapter in its forward pass and did not run the "
        f"layers ({', '.join(map(repr, names[:_NAMED]))}{more}), expected a call of each: a model that computes with "
        "the weight itself passes the adapter by, and computes otherwise once it is merged. Leave the layers out, "
        "with these names as `exclude_modules`, or have the model call them."
    )
