"""Quantized bases by name, for the benchmarks: a format joins by a function under `@base(name, library)`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

Load = Callable[[str, torch.dtype], nn.Module]
Requantize = Callable[[nn.Module, nn.Module], torch.Tensor]


class Base(NamedTuple):
    """A format: its name, the package it needs, and `(model name, dtype) -> quantized model`.

    `requantize` is there where PEFT merges LoRA into dense weights and the format is not what it merges into: it maps
    `(model, dense layer)` to the dense weight that quantizing the layer anew leaves.
    """

    name: str
    library: str
    load: Load
    requantize: Requantize | None = None


BASES: dict[str, Base] = {}


def base(name: str, library: str, requantize: Requantize | None = None) -> Callable[[Load], Load]:
    """Registers a format under a name."""

    def register(load: Load) -> Load:
        BASES[name] = Base(name, library, load, requantize)
        return load

    return register


def installed(names: list[str]) -> Iterator[Base]:
    """The formats of these names (all if there are none), but those whose library is missing, which are named.

    Raises:
        ValueError: If a name is not that of a format.
    """
    unknown = sorted(set(names) - set(BASES))
    if unknown:
        raise ValueError(f"Unknown formats {unknown}, expected some of {sorted(BASES)}.")
    for name in names or BASES:
        if find_spec(BASES[name].library) is None:
            print(f"{name}: skipped, {BASES[name].library} is not installed")
        else:
            yield BASES[name]


def quantized_layers(model: nn.Module) -> list[str]:
    """Names of the layers a format has quantized: those `SGRQConfig(target_modules=None)` would take."""
    from peft_sgrq.formats.registry import is_quantized

    return [name for name, module in model.named_modules() if is_quantized(module)]


def _from_pretrained(model: str, dtype: torch.dtype, **kwargs: Any) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **kwargs).eval()


def _bnb(model: str, dtype: torch.dtype, **settings: Any) -> nn.Module:
    loaded = _from_pretrained(model, dtype, quantization_config=BitsAndBytesConfig(**settings))
    for module in loaded.modules():  # bitsandbytes would round the scales of 4-bit layers on CPUs with AVX512-BF16
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return loaded


def _bnb_4bit(kind: str, nested: bool) -> Load:
    return lambda model, dtype: _bnb(
        model,
        dtype,
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=dtype,
    )


base("bnb-nf4", "bitsandbytes")(_bnb_4bit("nf4", False))
base("bnb-nf4-nested", "bitsandbytes")(_bnb_4bit("nf4", True))
base("bnb-fp4", "bitsandbytes")(_bnb_4bit("fp4", False))
base("bnb-int8", "bitsandbytes")(lambda model, dtype: _bnb(model, dtype, load_in_8bit=True))


def _torchao(model: str, dtype: torch.dtype, config: Any) -> nn.Module:
    return _from_pretrained(model, dtype, quantization_config=TorchAoConfig(config))


@base("torchao-int8-row", "torchao")
def _torchao_int8(model: str, dtype: torch.dtype) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig

    return _torchao(model, dtype, Int8WeightOnlyConfig(version=2))


@base("torchao-int8-64", "torchao")
def _torchao_int8_group(model: str, dtype: torch.dtype) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    return _torchao(model, dtype, Int8WeightOnlyConfig(version=2, granularity=PerGroup(64)))


@base("torchao-intx4-64", "torchao")
def torchao_intx4(model: str, dtype: torch.dtype) -> nn.Module:
    """torchao's 4-bit integers in groups of 64, scales in the dtype of the model."""
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    return _torchao(model, dtype, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(64)))


@base("torchao-float8-row", "torchao")
def _torchao_float8(model: str, dtype: torch.dtype) -> nn.Module:
    from torchao.quantization import Float8WeightOnlyConfig

    return _torchao(model, dtype, Float8WeightOnlyConfig())


@base("torchao-nvfp4", "torchao")
def torchao_nvfp4(model: str, dtype: torch.dtype) -> nn.Module:
    """torchao's NVFP4, scales in float8 (e4m3)."""
    from torchao.prototype.mx_formats.inference_workflow import NVFP4WeightOnlyConfig

    return _torchao(model, dtype, NVFP4WeightOnlyConfig())


def _hqq(axis: int) -> Load:
    def load(model: str, dtype: torch.dtype) -> nn.Module:
        from hqq.core.quantize import BaseQuantizeConfig
        from hqq.models.hf.base import AutoHQQHFModel

        loaded = _from_pretrained(model, dtype)
        config = BaseQuantizeConfig(nbits=4, group_size=64, axis=axis)
        AutoHQQHFModel.quantize_model(loaded, quant_config=config, compute_dtype=dtype, device=str(loaded.device))
        return loaded

    return load


base("hqq-4bit-axis1", "hqq")(_hqq(1))
base("hqq-4bit-axis0", "hqq")(_hqq(0))


def _quanto(weights: str) -> Load:
    def load(model: str, dtype: torch.dtype) -> nn.Module:
        from optimum.quanto import freeze, qtypes, quantize

        loaded = _from_pretrained(model, dtype)
        quantize(loaded, weights=qtypes[weights], exclude="lm_head")
        freeze(loaded)
        return loaded

    return load


base("quanto-int8", "optimum")(_quanto("qint8"))
base("quanto-int4", "optimum")(_quanto("qint4"))
