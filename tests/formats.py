"""The quantized formats of optional libraries: how a model gets each, and how its own loader reads it back.

`FORMATS` is what `test_formats.py` runs on: a format joins by one entry. Nothing here imports an optional library
before a format that needs it is used.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

# Code that sets `model` from `directory`, run where peft_sgrq is not installed.
_AUTO = "from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained(directory)"
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
_STATE = """
import os
import torchao.prototype.quantization.int4.int4_opaque_tensor
from transformers import AutoConfig, AutoModelForCausalLM
model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype={dtype})
model.load_state_dict(torch.load(os.path.join(directory, "state.pt")), assign=True)
"""


@dataclass(frozen=True)
class Format:
    """One format and the way models get it.

    Attributes:
        name (`str`): For test ids, and for `pytest -k`.
        library (`str`): The package it needs; tests skip by its name where it is not installed.
        load (`Callable`): `(directory, dtype) -> model`, quantized, from the checkpoint of a dense model.
        dtype (`torch.dtype`): The dtype of the model in tests of whole models.
        save (`Callable` or `None`): `(model, directory)`, the format's own saving; `None` if it has none.
        on_files (`bool`): Whether what `save` wrote can be merged on files.
        reload (`str`): Python code that sets `model` from `directory` by the format's own loader.
        layer (`Callable` or `None`): `(dense layer) -> quantized layer`, for tests of single layers.
        weight (`Callable`): The library's own dequantized weight of a layer, float32.
        block (`tuple[int, int]`): Rows and columns that share a scale; 0 stands for all of them.
        strided (`bool`): Whether the rows that share a scale lie a stride apart instead of side by side (HQQ axis 0).
        rounded_input (`Callable` or `None`): `(layer, x) -> x` as a format that rounds activations computes with it.
    """

    name: str
    library: str
    load: Callable[[Path, torch.dtype], Any]
    weight: Callable[[nn.Module], torch.Tensor]
    dtype: torch.dtype = torch.bfloat16
    save: Callable[[Any, Path], None] | None = lambda model, directory: model.save_pretrained(directory)
    on_files: bool = False
    reload: str = _AUTO
    layer: Callable[[nn.Linear], nn.Module] | None = None
    block: tuple[int, int] = (1, 0)
    strided: bool = False
    rounded_input: Callable[[nn.Module, torch.Tensor], torch.Tensor] | None = None

    def require(self) -> None:
        """Skips the test, by the name of the library, where it is not installed."""
        if find_spec(self.library) is None:
            pytest.skip(f"{self.library} is not installed, which the format {self.name} needs")

    def maps(self, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The maps `r(o)` and `k(c)` of the format, int64 `[rows]` and `[columns]`."""
        tall, wide = self.block[0] or rows, self.block[1] or columns
        index = torch.arange(rows)
        return index % (rows // tall) if self.strided else index // tall, torch.arange(columns) // wide


def _dequantized(layer: Any) -> torch.Tensor:
    return layer.weight.dequantize().detach().float()


# torchao


def _torchao(name: str, config: Callable[[], Any], **settings: Any) -> Format:
    def load(directory: Path, dtype: torch.dtype) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, quantization_config=TorchAoConfig(config())
        )

    def layer(dense: nn.Linear) -> nn.Module:
        from torchao.quantization import quantize_

        model = nn.Sequential(dense)
        quantize_(model, config())
        return model[0]

    return Format(
        **{"name": f"torchao-{name}", "library": "torchao", "load": load, "layer": layer, "weight": _dequantized}
        | {"on_files": True}
        | settings
    )


def _int8(**settings: Any) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig(version=2, **settings)


def _per_group(size: int) -> Any:
    from torchao.quantization.granularity import PerGroup

    return PerGroup(size)


def _per_tensor() -> Any:
    from torchao.quantization.granularity import PerTensor

    return PerTensor()


def _intx(bits: int) -> Any:
    from torchao.quantization import IntxWeightOnlyConfig, MappingType

    # Symmetric int1 has the codes -1 and 0 around zero point 0, and a scale of the largest weight: all weights vanish.
    mapping = MappingType.ASYMMETRIC if bits == 1 else MappingType.SYMMETRIC
    return IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"), granularity=_per_group(64), mapping_type=mapping
    )


def _intx_row() -> Any:
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis

    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerAxis(0))


def _float8() -> Any:
    from torchao.quantization import Float8WeightOnlyConfig

    return Float8WeightOnlyConfig()


def _nvfp4() -> Any:
    from torchao.prototype.mx_formats.inference_workflow import NVFP4WeightOnlyConfig

    return NVFP4WeightOnlyConfig()


def _int8_dynamic() -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig(version=2)


def _intx_dynamic() -> Any:
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig

    return Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=_per_group(64))


def _rounded_to_int8(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Symmetric int8 a token, as `Int8Tensor` does it."""
    scale = (x.abs().amax(-1, keepdim=True) / 127.5).clamp(min=torch.finfo(torch.float32).eps)
    return (x * (1 / scale)).round().clamp(-128, 127) * scale


def _rounded_to_int8_asymmetric(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Asymmetric int8 a token, as `IntxUnpackedToInt8Tensor` does it."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).eps)
    zero = (-128 - (low / scale).round()).clamp(-128, 127)
    return ((x * (1 / scale)).round() + zero).clamp(-128, 127).sub(zero) * scale


def _int4_opaque() -> Any:
    from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig

    return PrototypeInt4WeightOnlyConfig(group_size=64)


def _load_int4_opaque(directory: Path, dtype: torch.dtype) -> Any:
    from torchao.quantization import quantize_

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    quantize_(model, _int4_opaque(), lambda module, name: isinstance(module, nn.Linear) and name != "lm_head")
    return model


def _weight_int4_opaque(layer: Any) -> torch.Tensor:
    eye = torch.eye(layer.in_features, dtype=layer.weight.dtype)
    return nn.functional.linear(eye, layer.weight).t().float()


def _save_state(model: Any, directory: Path) -> None:
    model.config.save_pretrained(directory)
    torch.save(model.state_dict(), directory / "state.pt")


_TORCHAO = [
    _torchao("int8-row", _int8),
    _torchao("int8-group", lambda: _int8(granularity=_per_group(64)), block=(1, 64)),
    _torchao("int8-tensor", lambda: _int8(granularity=_per_tensor()), block=(0, 0)),
    *(_torchao(f"intx{bits}", lambda bits=bits: _intx(bits), block=(1, 64)) for bits in range(1, 9)),
    _torchao("intx4-row", _intx_row),
    _torchao("float8-row", _float8),
    _torchao("nvfp4", _nvfp4, block=(1, 16), on_files=False),
    _torchao("int8-dynamic", _int8_dynamic, rounded_input=_rounded_to_int8),
    _torchao("intx4-dynamic", _intx_dynamic, block=(1, 64), rounded_input=_rounded_to_int8_asymmetric),
    _torchao(
        "int4-cpu",
        _int4_opaque,
        on_files=False,
        block=(1, 64),
        load=_load_int4_opaque,
        weight=_weight_int4_opaque,
        save=_save_state,
        reload=_STATE.format(dtype="torch.bfloat16"),
    ),
]


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
            "weight": _dequantized,
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
    from peft_sgrq.upstream.bnb_cpu_packing import disable_cpu_packing

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, quantization_config=config)
    disable_cpu_packing(model)
    return model


def _weight_nf4(layer: Any) -> torch.Tensor:
    import bitsandbytes as bnb

    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


_NO_PACKING = "\nfor module in model.modules():\n    module.support_avx512bf16_for_cpu = False"
FORMATS = [
    Format("bnb-nf4", "bitsandbytes", _nf4, _weight_nf4, block=(1, 64), reload=_AUTO + _NO_PACKING),
    *_TORCHAO,
    *_HQQ_FORMATS,
    *_QUANTO_FORMATS,
]
