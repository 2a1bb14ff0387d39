"""Scores from a backward pass: a criterion of the weights' gradients, added up over sequences.

Of a layer's weight gradient, `dy^T x` of one sequence, no more is kept than the scores it adds to. The forward pass is
that of the tuner, so a format whose own kernel drops gradients gives them too. Parameters get no gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from peft_sgrq.formats.own_forward import within_accelerate
from peft_sgrq.formats.scaled_weight import ScaledWeight
from peft_sgrq.layer.functional import scaled_linear
from peft_sgrq.passes.data import Batch
from peft_sgrq.passes.gradients import observe_gradients
from peft_sgrq.passes.processes import sum_over_processes

GradientCriterion = Callable[[torch.Tensor, torch.Tensor, ScaledWeight], torch.Tensor]


class GradientScores:
    """Scores of layers by gradients of a loss, added up over sequences.

    Args:
        scaled_weights (`dict[str, ScaledWeight]`): The layers by name.
        criterion (`Callable`): `(weight, gradient, scaled_weight)` -> scores of one sequence, of the float32 weight
            `[N, K]` and the gradient in it; twice the gradient is to score four times as much.
    """

    def __init__(self, scaled_weights: Mapping[str, ScaledWeight], criterion: GradientCriterion) -> None:
        self._scaled_weights = scaled_weights
        self._criterion = criterion
        self._scores: dict[str, torch.Tensor] = {}
        for name, scaled_weight in scaled_weights.items():
            self._scores[name] = torch.zeros(scaled_weight.lines, dtype=torch.float64, device=scaled_weight.device)

    def add(self, model: nn.Module, batch: Batch, run: Callable[[Batch], Any]) -> None:
        """Adds the sequences of a batch; needs the memory of a training step on it.

        Raises:
            ValueError: If the model returns no loss.
        """
        layers = {
            name: (scaled_weight.module, _tuned_forward(scaled_weight))
            for name, scaled_weight in self._scaled_weights.items()
        }
        observe_gradients(model, layers, batch, run, self._take)

    def _take(self, name: str, gradients: Iterator[torch.Tensor]) -> None:
        scaled_weight = self._scaled_weights[name]
        weight = scaled_weight.dequantize(scaled_weight.scales(), torch.float32)  # (N, K)
        for gradient in gradients:
            scores = self._criterion(weight, gradient, scaled_weight)
            self._scores[name] += scaled_weight.unit.sum_to_lines(scores).double()

    def finish(self, tokens: int) -> dict[str, torch.Tensor]:
        """The scores by name, summed over all processes and divided by the number of tokens, float64."""
        sum_over_processes(self._scores.values())
        return {name: scores / tokens for name, scores in self._scores.items()}


def _tuned_forward(scaled_weight: ScaledWeight) -> Any:
    """The tuner's forward pass of a layer with nothing changed."""
    unchanged = torch.zeros(scaled_weight.delta_shape(scaled_weight.selectable), device=scaled_weight.device)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return scaled_weight.cast_output(scaled_linear(scaled_weight.cast_input(x), unchanged, None, scaled_weight), x)

    return within_accelerate(scaled_weight.module, forward)
