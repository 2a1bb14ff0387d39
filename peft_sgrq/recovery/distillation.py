"""The second stage: all scales together, to give the next-token probabilities of the model before quantization."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from transformers import get_cosine_schedule_with_warmup

from peft_sgrq.delta import Delta
from peft_sgrq.recovery.block import LEAST_DELTA, WARM_UP
from peft_sgrq.selection.data import Batch


def divergence(logits: torch.Tensor, reference: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """The sum over the tokens that count of `KL(p_reference || p)`, float32 scalar, in nats.

    Args:
        logits, reference (`torch.Tensor`): `[B, T, V]` of any floating dtype; `reference` on any device.
        counted (`torch.Tensor`): Bool `[B, T]`.
    """
    total = torch.zeros((), device=logits.device)
    for ours, theirs, mask in zip(logits, reference, counted, strict=True):  # float32 copies of one sequence at a time
        mask = mask.to(logits.device)
        log_p = F.log_softmax(ours[mask].float(), dim=-1)  # (t, V)
        log_q = F.log_softmax(theirs.to(logits.device)[mask].float(), dim=-1)
        total = total + F.kl_div(log_p, log_q, reduction="sum", log_target=True)
    return total


def distill(
    run: Callable[[Batch], Any],
    reference: Callable[[Batch], Any],
    deltas: Sequence[Delta],
    batches: Sequence[Batch],
    steps: int,
    learning_rate: float,
    seed: int,
    advance: Callable[[float], object],
) -> list[float]:
    """Trains deltas on the divergence from the reference's probabilities, by AdamW with a cosine schedule.

    Args:
        run, reference (`Callable`): Run the quantized model and the reference on a batch; both return `logits`.
        deltas (`Sequence[Delta]`): What is trained.
        batches (`Sequence[Batch]`): The data, one batch a step, in an order that `seed` sets anew each time round.
        steps (`int`): How many steps.
        learning_rate (`float`): The largest one of the schedule.
        seed (`int`): Of the order of the batches.
        advance (`Callable`): Given the mean divergence of each step, in nats a token.

    Returns:
        `list[float]`: The mean divergence of each step's batch, before the step.

    Raises:
        ValueError: If the models return no logits, or of other shapes.
    """
    weights = [delta.weight for delta in deltas]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(WARM_UP * steps), steps)
    generator = torch.Generator().manual_seed(seed)
    divergences: list[float] = []
    order: list[int] = []
    for _ in range(steps):
        order = order or torch.randperm(len(batches), generator=generator).tolist()
        batch = batches[order.pop()]
        with torch.no_grad():
            theirs = _logits(reference(batch))
        with torch.enable_grad():
            ours = _logits(run(batch))
            if ours.shape != theirs.shape or ours.shape[:2] != batch.counted.shape:
                raise ValueError(
                    f"The model's logits have shape {tuple(ours.shape)} and the reference's {tuple(theirs.shape)}, "
                    "expected the same, of each token; leave `distill_steps` at 0, which is for language models."
                )
            loss = divergence(ours, theirs, batch.counted)
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights, allow_unused=True), strict=True):
            weight.grad = gradient
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for weight in weights:
                weight.clamp_(min=LEAST_DELTA)
        divergences.append(loss.item() / max(1, int(batch.counted.sum())))
        advance(divergences[-1])
    optimizer.zero_grad()
    return divergences


def _logits(output: Any) -> torch.Tensor:
    logits = getattr(output, "logits", None)
    if not isinstance(logits, torch.Tensor):
        raise ValueError(
            f"The model returned a {type(output).__name__} without logits, expected those of a language model; "
            "leave `distill_steps` at 0."
        )
    return logits
