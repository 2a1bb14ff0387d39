"""Single layers of bitsandbytes and dense ones, and models of one of them with adapters."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_sgrq import SGRQConfig, SGRQLinear
from peft_sgrq.layer.masks import encode_mask


def linear_4bit(
    rows: int,
    columns: int,
    quant_type: str = "nf4",
    block: int = 64,
    nested: bool = False,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    storage: torch.dtype = torch.uint8,
    factor: float = 1.0,
) -> bnb.nn.Linear4bit:
    """A quantized bitsandbytes 4-bit layer with random weights; it computes in the dtype of its input."""
    layer = bnb.nn.Linear4bit(columns, rows, bias=bias, quant_type=quant_type, quant_storage=storage)
    layer.weight = bnb.nn.Params4bit(
        torch.randn(rows, columns, dtype=dtype) * factor,
        requires_grad=False,
        quant_type=quant_type,
        blocksize=block,
        compress_statistics=nested,
        quant_storage=storage,
        module=layer,
    )
    return layer.to("cpu").requires_grad_(False)


def linear_8bit(rows: int, columns: int, bias: bool = True, threshold: float = 0.0) -> bnb.nn.Linear8bitLt:
    """A quantized bitsandbytes int8 layer with random weights."""
    layer = bnb.nn.Linear8bitLt(columns, rows, bias=bias, has_fp16_weights=False, threshold=threshold)
    layer.weight = bnb.nn.Int8Params(torch.randn(rows, columns), requires_grad=False)
    return layer.to("cpu").requires_grad_(False)


def linear_dense(rows: int, columns: int, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    return nn.Linear(columns, rows, bias=bias, dtype=dtype).requires_grad_(False)


def conv1d(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Conv1D:
    layer = Conv1D(rows, columns).to(dtype).requires_grad_(False)
    nn.init.normal_(layer.bias)
    return layer


def adapt(layer: nn.Module, groups: list[int] | None = None, **config: Any) -> PeftModel:
    """A PEFT model of one layer with a random adapter, on the given groups (rows of int8) or on `ratio` of them."""
    model = get_peft_model(nn.Sequential(layer), config_for(groups, layer, **config))
    return model.train()


def add_adapter(model: PeftModel, name: str, groups: list[int] | None = None, **config: Any) -> None:
    """One more random adapter for a model of one layer, and all adapters made active and trainable."""
    model.add_adapter(name, config_for(groups, the_layer(model).base_layer, **config))
    model.base_model.set_adapter(list(model.peft_config))


def config_for(groups: list[int] | None, layer: nn.Module, **config: Any) -> SGRQConfig:
    settings = {"target_modules": ["0"], "init_weights": False, "ratio": 0.5, **config}
    if groups is not None:
        settings["selection"] = {"0": encode_mask(torch.tensor(groups), selectable(layer, **config))}
    return SGRQConfig(**settings)


def selectable(layer: nn.Module, group_size: int = 64, **config: Any) -> int:
    """How many groups of columns a layer has, or rows if it is int8."""
    if isinstance(layer, bnb.nn.Linear8bitLt):
        return layer.out_features
    columns = layer.weight.shape[0] if isinstance(layer, Conv1D) else layer.in_features
    size = layer.weight.quant_state.blocksize if isinstance(layer, bnb.nn.Linear4bit) else group_size
    return -(-columns // size)


def the_layer(model: PeftModel) -> SGRQLinear:
    return model.base_model.model[0]


def delta_of(model: PeftModel, name: str = "default") -> nn.Parameter:
    return the_layer(model).sgrq_delta[name].weight


def kept_tensors(output: torch.Tensor) -> list[torch.Tensor]:
    """What the graph of an output keeps for the backward passes of SGRQ layers.

    Read from the graph: with hooks on saved tensors the layers would not share what they save.
    """
    nodes, seen, kept = [output.grad_fn], set(), []
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [parent for parent, _ in node.next_functions]
        if "ScaledLinear" in type(node).__name__:
            kept += [tensor for tensor in node.saved_tensors if tensor is not None]
    return kept


def storage_bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of the storages of some tensors, each storage counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
