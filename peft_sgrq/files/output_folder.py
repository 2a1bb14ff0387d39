"""Folders that a caller names: checked before the work, written whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft_sgrq.files.output import as_os_error, check_output, make_folders, remove_folders, try_file


@contextmanager
def written_folder(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[str]:
    """Gives an empty folder to write to; what is in it at the end comes to be at `path`.

    If the body raises, or is interrupted, what was there is there, or nothing. It is written beside its place and
    renamed. An empty folder that is there already may be a mounted one, which cannot be: it is written in it, and
    moved up.

    Args:
        path (`str` or path): A folder to be made, or an empty one; links are followed.
        overwrite (`bool`): Whether a folder that is there is replaced.

    Raises:
        OSError: If it cannot be written to.
    """
    target = os.path.realpath(path)
    there = os.path.isdir(target)
    made = [] if there else make_folders(os.path.dirname(target))
    place = target if there and not overwrite else os.path.dirname(target)
    scratch = os.path.join(place, f".sgrq-{secrets.token_hex(6)}")
    try:
        os.mkdir(scratch)  # with the permissions of a folder made by hand, unlike a folder of tempfile
        with as_os_error(os.fspath(path)):
            yield scratch
        if not there:
            os.rename(scratch, target)
        elif overwrite:
            _replace(scratch, target)
        else:
            _move_up(scratch, target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        remove_folders(made)
        raise


def _replace(scratch: str, target: str) -> None:
    aside = tempfile.mkdtemp(prefix=f"{os.path.basename(target)}.old-", dir=os.path.dirname(target))
    old = os.path.join(aside, os.path.basename(target))
    os.rename(target, old)
    try:
        os.rename(scratch, target)
    except BaseException:
        os.rename(old, target)
        os.rmdir(aside)
        raise
    shutil.rmtree(aside)


def _move_up(scratch: str, target: str) -> None:
    moved = []
    try:
        for name in os.listdir(scratch):
            moved.append(os.path.join(target, name))
            os.rename(os.path.join(scratch, name), moved[-1])
        os.rmdir(scratch)
    except BaseException:
        for one in moved:
            if os.path.isdir(one):
                shutil.rmtree(one, ignore_errors=True)
            elif os.path.lexists(one):
                os.remove(one)
        raise


def check_output_folder(path: str | os.PathLike[str]) -> str:
    """Refuses a path where no new folder can be made; nothing is left behind.

    Args:
        path (`str` or path): The folder to be made. It may be there if it is empty.

    Returns:
        `str`: The folder, links followed.

    Raises:
        ValueError: If it is there with something in it, is no folder, or cannot be made.
    """
    target = os.path.realpath(path)
    if os.path.lexists(target) and not (os.path.isdir(target) and not os.listdir(target)):
        raise ValueError(
            f"The output {os.fspath(path)!r} exists already, expected a new folder; delete it, or name another one."
        )
    try:
        try_file(os.path.join(target, "probe"))
    except OSError as error:
        raise ValueError(
            f"The output {os.fspath(path)!r} cannot be written ({error.strerror or error}), expected a folder that "
            "can be made; name another."
        ) from error
    return target


def check_merged_folder(path: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """Refuses a path where no folder can be made beside its place and renamed; nothing but a folder is ever replaced.

    Args:
        path (`str` or path): The folder to be made.
        overwrite (`bool`): Whether one that is there is to be replaced.

    Returns:
        `Path`: The folder, links followed.

    Raises:
        ValueError: If it is there and not to be replaced, is no folder, or cannot be made.
    """
    if os.path.exists(path) and not overwrite:
        raise ValueError(
            f"{path} exists already, expected a folder to be made; choose another, or replace it with "
            "`overwrite=True` (--overwrite)."
        )
    target = Path(os.path.realpath(path))
    if not os.path.lexists(target):
        check_output_folder(target)
    elif not target.is_dir():
        raise ValueError(f"{path} is no folder, expected one to be replaced, or none; choose another.")
    check_output(target.parent / "probe")  # the merged folder is renamed there
    return target
