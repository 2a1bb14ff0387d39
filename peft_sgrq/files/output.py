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
        with scratch_file(path) as (scratch, target):
            with as_os_error(path):
                yield scratch
            _put(scratch, target)
        return
    with tempfile.TemporaryDirectory(prefix="sgrq-") as folder:
        scratch = os.path.join(folder, f"output{_ending(path)}")
        with as_os_error(path):
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
        try_file(path)
    except OSError as error:
        raise ValueError(
            f"{what} {path!r} cannot be written ({error.strerror or error}), expected a file in a folder that can be "
            "written to; name another."
        ) from error


def check_space(place: str | os.PathLike[str], needed: int, what: str) -> None:
    """Refuses a folder on a disk with less than `needed` bytes free for `what`; nothing was written yet."""
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ValueError(
            f"{place} has {free / 1e6:,.1f} MB free, expected at least {needed / 1e6:,.1f} MB for {what}; choose "
            "another disk. Nothing was written."
        )


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
def scratch_file(path: str) -> Iterator[tuple[str, str]]:
    """An empty file beside a path (elsewhere if only the file itself may be written to), and what it is to become."""
    target = os.path.realpath(path)
    there = os.path.exists(target)
    if there and not _may_write(target):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
    made = make_folders(os.path.dirname(target))
    try:
        scratch = _make_scratch(path, target, there)
        try:
            yield scratch, target
        finally:
            with suppress(FileNotFoundError):
                os.remove(scratch)
    except BaseException:
        remove_folders(made)
        raise


def _make_scratch(path: str, target: str, there: bool) -> str:
    scratch = os.path.join(os.path.dirname(target), f".sgrq-{secrets.token_hex(6)}{_ending(path)}")
    try:
        handle = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # with the permissions of a new file
    except OSError as error:
        if not there or error.errno not in _CANNOT_RENAME:
            raise
        handle, scratch = tempfile.mkstemp(prefix="sgrq-", suffix=_ending(path))
    os.close(handle)
    return scratch


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
        to = os.dup(sys.stdout.fileno()) if printed else path
        with as_os_error(path), open(scratch, "rb") as source, open(to, "wb") as target:
            shutil.copyfileobj(source, target)
    except BrokenPipeError:
        raise ValueError(f"{path!r} was closed by what reads it before all was written; the rest is lost.") from None


@contextmanager
def as_os_error(path: str) -> Iterator[None]:
    """While this is open, what libraries make of a file system's errors is an OSError again, and names the file."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, path) from error  # writing says only what went wrong
    except Exception as error:  # what safetensors and tokenizers make of a full disk
        if isinstance(error, SafetensorError) or (type(error) is Exception and "os error" in str(error)):
            raise OSError(f"{path} could not be written: {error}") from error
        raise


def _ending(path: str) -> str:
    return Path(path).suffix  # libraries tell formats by it


def make_folders(folder: str) -> list[str]:
    """Makes the folders of a path that are not there, and names them, the deepest first."""
    missing: list[str] = []
    while not os.path.lexists(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    if missing:
        try:
            os.makedirs(missing[0], exist_ok=True)
        except OSError:
            remove_folders(missing)
            raise
    return missing


def remove_folders(folders: list[str]) -> None:
    for folder in folders:
        with suppress(OSError):
            os.rmdir(folder)


def try_file(path: str) -> None:
    """Makes a file, and the folders that its path lacks, and leaves nothing behind; an OSError if it cannot."""
    made = make_folders(os.path.dirname(os.path.realpath(path)))
    try:
        with scratch_file(path):
            pass
    finally:
        remove_folders(made)
