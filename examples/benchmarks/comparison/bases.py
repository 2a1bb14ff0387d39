"""The bases: a model by path or Hub name, in a format by name."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import Any

import torch
from bases import BASES, quantized_layers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig

from peft_sgrq import split_groups
from peft_sgrq.base.workarounds.bnb_cpu_packing import disable_cpu_packing

FORMATS = (
    'as-is, nf4, hqq-BITS-GROUP such as "hqq-3-64", the same with groups split, "nf4-32" and "hqq-3-64-16", '
    "gptq-BITS-GROUP, or a name of examples/benchmarks/bases.py"
)

_LIBRARIES = {
    "nf4": ["bitsandbytes"],
    "nf4-32": ["bitsandbytes"],
    "hqq": ["hqq"],
    "gptq": ["gptqmodel", "optimum"],
}


def load_base(model: str, base: str, dtype: torch.dtype, calibration: list[str]) -> Any:
    """A model in eval mode, its linear layers but the output head in a format.

    Args:
        model (`str`): Directory or Hub name of a causal language model.
        base (`str`): One of `FORMATS`; "as-is" is for a checkpoint that is quantized already.
        dtype (`torch.dtype`): What it computes in.
        calibration (`list[str]`): Texts for GPTQ, which needs some.

    Raises:
        ValueError: If the format is not known, or its library is not installed.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    packed = re.fullmatch(r"(hqq|gptq)-(\d+)-(\d+)(?:-(\d+))?", base)
    _check_installed(base, packed[1] if packed else base)
    if base in ("nf4", "nf4-32"):
        loaded = BASES["bnb-nf4"].load(model, dtype)
        if base == "nf4-32":
            split_groups(loaded, 32)
    elif packed and packed[4] and (packed[1] != "hqq" or int(packed[3]) % int(packed[4])):
        raise ValueError(
            f"The base {base!r} splits groups of {packed[3]} into {packed[4]}, expected HQQ and a divisor."
        )
    elif packed and packed[1] == "hqq":
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, device_map={"": device}).eval()
        _quantize_hqq(loaded, int(packed[2]), int(packed[3]))
        if packed[4]:
            split_groups(loaded, int(packed[4]))
    elif packed:
        settings = GPTQConfig(
            int(packed[2]),
            tokenizer=AutoTokenizer.from_pretrained(model),
            dataset=calibration,
            group_size=int(packed[3]),
            scaled_weight="torch",
        )
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, quantization_config=settings)
    elif base == "as-is":
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, device_map={"": device})
    elif base in BASES:
        loaded = BASES[base].load(model, dtype)
    else:
        raise ValueError(f"The base {base!r} is not known, expected {FORMATS}.")
    disable_cpu_packing(loaded)
    if device == "cpu":  # where the backward pass of fused attention takes a fifth of a step in bfloat16
        loaded.set_attn_implementation("eager")
    return loaded.eval()


def _check_installed(base: str, family: str) -> None:
    """Refuses a format whose library is not there."""
    libraries = _LIBRARIES.get(family) or ([BASES[family].library] if family in BASES else [])
    missing = [library for library in libraries if find_spec(library) is None]
    if missing:
        raise ValueError(
            f"The base {base!r} is made by {', '.join(libraries)}, of which {', '.join(missing)} is not installed; "
            "install it, or take another base."
        )


def hqq_layer(layer: nn.Linear, bits: int, group_size: int) -> nn.Module:
    """A layer quantized by HQQ, in groups along its columns."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    settings = BaseQuantizeConfig(nbits=bits, group_size=group_size, axis=1)
    return HQQLinear(layer, settings, compute_dtype=layer.weight.dtype, device=str(layer.weight.device))


def _quantize_hqq(model: Any, bits: int, group_size: int) -> None:
    # Layer by layer: HQQ's own function for whole models knows a few architectures, GPT-Neo is not one of them.
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    widths = sorted({layer.in_features for layer in layers.values() if layer is not head})
    if not any(width % group_size == 0 for width in widths):
        raise ValueError(
            f"Groups of {group_size} columns divide none of the layers, which have {widths}; take a smaller divisor."
        )
    for name, layer in layers.items():
        if layer is not head and layer.in_features % group_size == 0:
            model.set_submodule(name, hqq_layer(layer, bits, group_size))


def targets_of(model: nn.Module) -> list[str]:
    """Full names of the layers all methods adapt: the quantized ones, or in a model without any all but the head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return quantized_layers(model) or [
        name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer is not head
    ]
