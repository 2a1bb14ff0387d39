"""Whether a path is that of a GGUF file, by its name or its first bytes, and whether a merge makes one."""

from __future__ import annotations

import os

_ENDING, _MAGIC = ".gguf", b"GGUF"


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a path is that of a GGUF file: named so, or a file that begins so, as Ollama's blobs do."""
    if os.fspath(path).endswith(_ENDING):
        return True
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def makes_gguf(out: str | os.PathLike[str], base: str | os.PathLike[str] | None) -> bool:
    """Whether a merge makes a GGUF file and no folder, as far as the names of what it makes and of the base say."""
    return os.fspath(out).endswith(_ENDING) or (base is not None and is_gguf(base))
