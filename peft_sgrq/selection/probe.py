"""Trial deltas on a model without an adapter: losses and gradients as tuning would have them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from peft_sgrq.backends import ScaleBackend
from peft_sgrq.functional import scaled_linear

IGNORED = -100  # the label transformers' losses skip


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
        """The loss over some batches by token, in float64."""
        counts = [count_labels(batch) for batch in batches]
        losses = [self.loss(batch).double().item() for batch in batches]
        return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)

    @torch.no_grad()
    def set(self, name: str, values: torch.Tensor | float) -> None:
        """Writes deltas of one layer."""
        self.deltas[name].copy_(torch.as_tensor(values))


@contextmanager
def probing(
    model: nn.Module, backends: Mapping[str, ScaleBackend], groups: Mapping[str, torch.Tensor]
) -> Iterator[Probe]:
    """While this is open the layers compute with trial deltas; afterwards the model is as it was.

    The model is in eval mode inside. Its parameters, their gradients, buffers, hooks, modes and the state of the
    random number generators are not changed, also if an exception ends it.

    Args:
        model (`nn.Module`): The model, without adapters.
        backends (`Mapping[str, ScaleBackend]`): Its target layers by name.
        groups (`Mapping[str, torch.Tensor]`): The groups (rows in a row format) with deltas, by layer, int64.
    """
    deltas = {
        name: torch.zeros(backend.delta_shape(len(groups[name])), device=backend.device, requires_grad=True)
        for name, backend in backends.items()
    }
    modes = {module: module.training for module in model.modules()}
    attributes = {backend.module: dict(backend.module.__dict__) for backend in backends.values()}
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    devices = {backend.device for backend in backends.values() if backend.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            if use_cache is not None:
                config.use_cache = False
            model.eval()
            for name, backend in backends.items():
                backend.module.forward = _forward(  # type: ignore[method-assign]
                    backend, deltas[name], groups[name].to(backend.device)
                )
            yield Probe(model, deltas)
    finally:
        for module, before in attributes.items():
            module.__dict__.clear()
            module.__dict__.update(before)
        for module, training in modes.items():
            module.training = training
        if use_cache is not None:
            config.use_cache = use_cache  # type: ignore[union-attr]


def _forward(backend: ScaleBackend, delta: torch.Tensor, groups: torch.Tensor) -> Any:
    selected = None if len(groups) == backend.selectable else groups

    def forward(x: torch.Tensor) -> torch.Tensor:
        # As in SGRQLinear: the layer's own forward, which accelerate would hook into, is not called.
        hook = getattr(backend.module, "_hf_hook", None)
        if hook is not None:
            (x, *_), _ = hook.pre_forward(backend.module, x)
        y = backend.cast_output(scaled_linear(backend.cast_input(x), delta, selected, backend), x)
        return y if hook is None else hook.post_forward(backend.module, y)

    return forward


def count_labels(batch: Mapping[str, torch.Tensor]) -> int:
    """How many labels of a batch count in the loss."""
    return int((batch["labels"] != IGNORED).sum())


def split_rows(data: Iterable[Mapping[str, Any]]) -> list[dict[str, torch.Tensor]]:
    """The rows of all batches, each a batch of one without padding; labels are the inputs where there are none.

    Raises:
        TypeError: If a batch is no mapping with `input_ids`.
        ValueError: If no row has two tokens and a label.
    """
    rows = []
    for batch in data:
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            found = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
            raise TypeError(f"A batch of the data is {found}, expected a mapping with `input_ids`; tokenize it first.")
        tensors = {key: torch.as_tensor(value) for key, value in batch.items() if not isinstance(value, str)}
        shape = tensors["input_ids"].shape  # (B, T)
        mask = tensors.pop("attention_mask", torch.ones(shape, dtype=torch.int64)).bool()
        tensors.setdefault("labels", tensors["input_ids"])
        for index in range(shape[0]):
            keep = mask[index]
            row = {
                key: value[index : index + 1][:, keep] if value.shape[:2] == shape else value[index : index + 1]
                for key, value in tensors.items()
            }
            if row["input_ids"].shape[1] > 1 and count_labels(row):
                rows.append(row)
    if not rows:
        raise ValueError(
            "The data has no row with at least two tokens and a label, expected some text; check that it is not empty "
            "and not all padding."
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
