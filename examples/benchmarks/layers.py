"""Training steps of single layers: time and memory by shape, tokens and method, over counted and measured floors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from examples.benchmarks.measure import clock, in_turn, kept_bytes, peak_bytes
from examples.benchmarks.methods import (
    LORA,
    LORA_16BIT,
    adapters,
    linear_4bit,
    linear_8bit,
    linear_hqq,
    one_layer,
)

# rows x columns: the two of the targets, then layers of models of 1, 8 and 70 billion parameters
SHAPES = {
    "2048x2048": (2048, 2048),
    "4096x11008": (4096, 11008),
    "1B up": (8192, 2048),
    "8B query": (4096, 4096),
    "8B up": (14336, 4096),
    "8B down": (4096, 14336),
    "70B query": (8192, 8192),
    "70B down": (8192, 28672),
}

QUANTS: dict[str, Callable[[int, int, torch.device, torch.dtype], nn.Module]] = {
    "nf4": lambda rows, columns, device, dtype: linear_4bit(rows, columns, device, dtype=dtype),
    "int8": lambda rows, columns, device, dtype: linear_8bit(rows, columns, device),
    "hqq": linear_hqq,
}


def measure_layer(
    shape: tuple[int, int],
    tokens: int,
    device: torch.device,
    repeats: int,
    quant: str = "nf4",
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """Times forward and backward pass of one layer with each method, in turn, and what they keep and take.

    Args:
        shape (`tuple[int, int]`): `(out_features, in_features)`.
        tokens (`int`): Rows of the input.
        device (`torch.device`): Where.
        repeats (`int`): Steps of each method.
        quant (`str`): One of `QUANTS`; where it has zero points, these are trained as well.
        dtype (`torch.dtype`): Of input and arithmetic; in float32 there is no LoRA of 16 bits.

    Returns:
        method -> `forward`, `step` (seconds: median, low, high), `kept`, `peak` (bytes), `parameters`.
    """
    rows, columns = shape
    models = {"base": one_layer(QUANTS[quant](rows, columns, device, dtype))}
    models |= {
        name: adapt(one_layer(QUANTS[quant](rows, columns, device, dtype)))
        for name, adapt in adapters(["linear"], zero_points=quant == "hqq").items()
        if dtype == torch.bfloat16 or name != LORA_16BIT
    }
    x = torch.randn(tokens, columns, dtype=dtype, device=device)
    dy = torch.randn(tokens, rows, dtype=dtype, device=device)
    seconds = clock(device)

    def step(model: nn.Module) -> Mapping[str, float]:
        inputs = x.detach().requires_grad_()
        start = seconds()
        y = model(inputs)
        middle = seconds()
        y.backward(dy)
        end = seconds()
        for parameter in model.parameters():
            parameter.grad = None
        return {"forward": middle - start, "step": end - start}

    jobs: dict[str, Callable[[], Mapping[str, float]]] = {
        name: (lambda model=model: step(model.train())) for name, model in models.items()
    }
    result: dict[str, Any] = in_turn(jobs, repeats)
    for name, model in models.items():
        y = model(x.detach().requires_grad_())
        result[name]["kept"] = kept_bytes(y, model)
        del y
        result[name]["peak"] = peak_bytes(lambda model=model: step(model), device)
        result[name]["parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return result


def floor(shape: tuple[int, int], tokens: int, ratio: float, ceilings: Mapping[str, float]) -> float:
    """Seconds a step would take at the rates of `ceilings`: counted operations and bytes; an estimate, not a bound.

    Forward pass and input gradient are a product of `2 T N K` operations each, the gradient of the deltas is one of
    the selected columns. The weight is dequantized twice: 0.5625 bytes a number read, 2 written.

    Args:
        shape (`tuple[int, int]`): `(out_features, in_features)`.
        tokens (`int`): Rows of the input.
        ratio (`float`): Share of the columns; 0 for the bare base.
        ceilings (`Mapping[str, float]`): What `ceilings` measured.
    """
    rows, columns = shape
    operations = (4 + 2 * ratio) * tokens * rows * columns
    moved = 2 * 2.5625 * rows * columns + ratio * (0.5 + 2 * 2) * rows * columns  # codes and the product again
    return operations / ceilings["flops"] + moved / ceilings["bytes"]


def ceilings(device: torch.device) -> dict[str, float]:
    """What the machine reaches: operations a second of a bfloat16 product, bytes a second of a copy."""
    size, seconds = 2048, clock(device)
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    source = torch.zeros(1 << 24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def timed(job: Callable[[], Any]) -> Mapping[str, float]:
        start = seconds()
        job()
        return {"seconds": seconds() - start}

    jobs = {
        "product": lambda: timed(lambda: torch.mm(a, b)),
        "copy": lambda: timed(lambda: target.copy_(source)),
    }
    best = in_turn(jobs, 15)
    return {
        "flops": 2 * size**3 / best["product"]["seconds"]["low"],
        "bytes": 2 * source.numel() / best["copy"]["seconds"]["low"],
    }


def ratios(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Step times over those of the bare base and of PEFT's default LoRA, and what is kept over LoRA's."""
    base, lora = result["base"]["step"]["median"], result[LORA]["step"]["median"]
    return {
        name: {
            "over base": values["step"]["median"] / base,
            "over LoRA": values["step"]["median"] / lora,
            "kept over LoRA": values["kept"] / result[LORA]["kept"],
        }
        for name, values in result.items()
    }
