"""Merging an adapter into a GGUF file, and checking the result: a copy in which bytes of scales change alone."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from peft_sgrq.adapter.stored import StoredAdapter, read_adapter
from peft_sgrq.checkpoint.plan import changed_scales, check_fingerprints
from peft_sgrq.files.gguf_names import is_gguf
from peft_sgrq.files.names import Names
from peft_sgrq.files.sources import adapter_fields
from peft_sgrq.formats.gguf.file import GGUFFile
from peft_sgrq.formats.gguf.loading import empty_model, find_gguf
from peft_sgrq.formats.gguf.names import check_complete, find_places
from peft_sgrq.formats.gguf.stored import StoredGGUFWeight


class GGUFMergePlan(NamedTuple):
    """The changes of a merge.

    Attributes:
        file (`GGUFFile`): What is merged into.
        weights (`dict[str, StoredGGUFWeight]`): The layers whose scales change, by their names in memory.
        makers (`dict[str, Callable]`): By tensor name, what makes its new bytes.
    """

    file: GGUFFile
    weights: dict[str, StoredGGUFWeight]
    makers: dict[str, Callable[[], torch.Tensor]]


def find_gguf_base(base: str | os.PathLike[str] | None, adapter: Path, revision: str | None) -> Path | None:
    """The GGUF file a merge is to start from; `None` if the base is a checkpoint in safetensors.

    Args:
        base (`str`, path or `None`): The base as it was given; `None` takes the one the adapter names.
        adapter (`Path`): The folder of the adapter, whose config names the file.
        revision (`str` or `None`): Revision of the base on the Hub.
    """
    fields = adapter_fields(adapter)
    quantization = fields.get("base_quantization") or {}
    named = quantization.get("gguf_file") if quantization.get("quant_method") == "gguf" else None
    if base is not None and (is_gguf(base) or Path(base).is_file()):
        return find_gguf(base)
    if named is None:
        return None
    return find_gguf(base or fields.get("base_model_name_or_path") or "", named, revision or fields.get("revision"))


def plan_gguf_merge(base: Path, adapter: Path, check: bool = True) -> GGUFMergePlan:
    """Reads an adapter and the header of a file, checks that they belong together, and plans the changes.

    Args:
        base (`Path`): The file.
        adapter (`Path`): The folder of the adapter.
        check (`bool`): Compare the base with the fingerprints of the adapter, and its tokenizer.

    Raises:
        ValueError: If either is broken, or the adapter does not fit the base.
    """
    stored, file = read_adapter(adapter), GGUFFile(base)
    if not stored.deltas:
        raise ValueError(f"{adapter} changes no scales, expected the deltas of at least one layer; nothing to merge.")
    if stored.whole or stored.rows:
        name = next(iter({**stored.whole, **stored.rows}))
        raise ValueError(
            f"The adapter brings {name!r} (`modules_to_save` or `trainable_token_indices`), which is not a change of "
            "scales and would have to be quantized for a GGUF file, expected deltas alone; train without it. Nothing "
            "was written."
        )
    weights = _find_weights(file, stored)
    if check:
        _check_tokenizer(file, stored)
        if stored.config.base_fingerprint is not None:
            check_fingerprints(stored, weights)
    makers: dict[str, Callable[[], torch.Tensor]] = {}
    for name, weight in weights.items():
        make = changed_scales(name, weight, stored.deltas[name])
        makers[weight.tensor] = partial(weight.with_scales, make)
        weight.forget()
    return GGUFMergePlan(file, weights, makers)


def _find_weights(file: GGUFFile, stored: StoredAdapter) -> dict[str, StoredGGUFWeight]:
    model = empty_model(file)
    places = find_places(file, model)
    check_complete(file, places, model)
    tensors = {place.parameter.removesuffix(".weight"): name for name, place in places.items()}
    names = Names(tensors)
    sub_blocks = (stored.config.base_quantization or {}).get("sub_blocks", True)
    weights = {}
    for name in stored.deltas:
        try:
            found = names.find(name)
            if found is None:
                raise ValueError(
                    "the file has no tensor for it (an output head may be tied to the input embedding), expected "
                    "those of the base the adapter names"
                )
            tensor = tensors[found]
            weights[name] = StoredGGUFWeight(file, tensor, places[tensor], sub_blocks)
        except ValueError as error:
            raise ValueError(
                f"Layer {name!r} cannot be merged in {file.path}: {error}. Nothing was written."
            ) from None
    return weights


def _check_tokenizer(file: GGUFFile, stored: StoredAdapter) -> None:
    expected = (stored.config.base_quantization or {}).get("tokenizer")
    if expected is not None and file.tokenizer_digest() != expected:
        raise ValueError(
            f"{file.path} holds another tokenizer than the file the adapter was trained on (tokens, merges or special "
            "ids differ), expected the same: token ids would mean other things. Merge into the file it was trained "
            "on, or pass `check_base=False` (`--no-check`) if you know that ids are the same. Nothing was written."
        )


def compare_gguf(plan: GGUFMergePlan, merged: Path) -> tuple[int, int, list[str], list[str]]:
    """Compares a file with what a merge would make.

    Returns:
        How many tensors are as in the base, how many have the adapter merged, what is wrong, and what is worth a note.
    """
    base, result = plan.file, GGUFFile(merged)
    errors: list[str] = []
    notes: list[str] = []
    _compare_headers(base, result, errors, notes)
    same = changed = 0
    for name, info in base.tensors.items():
        other = result.tensors.get(name)
        if other is None:
            errors.append(f"{name} is missing.")
            continue
        if (other.shape, other.ggml_type) != (info.shape, info.ggml_type):
            errors.append(f"{name} has another shape or type than in the base.")
            continue
        found, before = result.data(name), base.data(name)
        if name in plan.makers:
            if torch.equal(found, plan.makers[name]()):
                changed += 1
            elif torch.equal(found, before):
                errors.append(f"{name} is that of the base, expected the adapter merged into it.")
            else:
                errors.append(f"{name} holds other values than the base with the adapter merged.")
        elif torch.equal(found, before):
            same += 1
        else:
            errors.append(f"{name} differs from the base, which the adapter does not change.")
    errors.extend(f"{name} is not in the base." for name in result.tensors if name not in base.tensors)
    sizes = [file.size - file.data_start for file in (base, result)]
    if sizes[0] != sizes[1]:
        errors.append(f"There are {sizes[1]:,} bytes behind the header, expected the {sizes[0]:,} of the base.")
    elif any(mine != its for mine, its in itertools.zip_longest(base.padding(), result.padding())):
        errors.append("Bytes between the tensors, or behind them, differ from those of the base.")
    return same, changed, errors, notes


def _compare_headers(base: GGUFFile, result: GGUFFile, errors: list[str], notes: list[str]) -> None:
    header = b"".join(result.chunks(0, result.data_start))
    if header == b"".join(base.chunks(0, base.data_start)):
        return
    name = result.metadata.get("general.name")
    if isinstance(name, str) and header == base.named_header(name):
        notes.append(f"The file is named {name!r}, the base {base.metadata.get('general.name')!r}.")
    else:
        errors.append("The header (metadata, or the table of tensors) differs from that of the base.")
