"""Checking a merged checkpoint against its base and its adapter, tensor by tensor."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from peft_sgrq.checkpoint.plan import MergePlan, plan_merge
from peft_sgrq.checkpoint.quantization_fields import reading_fields, without_empty
from peft_sgrq.files.folder import INDEX, CheckpointFolder
from peft_sgrq.files.sources import find_folder, name_of_base, other_files

# What transformers writes anew whenever it saves.
_VOLATILE = ("transformers_version", "_name_or_path")


class VerifyReport(NamedTuple):
    """What a comparison found.

    Attributes:
        same (`int`): Tensors with the bytes of the base.
        merged (`int`): Tensors with the scales the adapter makes.
        errors (`list[str]`): What is wrong, a sentence each; empty if the checkpoint is the merged base.
        notes (`list[str]`): What is missing beside the weights, and does no harm.
    """

    same: int
    merged: int
    errors: list[str]
    notes: list[str]

    @property
    def ok(self) -> bool:
        return not self.errors


def verify_checkpoint(
    base: str | os.PathLike[str] | None,
    adapter: str | os.PathLike[str],
    merged: str | os.PathLike[str],
    *,
    revision: str | None = None,
    check_base: bool = True,
) -> VerifyReport:
    """Checks that a checkpoint is a base with an adapter merged into it, and nothing else.

    Every tensor must have the bytes of the base, or, where the adapter changes it, the bytes the adapter makes of it.
    It does not matter which files the tensors are in, so a model merged in memory and saved can be checked too.

    Args:
        base (`str`, path or `None`): Folder or Hub id of the base; `None` takes the one the adapter names.
        adapter (`str` or path): Folder or Hub id of the adapter.
        merged (`str` or path): Folder or Hub id of the merged checkpoint.
        revision (`str` or `None`): Revision of the base on the Hub; the one the adapter names if not given.
        check_base (`bool`): Refuse a base that is not the one the adapter was trained on.

    Returns:
        `VerifyReport`: What was found.

    Raises:
        ValueError: If there is nothing to compare: a folder is missing or broken, or the adapter is of another base.
    """
    adapter_folder = find_folder(adapter, "adapter")
    if base is None:
        base, named_revision = name_of_base(adapter_folder)
        revision = revision or named_revision
    plan = plan_merge(find_folder(base, "base model", revision), adapter_folder, check=check_base)
    result = CheckpointFolder(find_folder(merged, "merged model"))
    errors: list[str] = []
    same, changed = _compare_tensors(plan, result, errors)
    notes = _compare_files(plan, result, errors)
    return VerifyReport(same, changed, errors, notes)


def _compare_tensors(plan: MergePlan, result: CheckpointFolder, errors: list[str]) -> tuple[int, int]:
    same = changed = 0
    for name in plan.base:
        change = plan.changes.get(name)
        if name in plan.changes and change is None:
            if name in result:
                errors.append(f"{name} is there, expected it to be dropped (its scales are un-nested).")
        elif name not in result:
            errors.append(f"{name} is missing.")
        elif change is not None:
            if result.has(name, change.tensor()):
                changed += 1
            elif plan.base.same_bytes(name, result):
                errors.append(f"{name} is that of the base, expected the adapter merged into it.")
            else:
                errors.append(f"{name} holds other values than the base with the adapter merged.")
        elif plan.base.same_bytes(name, result):
            same += 1
        else:
            found, expected = result.entry(name).dtype, plan.base.entry(name).dtype
            dtypes = f" Its dtype is {found}, expected {expected}: load the base in the dtype of its file."
            differs = f"{name} differs from the base, which the adapter does not change."
            errors.append(differs + (dtypes if found != expected else ""))
    errors.extend(f"{name} is not in the base." for name in result if name not in plan.base)
    return same, changed


def _compare_files(plan: MergePlan, result: CheckpointFolder, errors: list[str]) -> list[str]:
    carried, _ = other_files(plan.base.path, {*plan.base.shards, INDEX})
    missing = []
    for path in carried:
        source, target = plan.base.path / path, result.path / path
        if not target.is_file():
            missing.append(path.as_posix())
        elif path.name == "config.json" and len(path.parts) == 1:
            expected = plan.base.config if plan.config is None else plan.config
            errors.extend(_compare_fields(str(path), expected, result.config))
        elif path.suffix == ".json":
            try:
                errors.extend(_compare_fields(str(path), _load(source), _load(target)))
            except ValueError:
                errors.append(f"{path} is not JSON in the base or in the merged checkpoint.")
        elif source.read_bytes() != target.read_bytes():
            errors.append(f"{path} differs from the file of the base.")
    return [f"Not in the merged checkpoint: {', '.join(missing)}."] if missing else []


def _load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _compare_fields(file: str, expected: Any, found: Any) -> list[str]:
    if not isinstance(expected, dict) or not isinstance(found, dict):
        return [] if expected == found else [f"{file} differs from the file of the base."]
    expected, found = _with_dtype(expected), _with_dtype(found)
    errors = []
    for key in sorted({*expected, *found} - set(_VOLATILE)):
        values = expected.get(key), found.get(key)
        if key == "quantization_config" and all(isinstance(value, dict) for value in values):
            fields, others = (reading_fields(value) for value in values)
            errors += [
                f"{file} has {key}.{field} = {others.get(field)!r}, expected {fields.get(field)!r}."
                for field in sorted({*fields, *others})
                if fields.get(field) != others.get(field)
            ]
        elif without_empty(values[0]) != without_empty(values[1]):
            errors.append(f"{file} has {key} = {values[1]!r}, expected {values[0]!r}.")
    return errors


def _with_dtype(fields: dict[str, Any]) -> dict[str, Any]:
    """Says `dtype` where transformers 4 said `torch_dtype`, and some files say both."""
    old = fields.get("torch_dtype")
    if old is None or fields.get("dtype", old) != old:
        return fields
    return {**{key: value for key, value in fields.items() if key != "torch_dtype"}, "dtype": old}
