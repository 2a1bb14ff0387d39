"""A file of results that measurements add to, and can be stopped and repeated: written beside and renamed."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from measure import cpu

from peft_sgrq.files.output import written


class ResultsFile:
    """A JSON file: a list of settings (what all runs in it share), each with its runs.

    Args:
        path (`Path`): The file; it is made when the first run is added.
        shared (`Mapping[str, Any]`): The setting of this call; an equal one in the file is gone on with.
        versions (`Mapping[str, str]`): Package -> version.
        parts (`Mapping[str, Any]`): What a new setting has besides its runs, still empty.

    Attributes:
        setting (`dict[str, Any]`): The setting of this call.
    """

    def __init__(
        self, path: Path, shared: Mapping[str, Any], versions: Mapping[str, str], parts: Mapping[str, Any]
    ) -> None:
        self.path = path
        self.settings: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
        for setting in self.settings:
            if setting["shared"] == shared:
                self.setting = setting
                return
        self.setting = {
            "shared": dict(shared),
            "versions": dict(versions),
            "machine": machine(),
            **parts,
            "runs": [],
        }
        self.settings.append(self.setting)

    def add(self, run: dict[str, Any]) -> None:
        self.setting["runs"].append(run)
        self.save()

    def save(self) -> None:
        replace_text(self.path, json.dumps(self.settings, indent=1) + "\n")


def machine() -> str:
    """Cores, what their instructions are, threads, and the GPU."""
    extensions = " ".join([platform.machine(), *cpu()[1]])
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{os.cpu_count()} cores, {extensions}, {torch.get_num_threads()} thread(s), {gpu}"


def named(value: Any) -> Any:
    """A folder by its name, a file by its folder and name, anything else as it is: where they are says nothing."""
    if not isinstance(value, (str, Path)) or not Path(value).exists():
        return str(value) if isinstance(value, Path) else value
    return "/".join(Path(value).parts[-2 if Path(value).is_file() else -1 :])


def replace_text(path: Path, text: str) -> None:
    """Writes a file, the whole of it or nothing."""
    with written(path) as file:
        Path(file).write_text(text, encoding="utf-8")
