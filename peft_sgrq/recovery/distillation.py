"""The second stage: all scales together, to give the next-token probabilities of the model before quantization."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

from peft_sgrq.passes.data import Batch
from peft_sgrq.passes.processes import gather, together
from peft_sgrq.passes.running import runner
from peft_sgrq.recovery.descent import Descent
from peft_sgrq.recovery.job import Job

logger = logging.getLogger(__name__)


@dataclass
class Distillation:
    """How far next-token probabilities are from those of the model before quantization.

    Attributes:
        before, after (`float`): `KL(p_reference || p)` over the data of all processes, before and after,
            in nats a token.
        steps (`list[float]`): The same for the batches of each step, before the step.
    """

    before: float
    after: float
    steps: list[float] = field(default_factory=list)


def divergence(logits: torch.Tensor, reference: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """The sum over the tokens that count of `KL(p_reference || p)`, float32 scalar, in nats.

    Args:
        logits, reference (`torch.Tensor`): `[B, T, V]` of any floating dtype; `reference` on any device.
        counted (`torch.Tensor`): Bool `[B, T]`.
    """
    found = torch.zeros((), device=logits.device)
    for ours, theirs, mask in zip(logits, reference, counted, strict=True):  # float32 copies of one sequence at a time
        mask = mask.to(logits.device)
        log_p = F.log_softmax(ours[mask].float(), dim=-1)  # (t, V)
        log_q = F.log_softmax(theirs.to(logits.device)[mask].float(), dim=-1)
        terms = F.kl_div(log_p, log_q, reduction="none", log_target=True)
        found = found + terms.masked_fill(log_q == -torch.inf, 0).sum()  # 0 log 0, where a model masks tokens
    return found


class Distilling:
    """The training of all scales on the divergence; `job` is the recovery."""

    def __init__(self, job: Job) -> None:
        self._batches, self._deltas, self._settings, self._bar = job.batches, job.deltas, job.settings, job.bar
        # An encoder-decoder makes the inputs of its decoder of the labels.
        self._decoder = bool(getattr(getattr(job.model, "config", None), "is_encoder_decoder", False))
        self._run = runner(job.model, self._decoder)
        self._reference = job.reference.run_with_labels if self._decoder else job.reference.run

    def train(self) -> Distillation:
        """Trains by AdamW with a cosine schedule, and puts the deltas back if the divergence has not become less.

        A step takes a batch of each process, in an order that the seed sets anew each time round.

        Raises:
            ValueError: If the models return no logits, of other shapes, or not finite ones.
        """
        steps = self._settings.distill_steps
        self._bar.reset(total=steps)
        found = Distillation(self.measure(), math.nan)
        descent = Descent(list(self._deltas.values()), self._settings.distill_learning_rate, steps)
        generator = torch.Generator().manual_seed(self._settings.seed)
        rounds = max(gather(len(self._batches)))  # some processes may have fewer batches
        order: list[int] = []
        for _ in range(steps):
            order = order or torch.randperm(rounds, generator=generator).tolist()
            number = order.pop()
            mine = self._batches[number : number + 1]
            with torch.enable_grad(), together():
                loss = self._divergence(mine[0]) if mine else None
            descent.step(loss)
            parts = gather((0.0 if loss is None else loss.item(), sum(map(self._tokens, mine))))
            found.steps.append(sum(part for part, _ in parts) / max(1, sum(tokens for _, tokens in parts)))
            self._bar.set_postfix_str(f"divergence {found.steps[-1]:.4f}", refresh=False)
            self._bar.update()
        found.after = self.measure()
        if not found.after < found.before:
            logger.warning(
                "Distillation did not lower the divergence of %.4g nats a token and was undone; lower "
                "`distill_learning_rate`.",
                found.before,
            )
            found.after = found.before
            descent.undo()
        return found

    @torch.no_grad()
    def measure(self) -> float:
        """The divergence over all of the data of all processes, in nats a token."""
        tokens = sum(gather(sum(map(self._tokens, self._batches))))
        with together():
            found = sum(self._divergence(batch).item() for batch in self._batches)
        return sum(gather(found)) / max(1, tokens)

    def _counted(self, batch: Batch) -> torch.Tensor:
        return batch.decoder_counted if self._decoder and batch.decoder_counted is not None else batch.counted

    def _tokens(self, batch: Batch) -> int:
        return int(self._counted(batch).sum())

    def _divergence(self, batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            theirs = _logits(self._reference(batch))
        ours, counted = _logits(self._run(batch)), self._counted(batch)
        if ours.shape != theirs.shape or ours.shape[:2] != counted.shape:
            raise ValueError(
                f"The model's logits have shape {tuple(ours.shape)} and the reference's {tuple(theirs.shape)} for "
                f"tokens {tuple(counted.shape)}, expected the same, of each token; leave `distill_steps` at 0, which "
                "is for language models."
            )
        found = divergence(ours, theirs, counted)
        if not torch.isfinite(found):
            raise ValueError(
                f"The divergence of next-token probabilities is {found.item()}, expected a finite number; load both "
                "models in bfloat16 or float32, or lower `distill_learning_rate`."
            )
        return found


def _logits(output: Any) -> torch.Tensor:
    logits = getattr(output, "logits", None)
    if not isinstance(logits, torch.Tensor):
        raise ValueError(
            f"The model returned a {type(output).__name__} without logits, expected those of a language model; "
            "leave `distill_steps` at 0."
        )
    return logits
