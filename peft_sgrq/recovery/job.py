"""One recovery: what is recovered, with what, and how."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from torch import nn

from peft_sgrq.layer.delta import Delta
from peft_sgrq.layer.linear import SGRQLinear
from peft_sgrq.passes.data import Batch
from peft_sgrq.passes.reference import Reference
from peft_sgrq.recovery.preservation import IMPORTANCES


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a model is recovered; the fields are arguments of [`recover`] and described there."""

    epochs: int
    learning_rate: float
    augmented: bool
    preservation: float
    importance: str
    distill_steps: int
    distill_learning_rate: float
    seed: int

    def check(self) -> None:
        """Raises a ValueError or TypeError if a field has a value that cannot be used."""
        for name in ("epochs", "distill_steps", "seed", "learning_rate", "preservation", "distill_learning_rate"):
            value, whole = getattr(self, name), name in ("epochs", "distill_steps", "seed")
            kind: Any = Integral if whole else (int, float)
            expected = "an int" if whole else "a number"
            if isinstance(value, bool) or not isinstance(value, kind):
                raise TypeError(f"`{name}` is {value!r}, expected {expected}.")
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"`{name}` is {value}, expected {expected} >= 0.")
        if not isinstance(self.augmented, bool):
            raise TypeError(f"`augmented` is {self.augmented!r}, expected True or False.")
        if self.importance not in IMPORTANCES:
            raise ValueError(f"`importance` is {self.importance!r}, expected one of {IMPORTANCES}.")
        if not self.epochs and not self.distill_steps:
            raise ValueError(
                "`epochs` and `distill_steps` are both 0 and nothing would be trained, expected one of them above 0."
            )


@dataclass(frozen=True)
class Job:
    """One recovery.

    Attributes:
        model (`nn.Module`): The quantized model with the adapter on it, in eval mode.
        layers (`dict[str, SGRQLinear]`): Its adapted layers by name.
        stack (`tuple[str, nn.ModuleList]` or `None`): The list of its blocks, and its name.
        deltas (`dict[str, Delta]`): What is trained, by layer.
        reference (`Reference`): The model before quantization.
        batches (`list[Batch]`): The data.
        settings (`Settings`): How it is recovered.
        bar: A tqdm progress bar.
    """

    model: nn.Module
    layers: Mapping[str, SGRQLinear]
    stack: tuple[str, nn.ModuleList] | None
    deltas: Mapping[str, Delta]
    reference: Reference
    batches: list[Batch]
    settings: Settings
    bar: Any
