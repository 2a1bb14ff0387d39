"""What a GGUF file holds, by type of its tensors, and how many scales that is to train."""

from __future__ import annotations

import math
import os
from typing import Any

from peft_sgrq.formats.gguf.file import FLOATS, GGUFFile


def report_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file holds, as JSON values.

    Returns:
        `dict[str, Any]`: Its `path`, `architecture`, the `model` that it names (`None` if none), whether the output
        head is `tied` to the embedding, and `types`: by type of its tensors, the largest share first, the `name`, how
        many `tensors`, `weights` and `bytes` there are, the columns per scale (`group_size`, `None` where there are no
        scales), and how many `scales` can be trained; embedding, output head and norms do not count.

    Raises:
        ValueError: If it is no GGUF file, or one that cannot be tuned.
    """
    file = GGUFFile(path)
    types: dict[str, dict[str, Any]] = {}
    for info in file.tensors.values():
        kind, weights = info.kind, math.prod(info.shape)
        if kind is None:
            name, group_size = str(FLOATS.get(info.ggml_type, "integers")).removeprefix("torch."), None
        else:
            name, group_size = kind.name, kind.size if kind.sub is None else kind.sub.size
        entry = types.setdefault(
            name, {"name": name, "tensors": 0, "weights": 0, "bytes": 0, "group_size": group_size, "scales": 0}
        )
        entry["tensors"] += 1
        entry["weights"] += weights
        entry["bytes"] += info.end - info.start
        if group_size is not None and info.name.startswith("blk.") and len(info.shape) == 2:
            entry["scales"] += weights // group_size
    return {
        "path": str(file.path),
        "architecture": file.architecture,
        "model": file.metadata.get("general.name"),
        "tied": file.tied,
        "types": sorted(types.values(), key=lambda entry: -entry["weights"]),
    }
