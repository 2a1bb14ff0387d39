"""Whether a path is that of a GGUF file, by its name or its first bytes, and whether a merge makes one."""

from __future__ import annotations

import os
from pathlib import Path

from peft_sgrq.files.sources import adapter_fields

_ENDING, _MAGIC = ".gguf", b"GGUF"


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a path is that of a GGUF file: named so, or a file that begins so, as Ollama's blobs do."""
    if os.fspath(path).endswith(_ENDING):
        return True
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def makes_gguf(
    out: str | os.PathLike[str], base: str | os.PathLike[str] | None, adapter: str | os.PathLike[str]
) -> bool:
    """Whether a merge makes a GGUF file and no folder, as far as what it makes, the base and an adapter here say.

    Args:
        out (`str` or path): What is to be made.
        base (`str`, path or `None`): The base as it was given; `None` takes the one the adapter names.
        adapter (`str` or path): The adapter's folder, or its name on the Hub, which says nothing.
    """
    if os.fspath(out).endswith(_ENDING) or (base is not None and is_gguf(base)):
        return True
    return (
        base is None and (adapter_fields(Path(adapter)).get("base_quantization") or {}).get("quant_method") == "gguf"
    )
