"""Trial deltas on a model without an adapter: losses and gradients as tuning would have them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import nn

from peft_sgrq.formats.compressed_tensors.kv_cache import pass_gradients
from peft_sgrq.formats.own_forward import forward_replaced
from peft_sgrq.formats.scaled_weight import ScaledWeight
from peft_sgrq.passes.data import IGNORED, Batch
from peft_sgrq.passes.processes import gather
from peft_sgrq.passes.running import loss_of, tuned_forward
from peft_sgrq.passes.untouched import untouched

Row = dict[str, torch.Tensor]


class Probe:
    """A model whose target layers compute with trial deltas, see `probing`.

    Attributes:
        model (`nn.Module`): The model.
        deltas (`dict[str, torch.Tensor]`): By layer, float32, shaped as in `effective_scales`, zero at the start;
            may be written to.
    """

    def __init__(self, model: nn.Module, deltas: dict[str, torch.Tensor]) -> None:
        self.deltas = deltas
        self.model = model

    def loss(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The model's own loss of a batch, differentiable in the deltas."""
        return loss_of(run_row(self.model, batch), batch).float()

    def gradients(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Gradients of the loss of a batch in the deltas, by layer, float32; zero for a layer that was not used."""
        with torch.enable_grad():
            gradients = torch.autograd.grad(
                self.loss(batch), list(self.deltas.values()), allow_unused=True, materialize_grads=True
            )
        return dict(zip(self.deltas, gradients, strict=True))

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
    deltas = {}
    with untouched(model), ExitStack() as stack:
        pass_gradients(model)
        for name, weight in scaled_weights.items():
            shape = weight.delta_shape(len(groups[name]))
            deltas[name] = torch.zeros(shape, device=weight.device, requires_grad=True)
            selected = None if len(groups[name]) == weight.selectable else groups[name].to(weight.device)
            stack.enter_context(forward_replaced(weight.module, tuned_forward(weight, deltas[name], selected)))
        yield Probe(model, deltas)


def run_row(model: nn.Module, row: Mapping[str, torch.Tensor]) -> Any:
    """What a model returns for a row, or for a batch of them."""
    device = next(model.parameters()).device
    return model(**{key: value.to(device) for key, value in row.items()})


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[Row]) -> float:
    """The model's own loss by label over the batches of all processes, in float64."""
    counts = [count_labels(batch) for batch in batches]
    losses = [
        loss_of(run_row(model, batch), batch).double().item() * count
        for batch, count in zip(batches, counts, strict=True)
    ]
    sums, totals = zip(*gather((sum(losses), sum(counts))), strict=True)
    return sum(sums) / sum(totals)


def count_labels(batch: Mapping[str, torch.Tensor]) -> int:
    """How many labels of a batch count in the loss."""
    return int((batch["labels"] != IGNORED).sum())


def split_rows(batches: Iterable[Batch]) -> list[Row]:
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


def stack_rows(rows: list[Row], size: int) -> list[Row]:
    """Batches of at most `size` rows that follow one another and have the same shapes."""
    batches = []
    for _, same in groupby(rows, key=lambda row: {key: value.shape for key, value in row.items()}):
        run = list(same)
        for part in (run[start : start + size] for start in range(0, len(run), size)):
            batches.append({key: torch.cat([row[key] for row in part]) for key in part[0]})
    return batches
