"""Training the scales of one transformer block to give the outputs of the block before quantization.

With `f` the block before quantization and `f_q` the quantized one, `X` and `X_q` their inputs, the loss is

    mean |f_q(X_q) - T|^2 / e_0 + preservation * R / R_0,    T = f(X), or (f(X) + f(X_q)) / 2,

where `e_0` and `R_0` are the values of the two terms before training, so that both begin at one and their weight means
the same in every block and model. The mean of both targets has the gradients of
`|f_q(X_q) - f(X)|^2 + |f_q(X_q) - f(X_q)|^2`, the augmented loss of Cao and Aref 2025 (arXiv 2504.13932): the two
differ by a factor of two and a constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from peft_sgrq.layer.delta import Delta
from peft_sgrq.recovery.descent import Descent
from peft_sgrq.recovery.preservation import Pull

Run = Callable[[int], torch.Tensor]


@dataclass(frozen=True)
class BlockError:
    """How far the outputs of a block are from those of the model before quantization.

    Attributes:
        name (`str`): Name of the block.
        before, after (`float`): `|f_q(X_q) - f(X)|^2 / |f(X)|^2` over all counted tokens, before and after training.
        seconds (`float`): What the block took.
    """

    name: str
    before: float
    after: float
    seconds: float


def squared_error(output: torch.Tensor, target: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """The sum of squared differences over the tokens that count, float32 scalar.

    Args:
        output, target (`torch.Tensor`): Hidden states `[B, T, D]` of any floating dtype.
        counted (`torch.Tensor`): Bool `[B, T]`; where hidden states have another form all tokens count.
    """
    errors = (output.float() - target.float()).square().sum(-1)  # (B, T)
    return errors[counted].sum() if errors.shape == counted.shape else errors.sum()


class BlockTraining:
    """The training of one block.

    Args:
        run (`Callable`): `number -> f_q(X_q)` of a batch, differentiable in the deltas.
        targets (`Sequence[torch.Tensor]`): `T` by batch, `[B, T, D]`.
        counted (`Sequence[torch.Tensor]`): The tokens that count by batch, bool `[B, T]`.
        deltas (`Sequence[Delta]`): What is trained.
        pulls (`Sequence[tuple[Pull, int]]`): The preservation term of each of them, and the dimension it selects
            along; empty without preservation.
        preservation (`float`): The weight of that term.
    """

    def __init__(
        self,
        run: Run,
        targets: Sequence[torch.Tensor],
        counted: Sequence[torch.Tensor],
        deltas: Sequence[Delta],
        pulls: Sequence[tuple[Pull, int]],
        preservation: float,
    ) -> None:
        self._run, self._targets, self._counted = run, targets, counted
        self._deltas, self._pulls, self._preservation = deltas, pulls, preservation
        self._tokens = [int(mask.sum()) for mask in counted]

    @torch.no_grad()
    def error(self) -> float:
        """The sum over all batches of `|f_q(X_q) - T|^2`."""
        return sum(float(self._error(number)) for number in range(len(self._targets)))

    def _error(self, number: int) -> torch.Tensor:
        output = self._run(number)
        return squared_error(output, self._targets[number].to(output.device), self._counted[number].to(output.device))

    def _preserved(self) -> torch.Tensor:
        terms = [
            pull.at(delta.values(), delta.selected(), dim)
            for delta, (pull, dim) in zip(self._deltas, self._pulls, strict=True)
        ]
        return torch.stack([term.to(terms[0].device) for term in terms]).sum()

    def train(self, epochs: int, learning_rate: float, seed: int, advance: Callable[[], object]) -> bool:
        """Trains the deltas by AdamW with a cosine schedule, and puts them back if the error has not become less.

        Args:
            epochs (`int`): How often all batches are seen.
            learning_rate (`float`): The largest one of the schedule; deltas are relative changes.
            seed (`int`): Of the order of the batches.
            advance (`Callable`): Called after each step.

        Returns:
            `bool`: Whether the error has become less, or there was nothing to train.

        Raises:
            ValueError: If the error is not finite before anything is trained.
        """
        start = self.error()
        tokens = sum(self._tokens)
        if not math.isfinite(start):
            raise ValueError(
                "Outputs are not finite on the calibration data, expected finite hidden states of both models; check "
                "their weights, or load them in bfloat16 or float32."
            )
        if start == 0 or not self._deltas:
            return True
        with torch.no_grad():
            preserved = float(self._preserved()) if self._pulls else 0.0
        descent = Descent(self._deltas, learning_rate, epochs * len(self._targets))
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            for number in torch.randperm(len(self._targets), generator=generator).tolist():
                with torch.enable_grad():
                    # Sums over tokens: gradients of means would underflow in float16, and Adam does not mind.
                    loss = self._error(number) * (tokens / start)
                    if preserved > 0:
                        loss = loss + self._preserved() * (self._preservation * self._tokens[number] / preserved)
                if not loss.requires_grad:
                    return True  # none of the layers was called
                descent.step(loss)
                advance()
        if self.error() < start:
            return True
        descent.undo()  # also when it is NaN
        return False
