"""Training the scales of one transformer block to give the outputs of the block before quantization.

With `f` the block before quantization and `f_q` the quantized one, `X` and `X_q` their inputs, the loss is

    mean |f_q(X_q) - T|^2 / e_0 + preservation * R / R_0,    T = f(X), or (f(X) + f(X_q)) / 2,

where `e_0` and `R_0` are the values of the two terms before training, so that both begin at one and their weight means
the same in every block and model. The mean of both targets has the gradients of
`|f_q(X_q) - f(X)|^2 + |f_q(X_q) - f(X_q)|^2`, the augmented loss of Cao and Aref 2025 (arXiv 2504.13932): the two
differ by a factor of two and a constant. Means and sums are over the data of all processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from peft_sgrq.layer.delta import Delta
from peft_sgrq.passes.processes import gather
from peft_sgrq.recovery.descent import Descent
from peft_sgrq.recovery.job import Settings
from peft_sgrq.recovery.preservation import Pull


def squared_error(output: torch.Tensor, target: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """The sum of squared differences over the tokens that count, float32 scalar on the device of `output`.

    Args:
        output, target (`torch.Tensor`): Hidden states `[B, T, D]` of any floating dtype.
        counted (`torch.Tensor`): Bool `[B, T]`; where hidden states have another form all tokens count.
    """
    errors = (output.float() - target.to(output.device).float()).square().sum(-1)  # (B, T)
    return errors[counted.to(errors.device)].sum() if errors.shape == counted.shape else errors.sum()


def train_block(
    run: Callable[[int], torch.Tensor],
    targets: Sequence[torch.Tensor],
    counted: Sequence[torch.Tensor],
    deltas: Sequence[Delta],
    pulls: Sequence[tuple[Pull, int]],
    settings: Settings,
    seed: int,
    advance: Callable[[], object],
) -> bool:
    """Trains the deltas of a block by AdamW with a cosine schedule; puts them back if the error has not become less.

    Args:
        run (`Callable`): `number -> f_q(X_q)` of a batch, differentiable in the deltas.
        targets (`Sequence[torch.Tensor]`): `T` by batch, `[B, T, D]`.
        counted (`Sequence[torch.Tensor]`): The tokens that count by batch, bool `[B, T]`.
        deltas (`Sequence[Delta]`): What is trained.
        pulls (`Sequence[tuple[Pull, int]]`): The preservation term of each of them, and the dimension it selects
            along; empty without preservation.
        settings (`Settings`): Epochs, learning rate and the weight of preservation.
        seed (`int`): Seed for the order of the batches.
        advance (`Callable`): Called after each step.

    Returns:
        `bool`: Whether the error has become less, or there was nothing to train.

    Raises:
        ValueError: If the error is not finite before anything is trained.
    """

    def error(number: int) -> torch.Tensor:
        return squared_error(run(number), targets[number], counted[number])

    @torch.no_grad()
    def error_of_all() -> float:
        return sum(gather(sum(float(error(number)) for number in range(len(targets)))))

    def preserved() -> torch.Tensor:
        terms = [
            pull.at(delta.values(), delta.selected(), dim) for delta, (pull, dim) in zip(deltas, pulls, strict=True)
        ]
        return torch.stack([term.to(terms[0].device) for term in terms]).sum()

    start = error_of_all()
    if not math.isfinite(start):
        raise ValueError(
            "Outputs are not finite on the calibration data, expected finite hidden states of both models; check "
            "their weights, or load them in bfloat16 or float32."
        )
    if start == 0 or not deltas:
        return True
    tokens = [int(mask.sum()) for mask in counted]
    tokens_of_all = sum(gather(sum(tokens)))
    at_start = float(preserved().detach()) if pulls else 0.0

    @torch.enable_grad()
    def loss_of(number: int) -> torch.Tensor:
        # Sums over tokens: gradients of means would underflow in float16, and Adam does not mind.
        loss = error(number) * (tokens_of_all / start)
        return loss + preserved() * (settings.preservation * tokens[number] / at_start) if at_start > 0 else loss

    rounds = max(gather(len(targets)))  # some processes may have fewer batches
    descent = Descent(deltas, settings.learning_rate, settings.epochs * rounds)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(settings.epochs):
        for number in torch.randperm(rounds, generator=generator).tolist():
            if not descent.step(loss_of(number) if number < len(targets) else None):
                return True  # none of the layers was called
            advance()
    if error_of_all() < start:
        return True
    descent.undo()  # also when it is NaN
    return False
