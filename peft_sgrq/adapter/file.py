"""The weights file of an adapter: read, or checked to be whole before its config is used."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from peft_sgrq.choices import without_wrapper_names


def check_adapter_file(directory: str, layers: Iterable[str]) -> None:
    """Checks that the weights file of a local adapter is a whole safetensors file, with deltas for all its layers.

    Only the header is read: it holds the size the file must have. A directory without such a file passes (it may be
    a Hub id, or hold a config alone).

    Args:
        directory (`str`): The folder of the adapter.
        layers (`Iterable[str]`): Names of the layers its config says it was trained on.

    Raises:
        ValueError: If the file is truncated or no safetensors file, or lacks the deltas of a layer.
    """
    path = os.path.join(directory, SAFETENSORS_WEIGHTS_NAME)
    if os.path.isfile(path):
        with _whole(path), safe_open(path, framework="pt") as file:
            check_complete(path, layers, file.keys())


def check_complete(path: str, layers: Iterable[str], keys: Iterable[str]) -> None:
    """Refuses the file of an adapter that lacks the deltas of one of its layers.

    Raises:
        ValueError: If it does; the sentence names the first.
    """
    named = {without_wrapper_names(key).removeprefix("base_model.model.") for key in keys}
    wanted = {without_wrapper_names(layer) for layer in layers}
    missing = sorted(layer for layer in wanted if f"{layer}.sgrq_delta.weight" not in named)
    if missing:
        raise ValueError(
            f"{path} is incomplete: found no deltas for {len(missing)} of the {len(wanted)} layers that the adapter's "
            f"config names (the first: {missing[0]!r}), expected those of all; copy or download it again."
        )


def read_adapter_file(directory: str) -> dict[str, torch.Tensor]:
    """The tensors of a local adapter, by their names in the file, which is opened once.

    Raises:
        ValueError: If the file is truncated or no safetensors file.
    """
    path = os.path.join(directory, SAFETENSORS_WEIGHTS_NAME)
    with _whole(path):
        return load_file(path)


@contextmanager
def _whole(path: str) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or corrupt: found {os.path.getsize(path)} bytes that do not make a safetensors file "
            f"({error}), expected the file `save_pretrained` wrote; copy or download it again."
        ) from error
