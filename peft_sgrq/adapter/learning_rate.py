"""A warning for learning rates of other adapters: at LoRA's 2e-4 scales hardly move, and nothing else would say so.

Who trains an adapter makes the optimizer, so it is looked at where it is used: by a hook on the first step of any
optimizer that has deltas to train. The peak of a schedule is what the scheduler has noted in the optimizer.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from peft_sgrq.choices import RECOMMENDED_LEARNING_RATE
from peft_sgrq.layer.delta import DeltaParameter

_LOW = 1e-3
_handles: list[Any] = []


def watch_learning_rate() -> None:
    """Has the first step of an optimizer that trains deltas warn if its learning rate is one of LoRA's."""
    if not _handles:
        _handles.append(register_optimizer_step_pre_hook(_look))


def _look(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    rates = [
        float(group.get("initial_lr", group["lr"]))
        for group in optimizer.param_groups
        if any(isinstance(parameter, DeltaParameter) for parameter in group["params"])
    ]
    if not rates:
        return
    while _handles:
        _handles.pop().remove()
    # Other optimizers have other units: the step of Adam is about its rate.
    if "adam" in type(optimizer).__name__.lower() and max(rates) < _LOW:
        warnings.warn(
            f"The learning rate is {max(rates):g}, expected about {RECOMMENDED_LEARNING_RATE:g}: scales change by a "
            "share of themselves, and rates of LoRA hardly move them; set `learning_rate`, or "
            "SGRQConfig(check_learning_rate=False) if it is meant."
        )
