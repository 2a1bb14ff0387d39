"""Batches whose rows use different adapters: `model(..., adapter_names=[...])`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

BASE_ADAPTER = "__base__"  # PEFT's name for "no adapter"


def check_adapter_names(names: Any, known: Sequence[str], training: bool) -> None:
    """Raises a TypeError or ValueError unless `names` is a list of known adapters and the model is in eval mode."""
    if not isinstance(names, (list, tuple)):
        raise TypeError(
            f"`adapter_names` is a {type(names).__name__}, expected a list with one name for each row of the batch."
        )
    if training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode; call `model.eval()` first.")
    unknown = sorted(set(names) - set(known) - {BASE_ADAPTER})
    if unknown:
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}; expected names among "
            f"{sorted(known)} or {BASE_ADAPTER!r}."
        )


def check_rows(names: Sequence[str], rows: int, merged: Sequence[str]) -> None:
    """Raises a ValueError unless there is one name for each row and no adapter is merged into the layer."""
    if rows != len(names):
        raise ValueError(
            f"Length of `adapter_names` should be the same as the number of inputs, but got {len(names)} and {rows} "
            "respectively; give one name for each row of the batch."
        )
    if merged:
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first; found "
            f"{merged} merged."
        )


@contextmanager
def adapter_names_for(
    model: nn.Module, layers: Sequence[nn.Module], names: Sequence[str], num_beams: Any
) -> Iterator[None]:
    """Hands the adapter names to the layers at each of their calls while this is open.

    Args:
        model (`nn.Module`): The base model.
        layers (`Sequence[nn.Module]`): The modules that take an `adapter_names` argument.
        names (`Sequence[str]`): One name for each row of the batch.
        num_beams (`int` or `None`): Beams of the generation; beam search repeats the rows of the decoder, never those
            of an encoder.
    """
    beams = num_beams if isinstance(num_beams, int) and num_beams > 1 else 1
    repeated = [name for name in names for _ in range(beams)]
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    encoder = model.get_encoder() if is_encoder_decoder else None  # type: ignore[operator]
    in_encoder = set() if encoder is None else set(encoder.modules())

    def hook(layer: nn.Module) -> Any:
        own = list(names) if layer in in_encoder else repeated
        return lambda module, args, kwargs: (args, {**kwargs, "adapter_names": own})

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(hook(layer), with_kwargs=True).remove)
        yield
