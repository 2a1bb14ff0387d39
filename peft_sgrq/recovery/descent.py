"""The descent both stages make: deltas by AdamW with a cosine schedule, no scale across zero, and the way back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import get_cosine_schedule_with_warmup

from peft_sgrq.layer.delta import Delta
from peft_sgrq.passes.processes import process_count, sum_over_processes

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
    device = weights[0].device
    there = torch.tensor([gradient is not None for gradient in gradients], dtype=torch.float32, device=device)
    known = [torch.zeros_like(weights[i]) if one is None else one for i, one in enumerate(gradients)]
    joined = torch.cat([*(one.reshape(-1).to(device) for one in known), there])
    sum_over_processes([joined])  # all at once: what costs is waiting for each other
    *sums, there = joined.split([*(weight.numel() for weight in weights), len(weights)])
    return [
        one.view(weight.shape).to(weight.device) if found else None
        for weight, one, found in zip(weights, sums, there.tolist(), strict=True)
    ]
