"""Whether what a caller names is here or on the Hub, found out at once and before it is loaded.

The libraries that load it ask the Hub for half a minute where it cannot be reached, and for paths, too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

# Of files; what ends so is no name of a repository.
_ENDINGS = (".txt", ".md", ".jsonl", ".json", ".csv", ".parquet", ".safetensors", ".gguf", ".pdf")
_TIMEOUT = 10  # seconds


def check_source(
    name: str | os.PathLike[str],
    what: str,
    revision: str | None = None,
    kind: Literal["model", "dataset"] = "model",
) -> None:
    """Refuses a name that is neither a file or folder here, nor a repository of the Hub in the cache or to be had.

    Args:
        name (`str` or path): What a caller named.
        what (`str`): What it is to be, e.g. `"adapter"`, for the sentence.
        revision (`str` or `None`): Branch, tag or commit on the Hub.
        kind (`"model"` or `"dataset"`): What the repository holds.

    Raises:
        ValueError: If it is neither.
    """
    if os.path.exists(name):
        return
    text = os.fspath(name)
    here = "folder" if kind == "model" else "file or folder"
    if text.lower().endswith(_ENDINGS):
        raise ValueError(f"The {what} {text!r} is no file here, expected its path; correct it.")
    if _is_path(text):
        raise ValueError(f"The {what} {text!r} is no {here} here, expected its path or a name on the Hub; correct it.")
    reason = None if _is_cached(text, kind) else _absence(text, revision, kind)
    if reason is not None:
        raise ValueError(
            f"The {what} {text!r} is no {here} here and could not be had from the Hub ({reason}); give its path, or "
            "download it first with `hf download`."
        )


@contextmanager
def downloading(what: str, mend: str) -> Iterator[None]:
    """Raises a ValueError if a download in it fails: that `what` could not be had, and what to give instead."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{what} could not be had from the Hub ({reason}); give the path of {mend}, or download it first with "
            "`hf download`."
        ) from error


def _is_path(name: str) -> bool:
    """Whether a name can only be that of a file or folder."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    if os.path.isabs(name) or name.startswith((".", "~")):
        return True
    try:
        validate_repo_id(name)
    except HFValidationError:
        return True
    return False


def _is_cached(name: str, kind: str) -> bool:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = os.path.join(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type=kind))
    return os.path.isdir(os.path.join(folder, "snapshots"))


def _absence(name: str, revision: str | None, kind: str) -> str | None:
    """Why a repository cannot be had; `None` if it can be, or if that is for the library to find out that loads it."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    if constants.is_offline_mode():
        # Datasets are kept in a cache of their own, too.
        return "HF_HUB_OFFLINE is set, and it is not in the cache" if kind == "model" else None
    for attempt in (1, 2):
        try:
            HfApi().repo_info(name, revision=revision, repo_type=kind, timeout=_TIMEOUT)
            return None
        except RepositoryNotFoundError:
            return "there is none of that name, or it is private and you are not logged in"
        except HfHubHTTPError:
            return None
        except Exception as error:  # which of them depends on the library beneath huggingface_hub
            reason = f"which cannot be reached: {str(error).strip() or type(error).__name__}"
        if attempt == 1:
            time.sleep(1)
    return reason
