"""A GGUF file: its header, read and checked, and its tensors as bytes.

Versions 2 and 3, little-endian. The format is described in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from peft_sgrq.files.output import as_os_error
from peft_sgrq.formats.gguf.blocks import TYPES, BlockType, read_half
from peft_sgrq.formats.gguf.reader import STRING, Reader

MAGIC = b"GGUF"
FLOATS: dict[int, torch.dtype] = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16, 28: torch.float64}
_INTEGERS: dict[int, torch.dtype] = {24: torch.int8, 25: torch.int16, 26: torch.int32, 27: torch.int64}
_UNSUPPORTED = {9: "Q8_1", 15: "Q8_K", 29: "IQ1_M", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0", 42: "Q2_0"}
_CHUNK = 1 << 20


class TensorInfo(NamedTuple):
    """A tensor of the file.

    Attributes:
        name (`str`): Its name.
        shape (`tuple[int, ...]`): Its shape, rows first.
        ggml_type (`int`): The type of its blocks or numbers.
        start, end (`int`): Its bytes in the file.
    """

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    start: int
    end: int

    @property
    def kind(self) -> BlockType | None:
        """The type of its blocks; `None` if it holds plain numbers."""
        return TYPES.get(self.ggml_type)


class GGUFFile:
    """The header of a file and where its tensors are. Nothing but the header is read.

    Args:
        path (`str` or path): The file.

    Attributes:
        metadata (`dict[str, Any]`): Its metadata; of an array the type of its items and their number alone.
        tensors (`dict[str, TensorInfo]`): By name, in the order of the file.
        table_end (`int`): Where the header ends.
        data_start (`int`): Where the tensors begin.

    Raises:
        ValueError: If it is no GGUF file, truncated, big-endian, of an unknown version, a part of several files, or
            holds tensors of a type whose scales cannot be tuned.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"{self.path} is no file, expected a .gguf file; check the path.")
        self.size = self.path.stat().st_size
        self._spans: dict[str, tuple[int, int]] = {}
        with as_os_error(os.fspath(self.path)), open(self.path, "rb") as file:
            self._check_start(file.read(8))
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                try:
                    self._read(Reader(data))
                except (ValueError, struct.error, OverflowError, MemoryError, RecursionError) as error:
                    raise ValueError(
                        f"{self.path} is truncated or corrupt: found {self.size} bytes with {error}, expected a whole "
                        "GGUF file; copy or download it again."
                    ) from error
        self._check_types()

    def _check_start(self, start: bytes) -> None:
        if start[:4] != MAGIC:
            raise ValueError(
                f"{self.path} begins with {start[:4]!r}, expected {MAGIC!r}: it is no GGUF file; check the path."
            )
        if len(start) < 8:
            raise ValueError(f"{self.path} is truncated: found {self.size} bytes; copy or download it again.")
        version, swapped = (int.from_bytes(start[4:], order) for order in ("little", "big"))
        if version not in (2, 3):
            if swapped in (2, 3):
                raise ValueError(
                    f"{self.path} is big-endian, expected a little-endian file; convert it with `gguf-convert-endian`."
                )
            raise ValueError(
                f"{self.path} is a GGUF file of version {version}, expected 2 or 3; convert the model again with a "
                "current llama.cpp."
            )

    def _read(self, reader: Reader) -> None:
        reader.skip(8)
        tensors, entries = reader.numbers("QQ")
        self.metadata: dict[str, Any] = {}
        for _ in range(entries):
            start = reader.position
            key = reader.string()
            (kind,) = reader.numbers("I")
            self.metadata[key] = reader.value(kind)
            if key in self._spans:
                raise ValueError(f"two entries {key!r}")
            self._spans[key] = start, reader.position
        self._entries_end = reader.position
        listed = []
        for _ in range(tensors):
            name = reader.string()
            (dimensions,) = reader.numbers("I")
            if dimensions > 8:
                raise ValueError(f"a tensor {name!r} of {dimensions} dimensions")
            shape = tuple(reversed(reader.numbers("Q" * dimensions)))
            if not math.prod(shape):
                raise ValueError(f"a tensor {name!r} of shape {shape}")
            listed.append((name, shape, *reader.numbers("IQ")))
        self.table_end = reader.position
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"an alignment of {alignment!r}")
        self.alignment = alignment
        self.data_start = -(-self.table_end // alignment) * alignment
        self.tensors: dict[str, TensorInfo] = {}
        for name, shape, ggml_type, offset in listed:
            if offset % alignment:
                raise ValueError(f"a tensor {name!r} at the offset {offset}, no multiple of the alignment {alignment}")
            start = self.data_start + offset
            end = start + _tensor_bytes(name, shape, ggml_type)
            if end > self.size:
                raise ValueError(f"a tensor {name!r} that ends at byte {end}")
            if name in self.tensors:
                raise ValueError(f"two tensors {name!r}")
            self.tensors[name] = TensorInfo(name, shape, ggml_type, start, end)
        found = sorted(self.tensors.values(), key=lambda info: info.start)
        for before, after in itertools.pairwise(found):
            if before.end > after.start:
                raise ValueError(f"tensors {before.name!r} and {after.name!r} that overlap")

    def _check_types(self) -> None:
        parts = self.metadata.get("split.count", 1)
        if isinstance(parts, int) and parts > 1:
            raise ValueError(
                f"{self.path} is one of {parts} parts of a model, expected a single file; join them with "
                "`llama-gguf-split --merge FIRST OUT`."
            )
        for info in self.tensors.values():
            if info.kind is None and info.ggml_type not in FLOATS and info.ggml_type not in _INTEGERS:
                name = _UNSUPPORTED.get(info.ggml_type, f"number {info.ggml_type}")
                raise ValueError(
                    f"{self.path} holds the tensor {info.name!r} in the type {name}, whose scales cannot be tuned, "
                    f"expected one of {', '.join(kind.name for kind in TYPES.values())}; use another quantization of "
                    "the model."
                )

    @property
    def architecture(self) -> str:
        """The architecture, as llama.cpp names it."""
        return str(self.metadata.get("general.architecture", ""))

    @property
    def tied(self) -> bool:
        """Whether the output head is the input embedding."""
        return "output.weight" not in self.tensors

    def tokenizer_digest(self) -> str:
        """A digest of what the file says about its tokenizer; the chat template does not count."""
        digest = hashlib.blake2b(digest_size=8)
        for key in sorted(key for key in self._spans if key.startswith("tokenizer.ggml.")):
            digest.update(b"".join(self.chunks(*self._spans[key])))
        return digest.hexdigest()

    def data(self, name: str) -> torch.Tensor:
        """The bytes of a tensor in memory of its own, uint8 `[rows, bytes of a row]`."""
        info = self.tensors[name]
        values = torch.empty(info.end - info.start, dtype=torch.uint8)
        with as_os_error(os.fspath(self.path)), open(self.path, "rb") as file:
            file.seek(info.start)
            if file.readinto(values.numpy().data) != len(values):
                raise ValueError(f"{self.path} ends within {name!r}; copy or download it again.")
        return values.view(math.prod(info.shape[:-1]), -1)

    def blocks(self, name: str) -> torch.Tensor:
        """The bytes of a tensor in blocks, as `data` returns them, whose half floats are numbers.

        Raises:
            ValueError: If one is NaN or infinite.
        """
        packed, kind = self.data(name), self.tensors[name].kind
        if kind is None:
            raise ValueError(f"{self.path} does not hold {name!r} in blocks, expected a quantized tensor.")
        for at in (kind.scale_at, kind.offset_at):
            if at is None:
                continue
            broken = int((~torch.isfinite(read_half(packed.view(-1, kind.nbytes), at))).sum())
            if broken:
                raise ValueError(
                    f"{self.path} holds {name!r} with {broken} NaN or infinite scales, expected numbers; copy or "
                    "download it again."
                )
        return packed

    def numbers(self, name: str) -> torch.Tensor:
        """A tensor that is not quantized, in its own dtype and shape."""
        info = self.tensors[name]
        return self.data(name).view((FLOATS | _INTEGERS)[info.ggml_type]).view(info.shape)

    def chunks(self, start: int, end: int) -> Iterator[bytes]:
        """The bytes of a part of the file, piece by piece."""
        with as_os_error(os.fspath(self.path)), open(self.path, "rb") as file:
            file.seek(start)
            while start < end:
                piece = file.read(min(_CHUNK, end - start))
                if not piece:
                    raise ValueError(f"{self.path} ends at byte {start}; copy or download it again.")
                start += len(piece)
                yield piece

    def padding(self) -> Iterator[bytes]:
        """The bytes behind the header that no tensor has, piece by piece."""
        position = self.data_start
        for info in sorted(self.tensors.values(), key=lambda info: info.start):
            yield from self.chunks(position, info.start)
            position = info.end
        yield from self.chunks(position, self.size)

    def named_header(self, name: str) -> bytes:
        """The header with another `general.name`, padded to where the tensors begin then."""
        if not isinstance(name, str):
            raise TypeError(f"`name` is {name!r}, expected a string.")
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            raise ValueError(f"`name` is {name!r}, expected text that UTF-8 can hold; choose another.")
        key, start, end = "general.name", *self._spans.get("general.name", (self._entries_end, self._entries_end))
        entry = _string(key) + struct.pack("<I", STRING) + _string(name)
        header = bytearray(b"".join(self.chunks(0, start)) + entry + b"".join(self.chunks(end, self.table_end)))
        if key not in self._spans:
            struct.pack_into("<Q", header, 16, len(self._spans) + 1)
        return bytes(header) + b"\0" * (-len(header) % self.alignment)


def _string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _tensor_bytes(name: str, shape: tuple[int, ...], ggml_type: int) -> int:
    kind = TYPES.get(ggml_type)
    if kind is None:
        dtype = (FLOATS | _INTEGERS).get(ggml_type)
        return 0 if dtype is None else math.prod(shape) * dtype.itemsize
    if not shape or shape[-1] % kind.size:
        raise ValueError(f"a tensor {name!r} of {kind.name} with the shape {shape}")
    return math.prod(shape) // kind.size * kind.nbytes
