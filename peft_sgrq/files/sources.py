"""Where a base and an adapter are: a local folder, or a repository of the Hub in the local cache or downloaded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from peft_sgrq.files.hub import check_source, downloading

# Weights in other forms would hold the unmerged model, or are not needed beside safetensors.
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".safetensors")
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_OTHER_INDEXES = ("pytorch_model.bin.index.json", "adapter_config.json")


def find_folder(name: str | os.PathLike[str], what: str, revision: str | None = None) -> Path:
    """The local folder of a model or an adapter; from the Hub it is downloaded, or taken from the cache offline.

    Args:
        name (`str` or path): A folder, or the id of a repository on the Hub.
        what (`str`): What is looked for, for the error.
        revision (`str` or `None`): Branch, tag or commit on the Hub.

    Raises:
        ValueError: If it is neither.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"The {what} {str(name)!r} is a file, expected a folder; give the one it is in.")
    check_source(name, what, revision)
    from huggingface_hub import snapshot_download

    patterns = [f"*{ending}" for ending in _OTHER_WEIGHTS if ending != ".safetensors"]
    with downloading(f"The {what} {str(name)!r} is no folder here and", "its folder"):
        return Path(snapshot_download(str(name), revision=revision, ignore_patterns=patterns))


def find_adapter(name: str | os.PathLike[str]) -> Path:
    """The local folder of an adapter; see [`find_folder`].

    Raises:
        ValueError: If there is none, or it holds no adapter.
    """
    folder = find_folder(name, "adapter")
    check_adapter_folder(folder)
    return folder


def check_adapter_folder(folder: str | os.PathLike[str]) -> None:
    """Refuses a folder, which is there, that no adapter was saved to; a base in the adapter's place, for instance.

    Raises:
        ValueError: If it has no config or no weights in safetensors, or the config is broken.
    """
    if not all(os.path.isfile(os.path.join(folder, name)) for name in _ADAPTER):
        raise ValueError(
            f"{folder} holds no adapter, expected {' and '.join(_ADAPTER)}; give the folder `save_pretrained` wrote "
            "them to."
        )
    adapter_fields(Path(folder))


def find_base(base: str | os.PathLike[str] | None, adapter: Path, revision: str | None) -> Path:
    """The local folder of a base; see [`find_folder`]. `None` stands for the one an adapter names.

    Raises:
        ValueError: If there is none, or the adapter names none.
    """
    if base is None:
        config = adapter_fields(adapter)
        base, revision = config.get("base_model_name_or_path"), revision or config.get("revision")
    if not base:
        raise ValueError(f"{adapter} does not name its base; give the folder or the Hub id of the base (`--base`).")
    return find_folder(base, "base model", revision)


def adapter_fields(adapter: Path) -> dict[str, Any]:
    """The fields of an adapter's config as they stand in its file; none if there is no such file.

    Raises:
        ValueError: If the file is broken.
    """
    path = adapter / "adapter_config.json"
    if not path.is_file():
        return {}
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); copy or download the adapter again.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a {type(fields).__name__}, expected the fields of a config; save it again.")
    return fields


def other_files(folder: Path, weights: set[str]) -> tuple[list[Path], list[Path]]:
    """The files of a checkpoint besides its weights, as relative paths: those to carry over, and those to leave.

    Left are hidden files, weights in another form (they would be those of the unmerged model) and adapters.

    Args:
        folder (`Path`): The checkpoint.
        weights (`set[str]`): The files of its weights and their index.
    """
    carried: list[Path] = []
    left: list[Path] = []
    for root, directories, files in os.walk(folder):
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        for name in sorted(files):
            path = (Path(root) / name).relative_to(folder)
            if path.as_posix() in weights or name.startswith("."):
                continue
            is_weight = name.endswith(_OTHER_WEIGHTS) or name in _OTHER_INDEXES
            (left if is_weight else carried).append(path)
    return carried, left
