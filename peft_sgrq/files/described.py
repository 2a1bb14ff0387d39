"""JSON files that say what they are."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from peft_sgrq.files.output import written

MADE_HERE = "peft_sgrq"  # the key that says it, here; in the metadata of safetensors files keys begin with it


def write_described(path: str | os.PathLike[str], what: str, fields: Mapping[str, Any]) -> None:
    """Writes a JSON file of a kind, as [`written`] does: the whole file or none."""
    with written(path) as scratch, open(scratch, "w", encoding="utf-8") as file:
        json.dump({MADE_HERE: what, **fields}, file, indent=1)


def read_described(path: str | os.PathLike[str], what: str) -> dict[str, Any]:
    """Reads the fields of what [`write_described`] wrote.

    Raises:
        ValueError: If the file is of another kind, or no JSON.
        OSError: If there is none.
    """
    try:
        with open(path, encoding="utf-8") as file:
            fields = json.load(file)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)} is no JSON ({error}), expected a saved {what}; copy it again.") from error
    found = fields.pop(MADE_HERE, None) if isinstance(fields, dict) else None
    if found != what:
        raise ValueError(
            f"{os.fspath(path)} holds {found or 'something else'!r}, expected a saved {what!r}; give another file."
        )
    return fields
