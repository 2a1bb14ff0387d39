"""Running a model on batches of data, and its layers otherwise than they do by themselves."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from peft_sgrq.formats.own_forward import within_accelerate
from peft_sgrq.formats.scaled_weight import ScaledWeight
from peft_sgrq.layer.functional import scaled_linear
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


def loss_of(output: Any, inputs: Collection[str]) -> torch.Tensor:
    """The loss that a model returned; a ValueError if there is none. `inputs` names what it was given."""
    loss = getattr(output, "loss", None)
    if not isinstance(loss, torch.Tensor):
        raise ValueError(
            f"The model returned no loss for a batch with {sorted(inputs)}, expected one to differentiate; give data "
            "with the labels its forward method takes, or choose what needs no loss."
        )
    return loss


def tuned_forward(
    scaled_weight: ScaledWeight, delta: torch.Tensor, units: torch.Tensor | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The forward pass of a layer as if an adapter had these deltas, see `scaled_linear`."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        return scaled_weight.cast_output(scaled_linear(scaled_weight.cast_input(x), delta, units, scaled_weight), x)

    return within_accelerate(scaled_weight.module, forward)
