"""Writing a GGUF file anew: a copy in which some tensors have other bytes, and all else, header included, stays."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from peft_sgrq.files.output import check_output, check_space, written
from peft_sgrq.formats.gguf.file import GGUFFile

Makers = Mapping[str, Callable[[], torch.Tensor]]  # tensor name -> makes its bytes, uint8 `[rows, bytes of a row]`


def check_target(path: str, file: GGUFFile, overwrite: bool) -> None:
    """Refuses to write where something is, over the base, or on a disk without space.

    Args:
        path (`str`): The file to make, as it was given: one that ends in a slash is a folder.
        file (`GGUFFile`): The base.
        overwrite (`bool`): Whether a file that is there is to be replaced.

    Raises:
        ValueError: If it cannot be written; nothing was.
    """
    check_output(path)
    out = Path(path)
    if out.exists() and not out.is_file():
        raise ValueError(f"{out} is no file, expected a file to be replaced, or none; choose another name.")
    if out.exists() and not overwrite:
        raise ValueError(
            f"{out} exists already, expected a file to be made; choose another name, or replace it "
            "with `overwrite=True` (--overwrite)."
        )
    if out.exists() and os.path.samefile(out, file.path):
        raise ValueError(f"{out} is the base, expected another file: the base would be lost.")
    place = next(parent for parent in out.absolute().parents if parent.exists())
    check_space(place, file.size, "the merged file")


def write_file(file: GGUFFile, out: Path, makers: Makers, name: str | None = None) -> int:
    """Writes the file with some tensors replaced, beside `out`, and renames it.

    Args:
        file (`GGUFFile`): What is copied.
        out (`Path`): The file to make. `check_target` is to be called before.
        makers (`Mapping`): The tensors that are replaced.
        name (`str` or `None`): Another `general.name`; the header stays as it is if not given.

    Returns:
        `int`: How many bytes are others than in the base, the header not counted.

    Raises:
        OSError: If the disk is full or fails; nothing is written then.
    """
    changed = 0
    try:
        with written(out) as scratch:
            with open(scratch, "wb") as target:
                head = file.chunks(0, file.data_start) if name is None else iter([file.named_header(name)])
                target.writelines(head)
                for before, after in _pieces(file, makers):
                    target.write(after)
                    if before is not after:
                        a, b = (torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in (before, after))
                        changed += int((a != b).sum())
                target.flush()
                os.fsync(target.fileno())
            os.chmod(scratch, file.path.stat().st_mode & 0o777)
    except OSError as error:
        if error.filename == os.fspath(file.path):  # which could not be read
            raise
        raise OSError(
            f"{out} could not be written ({error.strerror or error}), expected {file.size / 1e6:,.1f} MB of space on "
            "a disk that works; free some, or choose another. Nothing was written."
        ) from error
    return changed


def _pieces(file: GGUFFile, makers: Makers) -> Iterator[tuple[bytes, bytes]]:
    """The data section as it was and as it is to be, in pieces; the same object twice where nothing changes."""
    position = file.data_start
    for info in sorted(file.tensors.values(), key=lambda info: info.start):
        if info.name not in makers:
            continue
        for piece in file.chunks(position, info.start):
            yield piece, piece
        made = makers[info.name]()
        before, after = file.data(info.name).numpy().tobytes(), made.contiguous().numpy().tobytes()
        if len(before) != len(after):
            raise RuntimeError(f"made {len(after)} bytes for {info.name}, expected {len(before)}")
        yield before, after
        position = info.end
    for piece in file.chunks(position, file.size):
        yield piece, piece


def in_file_order(packed: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """Rows of a packed weight in the order the file has them."""
    if rows is None:
        return packed
    ordered = torch.empty_like(packed)
    ordered[rows] = packed
    return ordered
