"""What a GGUF file holds, by type of its tensors, and how many scales that is to train."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from typing import Any

from peft_sgrq.formats.gguf.file import FLOATS, GGUFFile


@dataclass(frozen=True)
class TypeReport:
    """The matrices of one type in the blocks of a model.

    Attributes:
        name (`str`): The type.
        tensors, weights, bytes (`int`): How many tensors there are, and how large they are.
        group_size (`int` or `None`): Columns per scale; `None` where there are no scales.
        scales (`int`): How many scales can be trained; embedding, output head and norms do not count.
    """

    name: str
    tensors: int
    weights: int
    bytes: int
    group_size: int | None
    scales: int


@dataclass(frozen=True)
class FileReport:
    """A whole file: what its metadata say, and its tensors by type, the largest share first."""

    path: str
    architecture: str
    model: str | None
    tied: bool
    types: list[TypeReport]

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)


def report_file(path: str | os.PathLike[str]) -> FileReport:
    """What a file holds.

    Raises:
        ValueError: If it is no GGUF file, or one that cannot be tuned.
    """
    file = GGUFFile(path)
    found: dict[str, list[Any]] = {}
    for info in file.tensors.values():
        kind = info.kind
        group_size = scales = None
        if kind is None:
            name = str(FLOATS.get(info.ggml_type, "integers")).removeprefix("torch.")
        else:
            name = kind.name
            group_size = kind.size if kind.sub is None else kind.sub.size
            in_block = info.name.startswith("blk.") and len(info.shape) == 2
            scales = math.prod(info.shape) // group_size if in_block else 0
        found.setdefault(name, []).append((math.prod(info.shape), info.end - info.start, group_size, scales or 0))
    types = [
        TypeReport(
            name,
            len(rows),
            sum(row[0] for row in rows),
            sum(row[1] for row in rows),
            rows[0][2],
            sum(row[3] for row in rows),
        )
        for name, rows in found.items()
    ]
    types.sort(key=lambda entry: -entry.weights)
    return FileReport(str(file.path), file.architecture, file.metadata.get("general.name"), file.tied, types)
