"""Gradients of each sequence's loss in the weights of layers, one layer after another while a backward pass runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from peft_sgrq.formats.compressed_tensors.kv_cache import pass_gradients
from peft_sgrq.formats.own_forward import forward_replaced
from peft_sgrq.passes.data import IGNORED, Batch
from peft_sgrq.passes.running import loss_of


class _Observed(torch.autograd.Function):
    """A copy of a layer's output, as models may add to it in place; its backward pass takes input and gradient."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, x: torch.Tensor, anchor: torch.Tensor, take: Any) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.take = take
        return y.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor, None]:
        (x,) = ctx.saved_tensors
        ctx.take(x, grads[0])
        return grads[0], None, torch.zeros((), device=grads[0].device), None


def observe_gradients(
    model: nn.Module,
    layers: Mapping[str, tuple[nn.Module, Callable[..., torch.Tensor]]],
    batch: Batch,
    run: Callable[[Batch], Any],
    take: Callable[[str, Iterator[torch.Tensor]], None],
) -> None:
    """Hands on the gradient of each sequence's loss in the weights of layers, while a backward pass runs.

    A sequence's loss is the sum over its tokens, whatever batch it is in.

    Args:
        model (`nn.Module`): The model; it has no gradients afterwards.
        layers (`dict`): Name -> the layer's module, and the forward pass to put in place of its own.
        batch (`Batch`): The sequences. Without labels the loss is that of the next token.
        run (`Callable`): Runs the model on a batch with labels.
        take (`Callable`): Given the name of a layer and its gradients, float32 `[N, K]`, one sequence after another;
            tokens that are not those of all sequences in order (an expert's) are one sequence.

    Raises:
        ValueError: If the model returns no loss.
    """
    labels = batch.inputs.get("labels")
    if labels is None:
        labels = batch.inputs["input_ids"].masked_fill(~batch.counted, IGNORED)
    batch = Batch({**batch.inputs, "labels": labels}, batch.counted)
    # Models average the loss over the labels of a batch. A sequence is to count the same in any batch.
    scored = labels[:, 1:] if getattr(model, "loss_type", None) == "ForCausalLM" else labels
    terms = int((scored != IGNORED).sum())
    if not terms:
        return
    sequences = len(batch.counted)

    def taker(name: str) -> Any:
        def receive(x: torch.Tensor, dy: torch.Tensor) -> None:
            x, dy = (values.reshape(-1, values.shape[-1]) for values in (x, dy))
            size = len(x) // sequences if len(x) % sequences == 0 else len(x)
            parts = zip(x.split(size), dy.split(size), strict=True)
            # In the precision of training.
            take(name, ((dys.t() @ xs.to(dys)).float() * terms for xs, dys in parts))

        return receive

    anchor = torch.zeros((), requires_grad=True)
    pass_gradients(model)
    with torch.enable_grad(), ExitStack() as stack:
        for name, (module, forward) in layers.items():
            stack.enter_context(forward_replaced(module, _observed(forward, anchor, taker(name))))
        torch.autograd.grad(loss_of(run(batch), batch.inputs), anchor)


def _observed(forward: Callable[..., torch.Tensor], anchor: torch.Tensor, take: Any) -> Any:
    def observed(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        y = forward(x, *args, **kwargs)
        return _Observed.apply(y, x.detach(), anchor.to(y.device), take)

    return observed
