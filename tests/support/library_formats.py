"""The quantized formats of optional libraries: how a model gets each, and how its own loader reads it back.

`FORMATS` is what `test_formats.py` runs on: a format joins by one entry. Nothing here imports an optional library
before a format that needs it is used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from support.format_base import AUTO, NO_PACKING, Format, dequantized
from support.torchao_formats import TORCHAO
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

_HQQ = """
from hqq.models.hf.base import AutoHQQHFModel
model = AutoHQQHFModel.from_quantized(directory, compute_dtype={dtype}, device="cpu")
"""
# Cloned, because PyTorch's int8 kernel crashes the interpreter on weights that are not aligned, as in a mapped file.
# quanto unpacks codes by a C++ extension, which it compiles for a minute for every path it is found under.
_NO_COMPILER = """
import types, torch
from optimum.quanto.library.extensions.extension import get_extension
def unpack(packed, bits):
    return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])
get_extension("quanto_cpp")._lib = types.SimpleNamespace(unpack=unpack)
"""
_QUANTO = (
    _NO_COMPILER
    + """
import json, os
from optimum.quanto import requantize
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype={dtype})
with open(os.path.join(directory, "map.json")) as file:
    tensors = load_file(os.path.join(directory, "model.safetensors"))
    requantize(model, {{key: value.clone() for key, value in tensors.items()}}, json.load(file))
"""
)


# HQQ


def _hqq(bits: float, axis: int, dtype: torch.dtype = torch.bfloat16, size: int = 64, **settings: Any) -> Format:
    def config() -> dict[str, Any]:
        from hqq.core.quantize import BaseQuantizeConfig

        return BaseQuantizeConfig(nbits=bits, group_size=size, axis=axis)

    def load(directory: Path, dtype: torch.dtype) -> Any:
        from hqq.models.hf.base import AutoHQQHFModel

        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
        AutoHQQHFModel.quantize_model(model, quant_config=config(), compute_dtype=dtype, device="cpu")
        return model

    def layer(dense: nn.Linear) -> nn.Module:
        from hqq.core.quantize import HQQLinear

        return HQQLinear(dense, config(), compute_dtype=dense.weight.dtype, device="cpu", del_orig=False)

    def save(model: Any, directory: Path) -> None:
        from hqq.models.hf.base import AutoHQQHFModel

        AutoHQQHFModel.save_quantized(model, str(directory))

    return Format(
        name=f"hqq-{bits}bit-axis{axis}",
        library="hqq",
        load=load,
        layer=layer,
        save=save,
        dtype=dtype,
        reload=_HQQ.format(dtype=dtype),
        weight=lambda layer: layer.dequantize().detach().float(),
        block=(1, size) if axis == 1 else (size, 1),
        strided=axis == 0,
        **settings,
    )


_HQQ_FORMATS = [_hqq(bits, axis) for axis in (1, 0) for bits in (8, 4, 3, 2, 1)]


# quanto


def _quanto(weights: str, block: tuple[int, int] = (1, 0), **settings: Any) -> Format:
    def load(directory: Path, dtype: torch.dtype) -> Any:
        from optimum.quanto import freeze, qtypes, quantize

        exec(_NO_COMPILER, {})
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
        quantize(model, weights=qtypes[weights], exclude="lm_head")
        freeze(model)
        return model

    def layer(dense: nn.Linear) -> nn.Module:
        from optimum.quanto import freeze, qtypes, quantize

        exec(_NO_COMPILER, {})
        model = nn.Sequential(dense)
        quantize(model, weights=qtypes[weights])
        freeze(model)
        return model[0]

    def save(model: Any, directory: Path) -> None:
        from optimum.quanto import quantization_map
        from safetensors.torch import save_file

        model.config.save_pretrained(directory)
        save_file(
            {key: value.contiguous() for key, value in model.state_dict().items()}, directory / "model.safetensors"
        )
        (directory / "map.json").write_text(json.dumps(quantization_map(model)))

    dtype = settings.get("dtype", torch.bfloat16)
    return Format(
        **{
            "name": f"quanto-{weights.removeprefix('q')}",
            "library": "optimum",
            "load": load,
            "layer": layer,
            "save": save,
            "reload": _QUANTO.format(dtype=dtype),
            "weight": dequantized,
            "block": block,
        }
        | settings
    )


_QUANTO_FORMATS = [
    _quanto("qint8"),
    _quanto("qfloat8_e4m3fn"),
    _quanto("qint4", (1, 128), dtype=torch.float32),
    _quanto("qint4", (1, 128), name="quanto-int4-tinygemm"),
    _quanto("qint2", (1, 128)),
]


# bitsandbytes, the reference


def _nf4(directory: Path, dtype: torch.dtype) -> Any:
    from peft_sgrq.base.workarounds.bnb_cpu_packing import disable_cpu_packing

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, quantization_config=config)
    disable_cpu_packing(model)
    return model


def _weight_nf4(layer: Any) -> torch.Tensor:
    import bitsandbytes as bnb

    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


FORMATS = [
    Format("bnb-nf4", "bitsandbytes", _nf4, _weight_nf4, block=(1, 64), reload=AUTO + NO_PACKING),
    *TORCHAO,
    *_HQQ_FORMATS,
    *_QUANTO_FORMATS,
]
LAYER_FORMATS = [format for format in FORMATS if format.layer is not None]
# What is done to scales, and whole models, do not know how codes are packed: of formats that differ in the number of
# bits alone, some are enough.
_MORE_BITS = {f"torchao-intx{bits}" for bits in (2, 3, 5, 6, 7)}
_MORE_BITS |= {f"hqq-{bits}bit-axis{axis}" for bits in (8, 2) for axis in (0, 1)}
SCALE_FORMATS = [format for format in LAYER_FORMATS if format.name not in _MORE_BITS]
MODEL_FORMATS = [format for format in FORMATS if format.name not in _MORE_BITS]
