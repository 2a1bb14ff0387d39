"""Trial deltas on a model without an adapter: losses and gradients as tuning would have them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from peft_sgrq.formats.compressed_tensors.weight import pass_gradients
from peft_sgrq.formats.own_forward import forward_replaced, within_accelerate
from peft_sgrq.formats.scaled_weight import ScaledWeight
from peft_sgrq.layer.functional import scaled_linear
from peft_sgrq.passes.data import IGNORED, Batch
from peft_sgrq.passes.processes import gather
from peft_sgrq.passes.untouched import untouched


class Probe:
    """A model whose target layers compute with trial deltas, see `probing`.

    Attributes:
        deltas (`dict[str, torch.Tensor]`): By layer, float32, shaped as in `effective_scales`, zero at the start;
            may be written to.
    """

    def __init__(self, model: nn.Module, deltas: dict[str, torch.Tensor]) -> None:
        self.deltas = deltas
        self._model = model
        self._device = next(model.parameters()).device

    def loss(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The model's own loss of a batch, differentiable in the deltas."""
        output = self._model(**{key: value.to(self._device) for key, value in batch.items()})
        if getattr(output, "loss", None) is None:
            raise ValueError(
                f"The model returned no loss for a batch with {sorted(batch)}, expected one to differentiate; give "
                "data with the labels its forward method takes."
            )
        return output.loss.float()

    def gradients(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Gradients of the loss of a batch in the deltas, by layer, float32; zero for a layer that was not used."""
        with torch.enable_grad():
            gradients = torch.autograd.grad(self.loss(batch), list(self.deltas.values()), allow_unused=True)
        return {
            name: torch.zeros_like(delta) if gradient is None else gradient
            for (name, delta), gradient in zip(self.deltas.items(), gradients, strict=True)
        }

    @torch.no_grad()
    def mean_loss(self, batches: list[dict[str, torch.Tensor]]) -> float:
        """The loss by label over the batches of all processes, in float64."""
        counts = [count_labels(batch) for batch in batches]
        losses = [self.loss(batch).double().item() * count for batch, count in zip(batches, counts, strict=True)]
        sums, totals = zip(*gather((sum(losses), sum(counts))), strict=True)
        return sum(sums) / sum(totals)

    @torch.no_grad()
    def set(self, name: str, values: torch.Tensor | float) -> None:
        """Writes deltas of one layer."""
        self.deltas[name].copy_(torch.as_tensor(values))


@contextmanager
def probing(
    model: nn.Module, scaled_weights: Mapping[str, ScaledWeight], groups: Mapping[str, torch.Tensor]
) -> Iterator[Probe]:
    """While this is open the layers compute with trial deltas, in eval mode; afterwards the model is as it was.

    Args:
        model (`nn.Module`): The model, without adapters.
        scaled_weights (`Mapping[str, ScaledWeight]`): Its target layers by name.
        groups (`Mapping[str, torch.Tensor]`): The groups (rows in a row format) with deltas, by layer, int64.
    """
    deltas = {
        name: torch.zeros(
            scaled_weight.delta_shape(len(groups[name])), device=scaled_weight.device, requires_grad=True
        )
        for name, scaled_weight in scaled_weights.items()
    }
    with untouched(model), ExitStack() as stack:
        pass_gradients(model)
        for name, scaled_weight in scaled_weights.items():
            forward = _forward(scaled_weight, deltas[name], groups[name].to(scaled_weight.device))
            stack.enter_context(forward_replaced(scaled_weight.module, forward))
        yield Probe(model, deltas)


def _forward(scaled_weight: ScaledWeight, delta: torch.Tensor, groups: torch.Tensor) -> Any:
    selected = None if len(groups) == scaled_weight.selectable else groups

    def forward(x: torch.Tensor) -> torch.Tensor:
        return scaled_weight.cast_output(scaled_linear(scaled_weight.cast_input(x), delta, selected, scaled_weight), x)

    return within_accelerate(scaled_weight.module, forward)


def count_labels(batch: Mapping[str, torch.Tensor]) -> int:
    """How many labels of a batch count in the loss."""
    return int((batch["labels"] != IGNORED).sum())


def split_rows(batches: Iterable[Batch]) -> list[dict[str, torch.Tensor]]:
    """The rows of all batches, each a batch of one without padding; labels are the inputs where there are none.

    Rows without two tokens and a label are left out.

    Raises:
        ValueError: If none is left, on all processes together.
    """
    rows = []
    for batch in batches:
        tensors = {key: value for key, value in batch.inputs.items() if key != "attention_mask"}
        tensors.setdefault("labels", tensors["input_ids"])
        shape = batch.counted.shape  # (B, T)
        for index, counted in enumerate(batch.counted):
            row = {
                key: value[index : index + 1][:, counted] if value.shape[:2] == shape else value[index : index + 1]
                for key, value in tensors.items()
            }
            if row["input_ids"].shape[1] > 1 and count_labels(row):
                rows.append(row)
    if not sum(gather(len(rows))):
        raise ValueError(
            "The data has no sequence with at least two tokens and a label, expected some text; check how it is "
            "tokenized."
        )
    return rows


def stack_rows(rows: list[dict[str, torch.Tensor]], size: int) -> list[dict[str, torch.Tensor]]:
    """Batches of at most `size` rows that follow one another and have the same shapes."""
    batches: list[list[dict[str, torch.Tensor]]] = []
    for row in rows:
        last = batches[-1] if batches else None
        if last and len(last) < size and _shapes(last[0]) == _shapes(row):
            last.append(row)
        else:
            batches.append([row])
    return [{key: torch.cat([row[key] for row in batch]) for key in batch[0]} for batch in batches]


def _shapes(row: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in row.items()}
