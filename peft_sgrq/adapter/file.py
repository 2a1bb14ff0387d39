"""The weights file of an adapter: read, or checked to be whole before its config is used."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file


def check_adapter_file(directory: str) -> None:
    """Checks that the weights file of a local adapter is a whole safetensors file.

    Only the header is read: it holds the size the file must have. A directory without such a file passes (it may be
    a Hub id, or hold a config alone).

    Raises:
        ValueError: If the file is truncated or no safetensors file.
    """
    path = os.path.join(directory, SAFETENSORS_WEIGHTS_NAME)
    if os.path.isfile(path):
        with _whole(path), safe_open(path, framework="pt"):
            pass


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
