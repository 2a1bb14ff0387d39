"""Which parameter of a transformers model a tensor of a GGUF file is, and in which order its rows are.

llama.cpp's converter renames tensors and changes some: it permutes the rows of Llama's query and key, transposes
GPT-2's weights, adds one to Gemma's norms. transformers has for each architecture a processor that takes this back.
A weight can stay packed if all that is done to it is to permute its rows. This is asked of the processor: it is given
the numbers of rows and columns for a weight.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from peft_sgrq.formats.gguf.file import GGUFFile, TensorInfo


class Place(NamedTuple):
    """Where a tensor of the file goes.

    Attributes:
        parameter (`str`): The name of the parameter.
        packable (`bool`): Whether the tensor is the parameter but for the order of its rows.
        rows (`torch.Tensor` or `None`): Which row of the tensor each row of the parameter is, int64; `None` if they
            are in the same order.
    """

    parameter: str
    packable: bool
    rows: torch.Tensor | None


def tensor_processor(file: GGUFFile, config: Any) -> Any:
    """transformers' processor of the file's architecture."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    return TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=config.to_dict())


def find_places(file: GGUFFile, model: nn.Module) -> dict[str, Place]:
    """Where the tensors of a file go in a model, by their names; a model without weights (on meta) will do.

    Raises:
        ValueError: If the architecture is not known, or what the file holds cannot be put into the model.
    """
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    config: Any = model.config
    processor = tensor_processor(file, config)
    try:
        names = get_gguf_hf_weights_map(model, processor, model_type=file.architecture)
    except NotImplementedError as error:
        raise ValueError(
            f"{file.path} holds a model of the architecture {file.architecture!r}, which the gguf package does not "
            "know, expected one it does; upgrade it with `pip install -U gguf`."
        ) from error
    _check_tensors(file)
    return {
        name: Place(names[name], *_row_order(processor, info)) for name, info in file.tensors.items() if name in names
    }


def check_complete(file: GGUFFile, places: dict[str, Place], model: Any) -> None:
    """Refuses a file without the weights of a layer, which would be random then, or with weights of other shapes.

    Heads that transformers puts on a model for other tasks than language modeling are new, and do not count.

    Args:
        file (`GGUFFile`): The file.
        places (`dict[str, Place]`): Where its tensors go.
        model: The model, before its weights are loaded.

    Raises:
        ValueError: If tensors are missing, or are not of the shapes that follow from the header.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    for name, place in places.items():
        expected = shapes.get(place.parameter)
        found_shape = file.tensors[name].shape
        if place.packable and expected not in (None, found_shape):
            raise ValueError(
                f"{file.path} holds {name!r} of shape {found_shape}, expected {expected}, which follows from its "
                "header; copy or download it again, or use another file of the model."
            )
    found = {place.parameter for place in places.values()}
    body, head = model.base_model, model.get_output_embeddings()
    needed = {id(parameter) for module in (body, head) if module is not None for parameter in module.parameters()}
    missing = [
        name
        for name, parameter in model.named_parameters()
        if id(parameter) in needed
        and name not in found
        and name not in model.all_tied_weights_keys
        and not name.endswith(".bias")  # zero then, where transformers has one that llama.cpp has not
    ]
    if missing:
        raise ValueError(
            f"{file.path} has no tensors for {len(missing)} weights of the model, {', '.join(missing[:3])}"
            f"{' and so on' if len(missing) > 3 else ''}, expected all of them; copy or download it again, or use "
            "another file of the model."
        )


def _check_tensors(file: GGUFFile) -> None:
    experts = file.metadata.get(f"{file.architecture}.expert_count", 0)
    if experts:
        raise ValueError(
            f"{file.path} holds a model of {experts} experts, whose scales cannot be tuned, expected a model without "
            "experts; use a dense one."
        )
    for name, info in file.tensors.items():
        if info.kind is not None and len(info.shape) != 2:
            raise ValueError(
                f"{file.path} holds {name!r} of shape {info.shape} in {info.kind.name}: the scales of stacked "
                "matrices, as experts are, cannot be tuned, expected matrices; use a model without experts."
            )
        if name.endswith(".scale"):
            raise ValueError(
                f"{file.path} holds {name!r}, a scale for a whole matrix, which transformers does not apply, expected "
                "a file without such tensors; use another quantization of the model."
            )


def _row_order(processor: Any, info: TensorInfo) -> tuple[bool, torch.Tensor | None]:
    if len(info.shape) != 2:
        return False, None
    count, width = info.shape
    probed = None
    for columns in dict.fromkeys((min(2, width), width)):  # bloom's processor reshapes by the real width
        numbers = [
            np.repeat(np.arange(count)[:, None], columns, 1),
            np.repeat(np.arange(columns)[None], count, 0),
        ]
        try:
            probed = [
                np.asarray(
                    processor.process(
                        weights=values.copy(), name=info.name, parsed_parameters={"tensors": {}}, tensor_key_mapping={}
                    ).weights
                )
                for values in numbers
            ]
        except (ValueError, KeyError):
            continue
        break
    if probed is None:
        return False, None
    rows, found = probed
    if rows.shape != numbers[0].shape or (rows != rows[:, :1]).any() or not np.array_equal(found, numbers[1]):
        return False, None
    order = rows[:, 0].copy()
    return True, None if np.array_equal(order, np.arange(count)) else torch.from_numpy(order)
