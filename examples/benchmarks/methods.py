"""The things compared: a bare base, LoRA as PEFT makes it or with adapters of 16 bits, SGRQ at some ratios."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_sgrq import SGRQConfig

RATIOS = (0.05, 0.1, 0.4, 1.0)
LORA, LORA_16BIT = "LoRA r=16", "LoRA r=16, 16 bit"
ZERO_POINTS, BOTH = "SGRQ, zero points alone", "SGRQ 1, zero points"


def sgrq_name(ratio: float) -> str:
    return f"SGRQ {ratio:g}" + (" (PEQA)" if ratio == 1.0 else "")


def adapters(
    targets: list[str] | str | None, ratios: tuple[float, ...] = RATIOS, zero_points: bool = False
) -> dict[str, Callable[[Any], Any]]:
    """Name -> what makes of a quantized base a model to train.

    Args:
        targets (`list[str]`, `str` or `None`): PEFT's `target_modules`.
        ratios (`tuple[float, ...]`): Ratios of SGRQ.
        zero_points (`bool`): Also train zero points, alone and beside all scales.
    """

    def lora(model: Any, cast: bool) -> Any:
        config = LoraConfig(r=16, lora_alpha=16, target_modules=targets, lora_dropout=0.0)
        model = get_peft_model(model, config, autocast_adapter_dtype=cast)
        if not cast:
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.to(torch.bfloat16)
        return model

    def sgrq(model: Any, ratio: float, zero_points: bool = False) -> Any:
        return get_peft_model(model, SGRQConfig(ratio=ratio, zero_points=zero_points, target_modules=targets))

    made: dict[str, Callable[[Any], Any]] = {
        LORA: lambda model: lora(model, True),
        LORA_16BIT: lambda model: lora(model, False),
    }
    for ratio in ratios:
        made[sgrq_name(ratio)] = lambda model, ratio=ratio: sgrq(model, ratio)
    if zero_points:
        made[ZERO_POINTS] = lambda model: sgrq(model, 0.0, True)
        made[BOTH] = lambda model: sgrq(model, 1.0, True)
    return made


def linear_4bit(
    rows: int,
    columns: int,
    device: torch.device,
    quant_type: str = "nf4",
    dtype: torch.dtype = torch.bfloat16,
) -> bnb.nn.Linear4bit:
    """A bitsandbytes layer with random codes and scales, made without quantizing, that computes in `dtype`."""
    block = 64
    layer = bnb.nn.Linear4bit(columns, rows, bias=False, compute_dtype=dtype, quant_type=quant_type, device="meta")
    generator = torch.Generator(device).manual_seed(rows + columns)
    codes = torch.randint(0, 256, (rows * columns // 2, 1), dtype=torch.uint8, device=device, generator=generator)
    scales = torch.rand(rows * columns // block, device=device, generator=generator) * 0.05 + 0.01
    state = bnb.functional.QuantState(
        absmax=scales,
        shape=torch.Size((rows, columns)),
        code=bnb.functional.get_4bit_type(quant_type, device=device),
        blocksize=block,
        quant_type=quant_type,
        dtype=dtype,
    )
    layer.weight = bnb.nn.Params4bit(
        codes,
        requires_grad=False,
        quant_state=state,
        blocksize=block,
        compress_statistics=False,
        quant_type=quant_type,
        bnb_quantized=True,
        module=layer,
    )
    layer.quant_state = state
    layer.support_avx512bf16_for_cpu = False  # bitsandbytes would repack the layer at its first eval forward
    return layer


def linear_8bit(rows: int, columns: int, device: torch.device) -> bnb.nn.Linear8bitLt:
    """A bitsandbytes int8 layer with random codes and scales."""
    layer = bnb.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False, device="meta")
    generator = torch.Generator(device).manual_seed(rows + columns)
    codes = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device=device, generator=generator)
    layer.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes)
    layer.weight.SCB = torch.rand(rows, device=device, generator=generator) * 0.05 + 0.01
    return layer


def linear_hqq(rows: int, columns: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A layer of random weights quantized by HQQ at 4 bits in groups of 64: it stores zero points as floats."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear

    HQQLinear.set_backend(HQQBackend.PYTORCH)
    dense = nn.Linear(columns, rows, bias=False, device=device, dtype=dtype)
    settings = BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    return HQQLinear(dense, settings, compute_dtype=dtype, device=str(device))


def one_layer(layer: nn.Module) -> nn.Sequential:
    model = nn.Sequential()
    model.add_module("linear", layer)
    return model
