"""The descent both stages make: deltas by AdamW with a cosine schedule, no scale across zero, and the way back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import get_cosine_schedule_with_warmup

from peft_sgrq.layer.delta import Delta
from peft_sgrq.passes.processes import gather, process_count, sum_over_processes

LEAST_DELTA = -0.99  # a scale keeps at least a hundredth of its size, and so its sign
_WARM_UP = 0.05  # of the steps


class Descent:
    """The training of some deltas, by all processes together.

    Args:
        deltas (`Sequence[Delta]`): What is trained.
        learning_rate (`float`): The largest one of the schedule; deltas are relative changes.
        steps (`int`): How many steps there will be.
    """

    def __init__(self, deltas: Sequence[Delta], learning_rate: float, steps: int) -> None:
        self._weights = [delta.weight for delta in deltas]
        self._before = [weight.detach().clone() for weight in self._weights]
        self._optimizer = torch.optim.AdamW(self._weights, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
        self._schedule = get_cosine_schedule_with_warmup(self._optimizer, round(_WARM_UP * steps), steps)

    def step(self, loss: torch.Tensor | None) -> bool:
        """Takes a step down the sum of the losses of all processes; deltas it does not depend on stay.

        Args:
            loss (`torch.Tensor` or `None`): The loss of this process; `None` if it has no batch left.

        Returns:
            `bool`: Whether the sum depends on any of the deltas; if not, there is no step.
        """
        gradients: Sequence[torch.Tensor | None] = [None] * len(self._weights)
        if loss is not None and loss.requires_grad:
            gradients = torch.autograd.grad(loss, self._weights, allow_unused=True)
        gradients = _summed(self._weights, gradients)
        if all(gradient is None for gradient in gradients):
            return False
        for weight, gradient in zip(self._weights, gradients, strict=True):
            weight.grad = gradient
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            for weight in self._weights:
                weight.clamp_(min=LEAST_DELTA)
        return True

    @torch.no_grad()
    def undo(self) -> None:
        """Puts the deltas back where they were."""
        for weight, before in zip(self._weights, self._before, strict=True):
            weight.copy_(before)


def _summed(
    weights: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]
) -> Sequence[torch.Tensor | None]:
    """The gradients summed over all processes; `None` where no process has one."""
    if process_count() == 1:
        return gradients
    there = map(any, zip(*gather([gradient is not None for gradient in gradients]), strict=True))
    sums = [
        None if not found else torch.zeros_like(weight) if gradient is None else gradient
        for weight, gradient, found in zip(weights, gradients, there, strict=True)
    ]
    sum_over_processes(one for one in sums if one is not None)
    return sums
