"""Files that a caller names: checked before the work, written whole or not at all, at the cost of nothing else.

A regular file is written beside its place and renamed onto it, links followed. Devices, pipes and sockets are never
renamed onto: what was made is copied into them.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

# A mounted file cannot be renamed onto, nor can a file in a folder that may not be written to.
_CANNOT_RENAME = (errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def written(path: str | os.PathLike[str]) -> Iterator[str]:
    """Gives the path of an empty file to write to; what is in it at the end comes to be at `path`.

    If the body raises, or is interrupted, `path` is as it was. Folders that `path` lacks are made.

    Args:
        path (`str` or path): A file that is there or not, a link to one (which stays a link), or a device or pipe.

    Raises:
        ValueError: If `path` is a folder or a socket, or what reads the pipe went away.
        OSError: If it cannot be written to.
    """
    path = os.fspath(path)
    kind = _kind(path)
    if kind is None or stat.S_ISREG(kind):
        with _scratch(path) as (scratch, target):
            with _as_os_error(path):
                yield scratch
            _put(scratch, target)
        return
    with tempfile.TemporaryDirectory(prefix="sgrq-") as folder:
        scratch = os.path.join(folder, f"output{_ending(path)}")
        with _as_os_error(path):
            yield scratch
        _copy_into(scratch, path)


def check_output(path: str | os.PathLike[str], what: str = "The output") -> None:
    """Refuses a path that [`written`] could not write to; what is there stays as it is.

    Args:
        path (`str` or path): The file to be written.
        what (`str`): What it is, to begin the sentence with.

    Raises:
        ValueError: If it cannot; the sentence says why.
    """
    path = os.fspath(path)
    try:
        kind = _kind(path)
        if kind is not None and not stat.S_ISREG(kind):
            if not _may_write(path):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return
        made = _make_folders(os.path.dirname(os.path.realpath(path)))
        try:
            with _scratch(path):
                pass
        finally:
            _remove_folders(made)
    except OSError as error:
        raise ValueError(
            f"{what} {path!r} cannot be written ({error.strerror or error}), expected a file in a folder that can be "
            "written to; name another."
        ) from error


def check_apart(path: str | os.PathLike[str], folder: str | os.PathLike[str], what: str = "The output") -> None:
    """Refuses a file and a folder, both to be written, if the folder is to be where the file is.

    Args:
        path (`str` or path): The file.
        folder (`str` or path): The folder.
        what (`str`): What the file is, to begin the sentence with.
    """
    if Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(path)):
        raise ValueError(
            f"{what} {os.fspath(path)!r} is a file to be written and the folder {os.fspath(folder)!r} is to be in its "
            "place, expected two paths; name another."
        )


def check_not_read(path: str | os.PathLike[str], *sources: str | None) -> None:
    """Refuses a file to be written if it is one that is read, or in a folder that is: it would be lost.

    Args:
        path (`str` or path): The file to be written.
        sources (`str` or `None`): What is read: files, folders, or names of the Hub.
    """
    target = os.path.realpath(path)
    for source in sources:
        if source is None or not os.path.isfile(target) or not os.path.exists(source):
            continue
        if Path(target).is_relative_to(os.path.realpath(source)):
            what = "read, too" if os.path.isfile(source) else f"a file of {source!r}, which is read"
            raise ValueError(
                f"The output {os.fspath(path)!r} is {what}, expected another file: what is in it would be lost; name "
                "another, or delete it first."
            )


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
        made = _make_folders(target)
        try:
            with _scratch(os.path.join(target, "probe")):
                pass
        finally:
            _remove_folders(made)
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


def is_standard_output(path: str | os.PathLike[str]) -> bool:
    """Whether a path is what this process prints to, as /dev/stdout is."""
    try:
        found, printed = os.stat(path), os.fstat(sys.stdout.fileno())
    except (OSError, ValueError, AttributeError):  # there is none, or it is no file
        return False
    return os.path.samestat(found, printed)


def _kind(path: str) -> int | None:
    """The mode of what is at a path, links followed; `None` if there is nothing. Folders and sockets are refused."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if path.endswith(os.sep) or not path:
            raise ValueError(f"{path!r} is a folder, expected a file; name one in it.") from None
        return None
    if stat.S_ISDIR(mode):
        raise ValueError(f"{path!r} is a folder, expected a file; name one in it.")
    if stat.S_ISSOCK(mode):
        raise ValueError(f"{path!r} is a socket, expected a file; name one.")
    # What is printed to is written into, even where it was led to a file: both share a position in it. So is an open
    # file without a name (/dev/fd/3).
    through = is_standard_output(path) or not os.path.exists(os.path.realpath(path))
    return stat.S_IFIFO if stat.S_ISREG(mode) and through else mode


@contextmanager
def _scratch(path: str) -> Iterator[tuple[str, str]]:
    """An empty file beside a path (elsewhere if only the file itself may be written to), and what it is to become."""
    target = os.path.realpath(path)
    there = os.path.exists(target)
    if there and not _may_write(target):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
    folder = os.path.dirname(target)
    os.makedirs(folder, exist_ok=True)
    scratch = os.path.join(folder, f".sgrq-{secrets.token_hex(6)}{_ending(path)}")
    try:
        handle = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # with the permissions of a new file
    except OSError as error:
        if not there or error.errno not in _CANNOT_RENAME:
            raise
        handle, scratch = tempfile.mkstemp(prefix="sgrq-", suffix=_ending(path))
    try:
        os.close(handle)
        yield scratch, target
    finally:
        with suppress(FileNotFoundError):
            os.remove(scratch)


def _may_write(path: str) -> bool:
    return os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def _put(scratch: str, target: str) -> None:
    if os.path.dirname(scratch) == os.path.dirname(target):
        try:
            if os.path.exists(target):
                shutil.copymode(target, scratch)
            os.replace(scratch, target)
            return
        except OSError as error:
            if error.errno not in _CANNOT_RENAME or not os.path.isfile(target):
                raise
    _copy_into(scratch, target)


def _copy_into(scratch: str, path: str) -> None:
    printed = is_standard_output(path)
    if printed:
        sys.stdout.flush()
    try:
        with open(scratch, "rb") as source, open(os.dup(sys.stdout.fileno()) if printed else path, "wb") as target:
            shutil.copyfileobj(source, target)
    except BrokenPipeError:
        raise ValueError(f"{path!r} was closed by what reads it before all was written; the rest is lost.") from None


@contextmanager
def _as_os_error(path: str) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise OSError(f"{path} could not be written: {error}") from error


def _ending(path: str) -> str:
    return Path(path).suffix  # libraries tell formats by it


def _make_folders(folder: str) -> list[str]:
    """Makes the folders of a path that are not there, and names them, the deepest first."""
    missing: list[str] = []
    while not os.path.lexists(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    if missing:
        try:
            os.makedirs(missing[0], exist_ok=True)
        except OSError:
            _remove_folders(missing)
            raise
    return missing


def _remove_folders(folders: list[str]) -> None:
    for folder in folders:
        with suppress(OSError):
            os.rmdir(folder)
