"""Single layers of compressed-tensors and of fine-grained fp8, as models get them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_sgrq import SGRQConfig
from peft_sgrq.formats.compressed_tensors.weight import keep_compressed
from peft_sgrq.formats.fp8_blocks.weight import Fp8BlockLinear

FLOAT8 = torch.float8_e4m3fn


def compressed(scheme: str, rows: int = 256, columns: int = 384, bias: bool = True) -> nn.Linear:
    """A layer of compressed-tensors in float32, as transformers loads it."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import compress_module
    from compressed_tensors.quantization import initialize_module_for_quantization, preset_name_to_scheme

    layer = nn.Linear(columns, rows, bias=bias)
    initialize_module_for_quantization(layer, preset_name_to_scheme(scheme, ["Linear"]))
    layer.quantization_status = "frozen"
    layer.weight_scale.data = torch.rand_like(layer.weight_scale) * 0.01 + 0.005
    if hasattr(layer, "input_scale"):
        layer.input_scale.data.fill_(0.02)
    compress_module(layer)
    keep_compressed(layer)
    return layer.requires_grad_(False)


def fp8_layer(rows: int = 256, columns: int = 384, bias: bool = True, block: Any = (128, 128)) -> Fp8BlockLinear:
    codes = torch.randn(rows, columns).to(FLOAT8)
    shape = (1, 1) if block is None else (-(-rows // block[0]), -(-columns // block[1]))
    own_bias = nn.Parameter(torch.randn(rows)) if bias else None
    layer = Fp8BlockLinear(codes, torch.rand(shape) + 0.5, block, torch.float32, own_bias)
    return layer.requires_grad_(False)


def adapt(layer: nn.Module, **config: Any) -> PeftModel:
    settings = {"target_modules": ["0"], "init_weights": False, "ratio": 0.5, **config}
    return get_peft_model(nn.Sequential(layer), SGRQConfig(**settings)).train()
