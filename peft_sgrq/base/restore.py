"""Puts the fp8 codes of a checkpoint back beneath a model whose weights transformers dequantized while loading."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from peft_sgrq.base.workarounds.transformers_save import drop_conversions
from peft_sgrq.files.architecture import renamed_as_loaded
from peft_sgrq.files.folder import CheckpointFolder
from peft_sgrq.files.names import Names
from peft_sgrq.files.sources import find_folder
from peft_sgrq.formats.fp8_blocks.weight import Fp8BlockLinear

_SCALE = ".weight_scale_inv"


def restore_codes(model: nn.Module, checkpoint: str | os.PathLike[str] | None = None) -> int:
    """Makes the linear layers of a model compute from the fp8 codes and block scales of its checkpoint.

    Without a GPU for fp8, transformers dequantizes a fine-grained fp8 checkpoint while it loads it, and the scales an
    adapter could train are gone. This replaces each dequantized `nn.Linear` by a layer with its codes and scales,
    which takes half the memory and computes the same bits. Call it before the adapter is added.

    Args:
        model (`nn.Module`): A model of transformers, loaded from the checkpoint.
        checkpoint (`str`, path or `None`): Folder or Hub id of the checkpoint; the one the model was loaded from if
            not given.

    Returns:
        `int`: How many layers were replaced.

    Raises:
        ValueError: If the checkpoint is not in fine-grained fp8, or a weight of the model is not the one its codes
            make. The model is as it was then.
    """
    source: Any = checkpoint or getattr(model, "name_or_path", "")
    with CheckpointFolder(find_folder(source, "checkpoint")) as folder:
        replaced = _layers_of(model, folder)
    if not replaced:
        raise ValueError(
            f"None of the model's layers is a dequantized one of {folder.path}, expected nn.Linear layers that it has "
            f"`{_SCALE[1:]}` for; load the model from it with dequantize=True."
        )
    for name, layer in replaced.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    config: Any = getattr(model, "config", None)
    if config is not None:
        config.quantization_config = dict(folder.quantization)
    # transformers would reverse it when saving, by quantizing every matrix of the model once more.
    drop_conversions(model, lambda operations: [type(each).__name__ for each in operations] == ["Fp8Dequantize"])
    return len(replaced)


def _layers_of(model: nn.Module, folder: CheckpointFolder) -> dict[str, Fp8BlockLinear]:
    if folder.quantization.get("quant_method") != "fp8":
        raise ValueError(
            f"{folder.path} has the quantization method {folder.quantization.get('quant_method')!r}, expected 'fp8'; "
            "other formats keep their codes when they are loaded, add the adapter right away."
        )
    prefixes = {key.removesuffix(_SCALE) for key in folder if key.endswith(_SCALE)}
    names = Names(prefixes, lambda: {name: prefix for prefix, name in _in_memory(model, prefixes).items()})
    block = folder.quantization.get("weight_block_size")
    restored: dict[str, Fp8BlockLinear] = {}
    for name, module in model.named_modules():
        if type(module) is not nn.Linear:
            continue

        def is_right(prefix: str, name: str = name, module: nn.Linear = module) -> bool:
            try:
                return _restored(name, module, folder, prefix, block) is not None
            except ValueError:
                return False

        prefix = names.find(name, is_right)
        if prefix is not None:
            restored[name] = _restored(name, module, folder, prefix, block)
    return restored


def _in_memory(model: nn.Module, prefixes: set[str]) -> dict[str, str]:
    found = renamed_as_loaded(model, [f"{prefix}.weight" for prefix in prefixes])
    return {key.removesuffix(".weight"): name.removesuffix(".weight") for key, name in found.items()}


def _restored(
    name: str, module: nn.Linear, folder: CheckpointFolder, prefix: str, block: list[int] | None
) -> Fp8BlockLinear:
    device, dtype = module.weight.device, module.weight.dtype
    codes, scales = folder.tensor(f"{prefix}.weight").to(device), folder.tensor(prefix + _SCALE).to(device)
    try:
        layer = Fp8BlockLinear(codes.clone(), scales.clone(), block, dtype, module.bias)
    except ValueError as error:
        raise ValueError(f"Layer {name!r} cannot have its codes back: {error}. The model was not changed.") from None
    if not torch.equal(layer.dense_weight(layer.weight_scale_inv), module.weight):
        raise ValueError(
            f"Layer {name!r} has another weight than the codes in {folder.path} make, expected the weight "
            "transformers loads from it; load the model anew from that checkpoint. The model was not changed."
        )
    return layer.train(module.training)
