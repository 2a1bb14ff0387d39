"""The file an interrupted recovery goes on from: the blocks that are finished, and what they were recovered with."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from peft_sgrq.files.output import check_output, written
from peft_sgrq.layer.delta import Delta
from peft_sgrq.recovery.block import BlockError
from peft_sgrq.recovery.preservation import Pull

_METADATA = "peft_sgrq_recovery"
_PULL = ("curvature", "slope", "constant")


def check_progress_file(path: str | os.PathLike[str]) -> None:
    """Refuses a path that the progress of a recovery cannot be kept in, or read from again.

    Raises:
        ValueError: If it is a folder, a device or a pipe, or cannot be written.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        raise ValueError(f"`progress_file` is {path!r}, a folder, expected a file in it; name one.")
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"`progress_file` is {path!r}, a device or a pipe, expected a file that can be read again.")
    check_output(path, "The progress file")


class ProgressFile:
    """The progress of one recovery, in a safetensors file that is written anew after each block.

    Args:
        path (`str`, path or `None`): The file; `None` keeps nothing.
        made_with (`Mapping[str, Any]`): JSON values that decide what comes out. A file made with others is refused.

    Attributes:
        blocks (`list[BlockError]`): The finished blocks.
        deltas (`dict[str, torch.Tensor]`): Layer name -> its deltas, of the finished blocks.
        pulls (`dict[str, Pull]`): Layer name -> its preservation term, if the data was run through the model for it.

    Raises:
        ValueError: If the file is of a recovery with other arguments, or is not one.
    """

    def __init__(self, path: str | os.PathLike[str] | None, made_with: Mapping[str, Any]) -> None:
        self.blocks: list[BlockError] = []
        self.deltas: dict[str, torch.Tensor] = {}
        self.pulls: dict[str, Pull] = {}
        self._path = None if path is None else os.fspath(path)
        self._made_with = json.loads(json.dumps(made_with))
        if self._path is not None:
            self._prepare(self._path)

    def _prepare(self, path: str) -> None:
        check_progress_file(path)
        os.makedirs(os.path.dirname(os.path.realpath(path)), exist_ok=True)
        if os.path.exists(path):
            self._read(path)

    def _read(self, path: str) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get(_METADATA)
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} is truncated or no safetensors file ({error}), expected the progress of a recovery; delete "
                "it to start again."
            ) from error
        if text is None:
            raise ValueError(
                f"{path} holds no progress of a recovery, expected a file of an interrupted `recover`; name another."
            )
        stored = json.loads(text)
        for key, value in self._made_with.items():
            found = stored["made_with"].get(key)
            if found != value:
                raise ValueError(
                    f"{path} is of a recovery with {key}={found!r}, expected {value!r}: its blocks would not fit; "
                    "give the same arguments, or delete the file to start again."
                )
        self.blocks = [BlockError(**block) for block in stored["blocks"]]
        self.deltas = {key[len("delta.") :]: tensor for key, tensor in tensors.items() if key.startswith("delta.")}
        names = [key[len("curvature.") :] for key in tensors if key.startswith("curvature.")]
        self.pulls = {name: Pull(*(tensors[f"{part}.{name}"] for part in _PULL)) for name in names}

    def add(self, block: BlockError, deltas: Mapping[str, Delta]) -> None:
        """Adds a finished block and its deltas, by layer name, and writes the file."""
        self.blocks.append(block)
        if self._path is not None:
            self.deltas |= {name: delta.weight.detach().cpu().clone() for name, delta in deltas.items()}
            self.save()

    def save(self) -> None:
        """Writes the file, the whole of it or nothing."""
        if self._path is None:
            return
        tensors = {f"delta.{name}": delta.contiguous() for name, delta in self.deltas.items()}
        for name, pull in self.pulls.items():
            tensors |= {f"{part}.{name}": getattr(pull, part).cpu().contiguous() for part in _PULL}
        described = {"made_with": self._made_with, "blocks": [asdict(block) for block in self.blocks]}
        with written(self._path) as file:
            save_file(tensors, file, metadata={_METADATA: json.dumps(described)})
