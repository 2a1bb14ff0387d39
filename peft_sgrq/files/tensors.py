"""Safetensors files: where the bytes of tensors are, what they are to become, and files that say what they are."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from peft_sgrq.files.described import MADE_HERE
from peft_sgrq.files.output import written

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


class Entry(NamedTuple):
    """A tensor of a file: its dtype as safetensors names it, its shape, and its bytes `[start, end)` in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Change(NamedTuple):
    """A tensor to be written: what it will be, and how to make it when its turn comes.

    It takes the place of the stored one of its name. If there is none, `beside` names the stored tensor in whose file
    it goes.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]
    beside: str | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def tensor(self) -> torch.Tensor:
        """The tensor, checked to be the one that was announced."""
        tensor = self.make().contiguous()
        if tensor.dtype != self.dtype or tuple(tensor.shape) != self.shape:
            raise RuntimeError(f"made {tensor.dtype} {tuple(tensor.shape)}, announced {self.dtype} {self.shape}")
        return tensor


Changes = dict[str, "Change | None"]  # None: the tensor is dropped


class Shard:
    """One safetensors file: its header, read and checked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        size = path.stat().st_size
        try:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if not 0 < length <= size - 8:
                    raise ValueError(f"a header of {length} bytes")
                header: dict[str, Any] = json.loads(file.read(length))
            self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
            body = 8 + length
            self.entries = {
                name: Entry(item["dtype"], tuple(item["shape"]), *(body + offset for offset in item["data_offsets"]))
                for name, item in header.items()
            }
            end = max((entry.end for entry in self.entries.values()), default=body)
            if end != size:
                raise ValueError(f"tensors up to byte {end}")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is truncated or corrupt: found {size} bytes with {error}, expected a whole safetensors file; "
                "copy or download it again."
            ) from error


def to_bytes(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor, as safetensors stores them."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def write_tensors(
    path: str | os.PathLike[str], kind: str, tensors: Mapping[str, torch.Tensor], fields: Mapping[str, Any]
) -> None:
    """Writes a safetensors file of a kind, with JSON values in its metadata; the whole file or none."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with written(path) as scratch:
        save_file(contiguous, scratch, metadata={f"{MADE_HERE}_{kind}": json.dumps(fields)})


def read_tensors(
    path: str | os.PathLike[str], kind: str, what: str, mend: str
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Reads the tensors and the JSON values of what [`write_tensors`] wrote; `what` and `mend` are for errors.

    Raises:
        ValueError: If the file is of another kind, or no whole safetensors file.
        OSError: If there is none.
    """
    key, expected = f"{MADE_HERE}_{kind}", f"a saved {what}; {mend}"
    with whole_safetensors(path, expected), safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(key)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if text is None:
        raise ValueError(
            f"{os.fspath(path)} holds no {what}: found a safetensors file without {key!r} in its metadata, expected "
            "one; give another file."
        )
    try:
        return tensors, dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{os.fspath(path)} is corrupt: found {key!r} in its metadata that is no JSON object ({error}), expected "
            f"{expected}."
        ) from error


@contextmanager
def whole_safetensors(path: str | os.PathLike[str], expected: str) -> Iterator[None]:
    """Raises a ValueError if a file that is read while this is open is no whole safetensors file."""
    try:
        if os.path.isdir(path):  # which safetensors calls a device that is not there, and no name
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        yield
    except SafetensorError as error:
        raise ValueError(
            f"{os.fspath(path)} is truncated or corrupt: found {os.path.getsize(path)} bytes that do not make a "
            f"safetensors file ({error}), expected {expected}."
        ) from error
