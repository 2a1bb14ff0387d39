"""Checking a merged checkpoint against its base and its adapter, tensor by tensor."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

from peft_sgrq.checkpoint.config_fields import compare
from peft_sgrq.checkpoint.gguf import compare_gguf, find_gguf_base, plan_gguf_merge
from peft_sgrq.checkpoint.plan import MergePlan, plan_merge
from peft_sgrq.checkpoint.tensor_comparison import TensorComparison
from peft_sgrq.files.folder import INDEX, CheckpointFolder
from peft_sgrq.files.sources import find_adapter, find_base, find_folder, other_files

# Fields of a config that follow from the shapes of tensors.
_SIZES = ("vocab_size", "vocab_size_per_layer_input", "num_labels", "id2label", "label2id")


class VerifyReport(NamedTuple):
    """What a comparison found.

    Attributes:
        same (`int`): Tensors with the bytes of the base.
        merged (`int`): Tensors with the scales the adapter makes.
        errors (`list[str]`): What is wrong, a sentence each; empty if the checkpoint is the merged base.
        notes (`list[str]`): What is missing or differs beside the weights, and says nothing of them.
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
    It does not matter which files the tensors are in, so a model merged in memory and saved can be checked too; a new
    head or a resized vocabulary is compared with what the adapter holds of it. Fields of configs by which no weight is
    read, which trainers write, are noted where they differ.

    Args:
        base (`str`, path or `None`): Folder or Hub id of the base; `None` takes the one the adapter names.
        adapter (`str` or path): Folder or Hub id of the adapter.
        merged (`str` or path): Folder or Hub id of the merged checkpoint; a GGUF file if the base is one.
        revision (`str` or `None`): Revision of the base on the Hub; the one the adapter names if not given.
        check_base (`bool`): Refuse a base that is not the one the adapter was trained on.

    Returns:
        `VerifyReport`: What was found.

    Raises:
        ValueError: If there is nothing to compare: a folder is missing or broken, or the adapter is of another base.
    """
    adapter_folder = find_adapter(adapter)
    gguf_base = find_gguf_base(base, adapter_folder, revision)
    if gguf_base is not None:
        gguf_plan = plan_gguf_merge(gguf_base, adapter_folder, check=check_base)
        return VerifyReport(*compare_gguf(gguf_plan, Path(merged)))
    base_folder = find_base(base, adapter_folder, revision)
    result = CheckpointFolder(find_folder(merged, "merged model"))
    plan = plan_merge(base_folder, adapter_folder, check=check_base, merged=result)
    with plan.base, result:
        tensors = TensorComparison(plan, result)
        tensors.run()
        errors, notes = [*tensors.errors, *result.misplaced()], list(tensors.notes)
        if (result.path / "adapter_config.json").is_file() and not (plan.base.path / "adapter_config.json").is_file():
            errors.append("adapter_config.json is there, by which transformers loads an adapter and its base instead.")
        _compare_files(plan, result, errors, notes)
    return VerifyReport(tensors.same, tensors.merged, errors, notes)


def _compare_files(plan: MergePlan, result: CheckpointFolder, errors: list[str], notes: list[str]) -> None:
    carried, _ = other_files(plan.base.path, {*plan.base.shards, INDEX})
    missing = []
    for path in carried:
        source, target = plan.base.path / path, result.path / path
        if not target.is_file():
            if path.as_posix() == "config.json":
                errors.append("config.json is missing, by which the weights are read.")
            else:
                missing.append(path.as_posix())
        elif path.as_posix() == "config.json":
            expected = plan.base.config if plan.config is None else plan.config
            found = compare(str(path), expected, result.config, _free_fields(plan, result))
            errors.extend(found.errors)
            notes.extend(found.notes)
        elif path.suffix == ".json":
            try:
                found = compare(str(path), *(json.loads(one.read_bytes()) for one in (source, target)))
            except ValueError:
                errors.append(f"{path} is not JSON in the base or in the merged checkpoint.")
            else:
                errors.extend(found.errors)
                notes.extend(found.notes)
        elif source.read_bytes() != target.read_bytes():
            sentence = f"{path} differs from the file of the base."
            (notes if path.suffix == ".md" else errors).append(sentence)
    if missing:
        notes.append(f"Not in the merged checkpoint: {', '.join(missing)}.")


def _free_fields(plan: MergePlan, result: CheckpointFolder) -> list[str]:
    """Fields of the config in which a merge in memory may differ, given what the adapter brings."""
    classes = set(result.config.get("architectures") or ())
    free = []
    if plan.brought or classes.intersection(plan.names.trained_classes):
        free.append("architectures")
    if plan.brought:
        free.extend(_SIZES)  # whether they are those of the tensors is looked at beside
    if plan.untied and plan.config is not None:
        free.append("tie_word_embeddings")  # tensors of different values are not tied, whatever it says
    return free
