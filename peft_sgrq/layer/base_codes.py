"""A check that the codes of a base layer are those its adapter was made for, whenever something has written to them.

Averages of models (EMA) take in parameters, and the codes of bitsandbytes, HQQ and compressed-tensors are integer
parameters: their mean in floating point is cut off, to codes of another weight. Nothing else shows it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from peft_sgrq.formats.scaled_weight import ScaledWeight


class BaseCodes:
    """What the codes of a layer were, by their digest; it is made again only where a version counter has moved.

    Args:
        scaled_weight (`ScaledWeight`): The layer.
    """

    def __init__(self, scaled_weight: ScaledWeight) -> None:
        self._versions = _versions(scaled_weight)
        self._digest = _digest(scaled_weight) if self._versions else ""

    def check(self, scaled_weight: ScaledWeight) -> None:
        """Raises a RuntimeError if the codes are others by now."""
        versions = _versions(scaled_weight)
        if versions == self._versions or not versions or not self._versions:
            return
        if _digest(scaled_weight) != self._digest:
            raise RuntimeError(
                "The codes of a quantized layer are others than when its adapter was added, expected the same: an "
                "average of models (EMA) takes the mean of integers, or another base was loaded; average what is "
                "trained alone (parameters that require a gradient), and load the base before the adapter."
            )
        self._versions = versions


def _versions(scaled_weight: ScaledWeight) -> list[int]:
    """The version counters of integer parameters; none where an engine has them, or nobody counts."""
    integers: list[Any] = [
        parameter
        for parameter in scaled_weight.module._parameters.values()
        if parameter is not None and not parameter.is_floating_point()
    ]
    if any(
        isinstance(each, DTensor) or each.is_meta or each.is_inference() or hasattr(each, "ds_id") for each in integers
    ):
        return []
    return [each._version for each in integers]


def _digest(scaled_weight: ScaledWeight) -> str:
    with torch.no_grad():
        return scaled_weight.fingerprint().split(":")[1]
