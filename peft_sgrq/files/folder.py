"""A checkpoint folder in safetensors: which tensors it has, where their bytes are, and how to write it anew."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open

from peft_sgrq.files.tensors import DTYPE_NAMES, Change, Entry, Shard, to_bytes

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_CHUNK = 1 << 20


class CheckpointFolder:
    """The tensors of a model checkpoint in safetensors, in one file or in shards.

    Tensors are read one at a time and stay on the disk otherwise.

    Args:
        path (`Path`): The folder.

    Raises:
        ValueError: If it has no safetensors weights, a shard is missing, or a file is truncated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config: dict[str, Any] = _read_json(path / "config.json") if (path / "config.json").is_file() else {}
        self.index: dict[str, Any] | None = None
        if (path / SINGLE).is_file():  # which transformers reads even where there is an index
            files = [SINGLE]
        elif (path / INDEX).is_file():
            self.index = _read_json(path / INDEX)
            files = sorted(set(self.index.get("weight_map", {}).values()))
        else:
            files = []
        if not files:
            raise ValueError(
                f"{path} holds no checkpoint in safetensors, expected {SINGLE} or {INDEX}; save the model with "
                "`save_pretrained`, which writes them."
            )
        missing = [name for name in files if not (path / name).is_file()]
        if missing:
            raise ValueError(
                f"{path} lacks {len(missing)} of the {len(files)} files that {INDEX} names (the first: {missing[0]}), "
                "expected all of them; copy or download the checkpoint again."
            )
        self.shards = {name: Shard(path / name) for name in files}
        self.where = {tensor: name for name, shard in self.shards.items() for tensor in shard.entries}
        absent = sorted(set((self.index or {}).get("weight_map", {})) - set(self.where))
        if absent:
            raise ValueError(
                f"{path / INDEX} names {len(absent)} tensors that no file holds (the first: {absent[0]}), expected "
                "all of them; copy or download the checkpoint again."
            )
        self._open: dict[str, Any] = {}
        self._files = ExitStack()

    def __enter__(self) -> CheckpointFolder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files that tensors were read from; they are opened again when they are needed."""
        self._open.clear()
        self._files.close()

    @property
    def quantization(self) -> dict[str, Any]:
        """The quantization config, empty if the checkpoint has none."""
        text_config = self.config.get("text_config") or {}
        return self.config.get("quantization_config") or text_config.get("quantization_config") or {}

    def misplaced(self) -> list[str]:
        """What the index says wrongly of where tensors are, a sentence each."""
        named = self.where if self.index is None else self.index.get("weight_map", {})
        errors = [
            f"{INDEX} has {tensor} in {named.get(tensor, 'no file')}, and it is in {name}."
            for name, shard in self.shards.items()
            for tensor in shard.entries
            if named.get(tensor) != name
        ]
        return errors if len(errors) <= 3 else [*errors[:3], f"{INDEX} is wrong of {len(errors) - 3} more tensors."]

    def __contains__(self, name: str) -> bool:
        return name in self.where

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def entry(self, name: str) -> Entry:
        """What the header says about a tensor."""
        return self.shards[self.where[name]].entries[name]

    def metadata(self, name: str) -> dict[str, str]:
        """The metadata of the file a tensor is in."""
        return self.shards[self.where[name]].metadata

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor, mapped from its file."""
        shard = self.where[name]
        if shard not in self._open:
            self._open[shard] = self._files.enter_context(safe_open(self.path / shard, framework="pt"))
        return self._open[shard].get_tensor(name)

    def chunks(self, name: str) -> Iterator[bytes]:
        """The stored bytes of a tensor, piece by piece."""
        entry = self.entry(name)
        with open(self.shards[self.where[name]].path, "rb") as file:
            file.seek(entry.start)
            left = entry.end - entry.start
            while left:
                piece = file.read(min(_CHUNK, left))
                if not piece:
                    raise ValueError(f"{self.where[name]} ends within {name!r}; copy or download it again.")
                left -= len(piece)
                yield piece

    def same_bytes(self, name: str, other: CheckpointFolder, other_name: str) -> bool:
        """Whether a tensor has the dtype, shape and bytes of one in another checkpoint."""
        mine, theirs = self.entry(name), other.entry(other_name)
        if mine[:2] != theirs[:2]:
            return False
        return all(a == b for a, b in zip(self.chunks(name), other.chunks(other_name), strict=True))

    def has(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether the stored tensor is this one: dtype, shape and bytes."""
        entry = self.entry(name)
        if (entry.dtype, entry.shape) != (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)):
            return False
        view = memoryview(to_bytes(tensor))
        pieces = (view[start : start + _CHUNK] for start in range(0, len(view), _CHUNK))
        return all(a == b for a, b in zip(self.chunks(name), pieces, strict=True))

    def write(self, out: Path, changes: Mapping[str, Change | None]) -> int:
        """Writes the weights files and the index with tensors replaced, added or dropped; other bytes are copied.

        Args:
            out (`Path`): An existing folder.
            changes (`Mapping[str, Change | None]`): By tensor name.

        Returns:
            `int`: How many bytes were replaced.
        """
        total = 0
        for name in self.shards:
            os.makedirs((out / name).parent, exist_ok=True)
            total += self._write_shard(name, out / name, changes)
        if self.index is not None:
            index = dict(self.index)
            named = [*self.index.get("weight_map", {}), *self.where]  # the order of the index, which differs by writer
            index["weight_map"] = {tensor: self.where[tensor] for tensor in named if changes.get(tensor, True)} | {
                tensor: shard for shard in self.shards for tensor in self._added(shard, changes)
            }
            metadata = dict(self.index.get("metadata") or {})
            if "total_size" in metadata:
                metadata["total_size"] += self._growth(changes)
            index["metadata"] = metadata
            write_json(out / INDEX, index)
        return total

    def _growth(self, changes: Mapping[str, Change | None]) -> int:
        growth = 0
        for name, change in changes.items():
            entry = self.entry(name) if name in self else None
            growth += (0 if change is None else change.nbytes) - (0 if entry is None else entry.end - entry.start)
        return growth

    def _added(self, shard: str, changes: Mapping[str, Change | None]) -> list[str]:
        return [
            name
            for name, change in changes.items()
            if name not in self and change is not None and change.beside and self.where[change.beside] == shard
        ]

    def _write_shard(self, name: str, target: Path, changes: Mapping[str, Change | None]) -> int:
        shard = self.shards[name]
        added = self._added(name, changes)
        if not added and not any(tensor in changes for tensor in shard.entries):
            with open(target, "wb") as file, open(shard.path, "rb") as source:
                shutil.copyfileobj(source, file, _CHUNK)
                _sync(file)
            return 0
        planned: list[tuple[int, str, str, tuple[int, ...], int]] = []
        for tensor, entry in [*shard.entries.items(), *((tensor, None) for tensor in added)]:
            change = changes.get(tensor)
            if change is not None:
                planned.append((change.dtype.itemsize, tensor, DTYPE_NAMES[change.dtype], change.shape, change.nbytes))
            elif entry is not None and tensor not in changes:
                size = entry.end - entry.start
                planned.append((size // max(1, math.prod(entry.shape)), tensor, entry.dtype, entry.shape, size))
        # The order of the safetensors library: wide dtypes first, so that every tensor is aligned.
        planned.sort(key=lambda item: (-item[0], item[1]))
        # Some writers note there which tensors they left out, being the same as others.
        metadata = {key: value for key, value in shard.metadata.items() if key not in added}
        header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        offset = 0
        for _, tensor, dtype, shape, size in planned:
            header[tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        replaced = 0
        with open(target, "wb") as file:
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            file.write(len(text).to_bytes(8, "little") + text)
            for _, tensor, _, _, size in planned:
                change = changes.get(tensor)
                if change is None:
                    file.writelines(self.chunks(tensor))
                else:
                    file.write(to_bytes(change.tensor()))
                    replaced += size
            _sync(file)
        return replaced


def write_json(path: Path, value: Any) -> None:
    """Writes JSON as transformers does, and syncs it."""
    with open(path, "wb") as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
        _sync(file)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); copy or download it again.") from error


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
