"""Is the weights file of an adapter whole? Asked before its config is used."""

from __future__ import annotations

import os

from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open


def check_adapter_file(directory: str) -> None:
    """Checks that the weights file of a local adapter is a whole safetensors file.

    Only the header is read: it holds the size the file must have. A directory without such a file passes (it may be
    a Hub id, or hold a config alone).

    Raises:
        ValueError: If the file is truncated or no safetensors file.
    """
    path = os.path.join(directory, SAFETENSORS_WEIGHTS_NAME)
    if not os.path.isfile(path):
        return
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or corrupt: found {os.path.getsize(path)} bytes that do not make a safetensors file "
            f"({error}), expected the file `save_pretrained` wrote; copy or download it again."
        ) from error
