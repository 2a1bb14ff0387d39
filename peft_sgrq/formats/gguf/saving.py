"""Saving a merged model in memory into a GGUF file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from peft_sgrq.formats.gguf.file import GGUFFile
from peft_sgrq.formats.gguf.layers import GGUFLinear
from peft_sgrq.formats.gguf.names import find_places, tensor_processor
from peft_sgrq.formats.gguf.writing import check_target, in_file_order, write_file

_LOADED_IN = (torch.float32, torch.bfloat16, torch.float16)


def save_gguf(model: Any, path: str | os.PathLike[str], *, name: str | None = None, overwrite: bool = False) -> Path:
    """Writes a copy of the file a model was loaded from, with the scales its layers have now.

    For a model that `merge_and_unload` made of an adapted one. The header and all other tensors stay as they are.

    Args:
        model (`nn.Module`): A model that `load_gguf` loaded.
        path (`str` or path): The file to make.
        name (`str` or `None`): The `general.name` to write into the header; it stays as it is if not given.
        overwrite (`bool`): Replace the file if it exists.

    Returns:
        `Path`: The file.

    Raises:
        ValueError: If the model has adapters that are not merged, no layer was loaded from a GGUF file, that file has
            changed since, weights that are not packed have, or the file cannot be written. Nothing is written then.
    """
    out = Path(path)
    layers = [module for module in model.modules() if isinstance(module, GGUFLinear)]
    loaded = [(layer, layer.source) for layer in layers if layer.source is not None]
    files = {source.file for _, source in loaded}
    if len(files) != 1:
        raise ValueError(
            f"The model has layers from {len(files)} GGUF files, expected one; load it with `peft_sgrq.load_gguf`."
        )
    if any(hasattr(module, "merged_adapters") and not module.merged for module in model.modules()):
        raise ValueError(
            "The model has adapters that are not merged, expected a merged model; call `merge_and_unload()` first."
        )
    file = GGUFFile(files.pop())
    check_target(os.fspath(path), file, overwrite)
    _check_dense(file, model)
    makers = {}
    for layer, source in loaded:
        info = file.tensors.get(source.tensor)
        if info is None or info.ggml_type != layer.ggml_type or info.shape != (layer.out_features, layer.in_features):
            raise ValueError(
                f"{file.path} does not hold the tensor {source.tensor!r} as it was loaded, expected the file "
                "unchanged; put it back. Nothing was written."
            )
        packed, now = file.data(source.tensor), in_file_order(layer.packed.detach().cpu(), source.rows)
        held = layer.scales()
        codes = torch.ones(layer.kind.nbytes, dtype=torch.bool)
        codes[held.scale_bytes] = False
        shape = -1, layer.kind.nbytes
        if not torch.equal(packed.view(shape)[:, codes], now.reshape(shape)[:, codes]):
            raise ValueError(
                f"{file.path} holds other codes for {source.tensor!r} than the model, expected the file it was loaded "
                "from; put it back. Nothing was written."
            )
        makers[source.tensor] = now.detach
    write_file(file, out, makers, name)
    return out


def _check_dense(file: GGUFFile, model: Any) -> None:
    """Refuses a model whose weights that are not packed are others than those of the file: they would be lost."""
    from peft_sgrq.formats.gguf.quantizer import dense_tensors

    state, processor = model.state_dict(), tensor_processor(file, model.config)
    for name, place in find_places(file, model).items():
        if not torch.is_floating_point(state[place.parameter]):
            continue  # packed
        for parameter, expected in dense_tensors(file, name, place, processor).items():
            found = state[parameter].detach().cpu()
            # In the dtype it was loaded in, and cast since perhaps.
            if not any(torch.equal(expected.to(dtype).to(found.dtype), found) for dtype in _LOADED_IN):
                raise ValueError(
                    f"{parameter!r} is not what {file.path} holds (trained by `modules_to_save` perhaps, or as a "
                    "dense layer in `target_modules`), which is no change of scales and would be lost, expected a "
                    "model tuned in its scales alone; train without it. Nothing was written."
                )
