"""Running a model on batches of data."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from peft_sgrq.passes.data import Batch


def longest(model: nn.Module, max_length: int) -> int:
    """`max_length`, or how many positions the model has if that is less."""
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return min(max_length, positions) if isinstance(positions, int) and positions > 0 else max_length


def runner(model: nn.Module, with_labels: bool = False) -> Callable[[Batch], Any]:
    """Runs the model on what of a batch its forward pass takes."""
    parameters = inspect.signature(model.forward).parameters
    device = next(parameter.device for parameter in model.parameters() if not parameter.is_meta)
    any_keyword = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    extra = {"use_cache": False} if "use_cache" in parameters else {}

    def run(batch: Batch) -> Any:
        if "input_ids" not in parameters and not any_keyword:
            return model(batch.inputs["input_ids"].to(device))
        wanted = {key: value for key, value in batch.inputs.items() if with_labels or key != "labels"}
        if "input_ids" in parameters:  # a wrapper that takes anything is given everything
            wanted = {key: value for key, value in wanted.items() if key in parameters}
        return model(**{key: value.to(device) for key, value in wanted.items()}, **extra)

    return run
