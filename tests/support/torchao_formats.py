"""torchao's formats: see `library_formats.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support.format_base import Format, dequantized
from torch import nn
from transformers import AutoModelForCausalLM, TorchAoConfig

_STATE = """
import os
import torchao.prototype.quantization.int4.int4_opaque_tensor
from transformers import AutoConfig, AutoModelForCausalLM
model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype={dtype})
model.load_state_dict(torch.load(os.path.join(directory, "state.pt")), assign=True)
"""


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
        **{"name": f"torchao-{name}", "library": "torchao", "load": load, "layer": layer, "weight": dequantized}
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


TORCHAO = [
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
