"""Merging an adapter into the files of a checkpoint: no model, no GPU, memory for one tensor."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import NamedTuple

from peft_sgrq.checkpoint.gguf import find_gguf_base, plan_gguf_merge
from peft_sgrq.checkpoint.plan import MergePlan, plan_merge
from peft_sgrq.files.folder import INDEX, write_json
from peft_sgrq.files.gguf_names import makes_gguf
from peft_sgrq.files.output import check_space
from peft_sgrq.files.output_folder import check_merged_folder, written_folder
from peft_sgrq.files.sources import find_adapter, find_base, other_files
from peft_sgrq.formats.gguf.writing import check_target, write_file
from peft_sgrq.formats.scale_matrix import SERVED_ANEW

logger = logging.getLogger(__name__)


class MergeReport(NamedTuple):
    """What a merge wrote.

    Attributes:
        out (`Path`): The merged checkpoint.
        layers (`int`): How many layers were changed.
        bytes_changed (`int`): How many bytes of the weights were written anew; all others were copied.
        left_out (`list[str]`): Files of the base that were not carried over: weights in other forms, adapters.
    """

    out: Path
    layers: int
    bytes_changed: int
    left_out: list[str]


def merge_checkpoint(
    base: str | os.PathLike[str] | None,
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    revision: str | None = None,
    overwrite: bool = False,
    check_base: bool = True,
    name: str | None = None,
) -> MergeReport:
    """Merges an adapter into a checkpoint on the disk: only scale tensors change, all other bytes are copied.

    The scales are those `merge_and_unload` writes in memory. Shards, index, config, tokenizer and all other files
    are carried over. The result is written beside `out` and renamed, so `out` is whole or not there. A base that is a
    GGUF file makes a GGUF file.

    Args:
        base (`str`, path or `None`): Folder or Hub id of the base the adapter was trained on, in safetensors; `None`
            takes the one the adapter names. Or a GGUF file.
        adapter (`str` or path): Folder or Hub id of the adapter.
        out (`str` or path): Folder to make, or GGUF file.
        revision (`str` or `None`): Revision of the base on the Hub; the one the adapter names if not given.
        overwrite (`bool`): Replace `out` if it exists.
        check_base (`bool`): Refuse a base that is not the one the adapter was trained on.
        name (`str` or `None`): Of a GGUF file: the `general.name` to write; its header stays as it is if not given.

    Returns:
        `MergeReport`: What was written.

    Raises:
        ValueError: If `out` exists, the adapter or the base is broken, or they do not belong together. Nothing is
            written then.

    Example:
        ```py
        >>> from peft_sgrq import merge_checkpoint
        >>> merge_checkpoint("unsloth/Llama-3.2-1B-Instruct-bnb-4bit", "llama-sgrq", "llama-merged")
        ```
    """
    given, out = os.fspath(out), Path(out)
    # A folder is checked before anything is read.
    checked = None if makes_gguf(given, base, adapter) else check_merged_folder(out, overwrite)
    adapter_folder = find_adapter(adapter)
    gguf_base = find_gguf_base(base, adapter_folder, revision)
    if gguf_base is not None:
        gguf_plan = plan_gguf_merge(gguf_base, adapter_folder, check=check_base)
        check_target(given, gguf_plan.file, overwrite)
        changed = write_file(gguf_plan.file, out, gguf_plan.makers, name)
        return MergeReport(out, len(gguf_plan.weights), changed, [])
    if name is not None:
        raise ValueError(f"`name` is {name!r} and the base no GGUF file, expected one; leave it out.")
    target = checked or check_merged_folder(out, overwrite)
    base_folder = find_base(base, adapter_folder, revision)
    for path, what in ((base_folder, "base"), (adapter_folder, "adapter")):
        if path.resolve().is_relative_to(target):
            raise ValueError(f"{out} holds the {what}, expected another folder: the {what} would be lost.")
    plan = plan_merge(base_folder, adapter_folder, check=check_base)
    with plan.base:
        return _write(plan, target)._replace(out=out)


def _write(plan: MergePlan, out: Path) -> MergeReport:
    base = plan.base
    carried, left = other_files(base.path, {*base.shards, INDEX})
    carried = [path for path in carried if not (base.path / path).resolve().is_relative_to(out.resolve())]
    with written_folder(out, overwrite=True) as folder:
        scratch = Path(folder)
        check_space(
            out.parent, sum(shard.path.stat().st_size for shard in base.shards.values()), "the merged checkpoint"
        )
        for path in carried:
            (scratch / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(base.path / path, scratch / path)
        if plan.config is not None:
            write_json(scratch / "config.json", plan.config)
        changed = base.write(scratch, plan.changes)
    if any(layer.served_anew for layer in plan.layers.values()):
        logger.warning(SERVED_ANEW)
    if left:
        logger.warning("Not carried over, as they hold other weights: %s.", ", ".join(map(str, left)))
    return MergeReport(out, len(plan.layers), changed, [path.as_posix() for path in left])
