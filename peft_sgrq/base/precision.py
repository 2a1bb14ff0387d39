"""The dtype a machine computes fast in: bfloat16 where there are instructions for it, else one that there are.

A product in bfloat16 on an x86-64 CPU without AVX512-BF16 or AMX is computed number by number, tens of times slower
than in float32. Quantized codes and scales are the same in any of these dtypes: what is stored in 16 bits is exact in
float32.
"""

from __future__ import annotations

import platform
import sys
from typing import Any

import torch
from torch import nn


def fast_dtype(device: torch.device | str | None = None) -> torch.dtype:
    """The dtype to load and train a model in.

    Args:
        device (`torch.device`, `str` or `None`): Where it is to compute; the GPU if there is one, else the CPU, if not
            given.

    Returns:
        `torch.dtype`: bfloat16 where the device has instructions for it. Else float16 on GPUs and float32 on CPUs.
    """
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    if kind == "cpu":
        return torch.bfloat16 if _cpu_has_bfloat16() else torch.float32
    if kind == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def _cpu_has_bfloat16() -> bool:
    # What oneDNN says heeds DNNL_MAX_CPU_ISA, but calls plain AVX512 enough, on which it is emulated.
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def describe_dtype(dtype: torch.dtype) -> str:
    """A dtype for a line of output, with the reason if it is not the usual one."""
    name = str(dtype).removeprefix("torch.")
    reasons = {
        torch.float32: "this CPU has no instructions for bfloat16",
        torch.float16: "this GPU has no instructions for bfloat16",
    }
    return f"{name} ({reasons[dtype]})" if dtype in reasons and fast_dtype() == dtype else name


def compute_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Has the 4-bit layers of bitsandbytes compute in a dtype, whatever their checkpoint says; configs stay.

    Args:
        model (`nn.Module`): The model, changed in place.
        dtype (`torch.dtype`): The dtype.

    Returns:
        `nn.Module`: The same model.
    """
    bnb: Any = sys.modules.get("bitsandbytes.nn")
    for module in model.modules() if bnb is not None else ():
        if isinstance(module, bnb.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = dtype, True
    return model
