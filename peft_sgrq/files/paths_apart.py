"""What is written takes the place neither of what is read nor of what else is written; seen before the work."""

from __future__ import annotations

import json
import os
from fnmatch import fnmatchcase
from pathlib import Path

from peft_sgrq.files.described import MADE_HERE

# Files of checkpoints and adapters that transformers and PEFT read, or write beside the weights.
_OF_CHECKPOINTS = (
    "*config.json",
    "model*.safetensors",
    "pytorch_model*",
    "adapter_model*",
    "*.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "*.py",
)
_PICTURES = (".png", ".pdf", ".svg", ".jpg", ".jpeg")


def check_apart(path: str | os.PathLike[str], folder: str | os.PathLike[str], what: str = "The output") -> None:
    """Refuses a file and a folder, both to be written, if one would be in the place of the other, or of a part of it.

    Args:
        path (`str` or path): The file.
        folder (`str` or path): The folder; a checkpoint or an adapter.
        what (`str`): What the file is, to begin the sentence with.
    """
    file, place = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if place.is_relative_to(file):
        raise ValueError(
            f"{what} {os.fspath(path)!r} is a file to be written and the folder {os.fspath(folder)!r} is to be in its "
            "place, expected two paths; name another."
        )
    if file.is_relative_to(place) and _is_of_checkpoint(file):
        raise ValueError(
            f"{what} {os.fspath(path)!r} has the name of a file of the checkpoint that is to be written in "
            f"{os.fspath(folder)!r}, expected another name; choose one such as report.json."
        )


def check_not_read(path: str | os.PathLike[str], *sources: str | None) -> None:
    """Refuses a file to be written if it is one that is read, or takes the name of one in a folder that is read.

    In such a folder a picture, and what an earlier run of a command wrote, is written over: nothing reads it there.

    Args:
        path (`str` or path): The file to be written.
        sources (`str` or `None`): What is read: files, folders, or names of the Hub.
    """
    target = Path(os.path.realpath(path))
    for source in sources:
        if source is None or not os.path.exists(source) or not target.is_relative_to(os.path.realpath(source)):
            continue
        if os.path.isfile(source):
            what = "read, too"
        elif _is_of_checkpoint(target):
            what = f"named as a file of {source!r}, which is read"
        elif target.is_file() and not _is_made_here(target):
            what = f"a file of {source!r}, which is read"
        else:
            continue
        raise ValueError(
            f"The output {os.fspath(path)!r} is {what}, expected another file: what is in it would be lost; name "
            "another, or delete it first."
        )


def _is_of_checkpoint(path: Path) -> bool:
    return any(fnmatchcase(path.name, pattern) for pattern in _OF_CHECKPOINTS)


def _is_made_here(path: Path) -> bool:
    """Whether a file is a picture, or says that a command of this package, or its `save`, wrote it."""
    if path.suffix.lower() in _PICTURES:
        return True
    try:
        with open(path, "rb") as file:
            if path.suffix.lower() == ".json":
                described = json.load(file)
            else:  # safetensors, under any name
                size = int.from_bytes(file.read(8), "little")
                described = json.loads(file.read(size))["__metadata__"] if size < path.stat().st_size else {}
        return any(key.startswith(MADE_HERE) for key in described)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
