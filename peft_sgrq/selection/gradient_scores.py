"""Scores from a backward pass: a criterion of the weights' gradients, added up over sequences.

Only scores are kept of a layer's weight gradient, `dy^T x` for one sequence. The forward pass is that of the tuner, so
a format whose own kernel drops gradients gives them too. Parameters get no gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from peft_sgrq.formats.scaled_weight import ScaledWeight
from peft_sgrq.passes.data import Batch
from peft_sgrq.passes.gradients import observe_gradients
from peft_sgrq.passes.processes import sum_over_processes
from peft_sgrq.passes.running import runner, tuned_forward

GradientCriterion = Callable[[torch.Tensor, torch.Tensor, ScaledWeight], torch.Tensor]


def collect_gradient_scores(
    model: nn.Module,
    scaled_weights: Mapping[str, ScaledWeight],
    batches: Sequence[Batch],
    criterion: GradientCriterion,
    tokens: int,
    bar: Any,
) -> dict[str, torch.Tensor]:
    """Scores of layers by gradients of the model's loss; needs the memory of a training step on a batch.

    Args:
        model (`nn.Module`): The model, in eval mode.
        scaled_weights (`dict[str, ScaledWeight]`): The layers by name.
        batches (`Sequence[Batch]`): The data of this process.
        criterion (`Callable`): `(weight, gradient, scaled_weight)` -> scores of one sequence, from the float32 weight
            `[N, K]` and the gradient in it; twice the gradient must score four times as much.
        tokens (`int`): How many tokens the data of all processes has; scores are divided by it.
        bar: A tqdm progress bar.

    Returns:
        `dict[str, torch.Tensor]`: By name, summed over all processes, float64 `[K]`, or `[N]` of rows.

    Raises:
        ValueError: If the model returns no loss.
    """
    collected, layers = {}, {}
    for name, weight in scaled_weights.items():
        collected[name] = torch.zeros(weight.lines, dtype=torch.float64, device=weight.device)
        unchanged = torch.zeros(weight.delta_shape(weight.selectable), device=weight.device)
        layers[name] = (weight.module, tuned_forward(weight, unchanged, None))

    def take(name: str, gradients: Iterator[torch.Tensor]) -> None:
        scaled_weight = scaled_weights[name]
        weight = scaled_weight.dequantize(scaled_weight.scales(), torch.float32)  # (N, K)
        for gradient in gradients:
            scores = criterion(weight, gradient, scaled_weight)
            collected[name] += scaled_weight.unit.sum_to_lines(scores).double()

    run = runner(model, with_labels=True)
    bar.reset(total=len(batches))
    for batch in batches:
        observe_gradients(model, layers, batch, run, take)
        bar.update()
    sum_over_processes(collected.values())
    return {name: scores / tokens for name, scores in collected.items()}
