"""torchao layers: a plain `nn.Linear` whose weight is a tensor subclass that holds codes, scales and zero points.

Here are the layouts with one code an element: int8 weight-only (a scale a row, a group or the whole weight), intx 1 to
8 bit, float8; and the same with activations quantized on the fly, where the gradient passes straight through the
rounding of the activations (torchao's own forward pass loses it). The packed layouts have files of their own.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from peft_sgrq.formats.code import Code
from peft_sgrq.formats.scale_matrix import Geometry
from peft_sgrq.formats.scaled_weight import ScaledWeight
from peft_sgrq.formats.selectable_unit import SelectableUnit

PLAIN = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")
_REFUSED = {
    "MXTensor": (
        "its scales are powers of two (an MX format), so a scale can only double or halve and no change that is "
        "learnt survives the merge; quantize to NVFP4 or int4"
    ),
    "Int4PreshuffledTensor": (
        "its codes and scales are shuffled for one kernel; quantize with another `int4_packing_format`"
    ),
    "IntxOpaqueTensor": "its codes and scales are packed for one kernel; quantize with `unpacked_to_int8`",
}


def weight_type(module: nn.Module) -> str | None:
    """The name of the torchao class of a linear layer's weight; `None` if it is not one of torchao's."""
    torchao = sys.modules.get("torchao.utils")  # without it imported no weight can be one of its tensors
    weight = getattr(module, "weight", None)
    if torchao is None or not isinstance(module, nn.Linear):
        return None
    return type(weight).__name__ if isinstance(weight, torchao.TorchAOBaseTensor) else None


class TorchaoWeight(ScaledWeight):
    """What torchao's layouts have in common: the scales are one tensor in the weight, or several."""

    layer_class = ("torch.nn", "Linear")
    stored_fields: tuple[str, ...] = ("scale",)

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        weight = self.owner
        if weight.dim() != 2:
            raise ValueError(
                f"its weight has {weight.dim()} dimensions, expected 2; leave it out with `exclude_modules`"
            )
        self.out_features, self.in_features = weight.shape

    @property
    def owner(self) -> Any:
        return self.module.weight

    @property
    def stored_codes(self) -> torch.Tensor:
        return self.owner.qdata

    @property
    def stored_scales(self) -> torch.Tensor:
        """What is stored of scales, in one tensor."""
        return self.stored()[0]

    def parts(self, scales: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Such a tensor, as `prepare` makes it, in the form of `stored()`."""
        return (scales,)

    def with_parts(self, *stored: torch.Tensor) -> Any:
        """The weight with other scales in torchao's form; codes and everything else are shared, not copied."""
        weight = self.owner
        names, attributes = weight.__tensor_flatten__()
        tensors = {name: getattr(weight, name) for name in names} | dict(zip(self.stored_fields, stored, strict=True))
        return type(weight).__tensor_unflatten__(tensors, attributes, weight.shape, weight.stride())

    def linear(self, x: torch.Tensor, prepared: torch.Tensor) -> torch.Tensor:
        if x.numel() == 0:  # an expert without tokens; torchao finds no largest value to quantize activations by
            return x.new_empty(*x.shape[:-1], self.out_features)
        return F.linear(x, self.with_parts(*self.parts(prepared)), self.bias)

    def changed(self, scales: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.parts(self.prepare(scales).contiguous())

    def convert_stored(self, stored: Any, fn: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        converted: Any = fn(self.with_parts(*stored))  # what torchao makes of the scales is torchao's business
        return tuple(getattr(converted, field) for field in self.stored_fields)

    def quantization(self) -> dict[str, Any] | None:
        return {"quant_method": "torchao", "weight": self.name.removeprefix("torchao-")}


class TorchaoPlainWeight(TorchaoWeight):
    """`Int8Tensor`, `IntxUnpackedToInt8Tensor` and `Float8Tensor`: `W = (q - zero point) * scale`, in blocks.

    A block spans `block_size` rows and columns: one row and a group of columns, one row, or the whole weight.
    Any other torchao tensor is refused, with the reason.
    """

    def __init__(self, module: nn.Module) -> None:
        kind = weight_type(module) or ""
        if kind not in PLAIN:
            other = (
                f"its weight is torchao's {kind}, expected Int8Tensor, IntxUnpackedToInt8Tensor, Float8Tensor, "
                "NVFP4Tensor, Int4OpaqueTensor or Int4TilePackedTo4dTensor; quantize with a config that makes one"
            )
            raise ValueError(f"{_REFUSED.get(kind, other)}, or leave the layer out with `exclude_modules`")
        super().__init__(module)
        weight = self.owner
        dtype = weight.target_dtype if kind == "IntxUnpackedToInt8Tensor" else weight.qdata.dtype
        if getattr(weight, "act_pre_scale", None) is not None:
            raise ValueError(
                "its weight has an activation pre-scale (SmoothQuant or AWQ in torchao), which is not supported; "
                "leave the layer out with `exclude_modules`, or quantize without it"
            )
        how, rounding = self._activations, ""
        if how is not None:
            mapping = getattr(getattr(how, "mapping_type", None), "name", "")
            rounding = rounding_name(getattr(weight, "act_quant_scale", None) is not None, mapping)
        self._set_geometry(geometry(kind, dtype, weight.shape, weight.block_size, rounding))

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return weight_type(module) is not None

    @property
    def _activations(self) -> Any:
        """How activations are quantized; `None` if they are not."""
        weight = self.owner
        return getattr(weight, "act_quant_kwargs", None) or getattr(weight, "activation_quantization", None)

    @property
    def drops_input_gradient(self) -> bool:
        return self._activations is not None  # torchao rounds them without a gradient

    def computed_input(self, x: torch.Tensor) -> torch.Tensor:
        how, weight = self._activations, self.owner
        if how is None or x.numel() == 0:
            return x
        if type(weight).__name__ == "IntxUnpackedToInt8Tensor":
            from torchao.quantization.quantize_.workflows.intx import intx_unpacked_to_int8_tensor

            return intx_unpacked_to_int8_tensor._apply_int8_act_asym_per_token_quant_dequant(x)
        from torchao.quantization.quantize_.common import _choose_quant_func_and_quantize_tensor

        settings = {"scale": weight.act_quant_scale, "zero_point": weight.act_quant_zero_point}
        if type(weight).__name__ == "Float8Tensor":
            settings = {}
        return _choose_quant_func_and_quantize_tensor(x, how, **settings).dequantize(x.dtype)

    def scales(self) -> torch.Tensor:
        return self.stored_scales.float().view(self.scales_shape)

    def prepare(self, scales: torch.Tensor) -> torch.Tensor:
        stored = self.stored_scales
        return scales.to(stored.dtype).view(stored.shape)

    def codes(self, units: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        weight: Any = self.owner
        # Selected as bytes: not every operation knows float8.
        codes, zeros = weight.qdata.view(torch.int8), getattr(weight, "zero_point", None)
        if units is not None:
            zeros = None if zeros is None else zeros.index_select(self.unit.dim, units)
            codes = self.select_codes(codes, units)
        codes = codes.view(weight.qdata.dtype).to(dtype)  # (N, n * g), or (n, K)
        return codes if zeros is None else codes - self._spread(zeros.to(dtype), codes.shape)

    def _spread(self, blocks: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Values of blocks `[R, n]` at all their elements, `[N, n * group_size]`."""
        rows, columns = shape[0] // blocks.shape[0], shape[1] // blocks.shape[1]
        return blocks.repeat_interleave(rows, 0).repeat_interleave(columns, 1)

    def dequantize(self, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        rows, groups = self.scales_shape
        weight = self.codes(None, torch.float32).view(rows, self.rows_per_scale, groups, -1)
        return (weight * scales.view(rows, 1, groups, 1)).view(self.out_features, -1).to(dtype)


def rounding_name(static: bool, mapping: str) -> str:
    """How activations are quantized: with scales that are stored, or found on the fly; around zero or not."""
    return ("static" if static else "dynamic") + ("-asymmetric" if mapping == "ASYMMETRIC" else "")


def geometry(
    kind: str, dtype: torch.dtype, shape: Sequence[int], block_size: Sequence[int], rounding: str
) -> Geometry:
    """The geometry and the name of a layer, in memory or in a file.

    Args:
        kind (`str`): The class of its weight, one of `PLAIN`.
        dtype (`torch.dtype`): That of the codes; for intx, the one they have the range of (`target_dtype`).
        shape (`Sequence[int]`): That of the weight, `[N, K]`.
        block_size (`Sequence[int]`): Rows and columns that share a scale.
        rounding (`str`): How activations are quantized, `rounding_name`'s; empty if they are not.
    """
    (out_features, in_features), (rows, columns) = map(int, shape), map(int, block_size)
    values = str(dtype).removeprefix("torch.")
    if kind == "IntxUnpackedToInt8Tensor":
        values = values.replace("int", "intx")
    is_row = (rows, columns) == (1, in_features)
    block = "row" if is_row else str(columns) if rows == 1 else f"{rows}x{columns}"
    name = f"torchao-{values}-{block}{rounding and f'-{rounding}'}"
    unit = SelectableUnit.ROW if is_row else SelectableUnit.GROUP
    return Geometry(name, unit, out_features, in_features, columns, rows)


def quantizing_code(quantization: Mapping[str, Any]) -> Code | None:
    """The Python code that quantizes a model by torchao; `None` if transformers did it while loading."""
    if "quant_type" in quantization:
        return None
    if "-static" in str(quantization.get("weight")):
        return Code()  # its scales of activations come from data
    code = _config_code(str(quantization.get("weight")), str(quantization.get("layout")))
    names = {"torchao.quantization": {"quantize_"}}
    for library, known in _LIBRARIES.items():
        if used := {name for name in known if re.search(rf"\b{name}\b", code)}:
            names[library] = names.get(library, set()) | used
    if left := quantization.get("modules_to_not_convert"):
        chosen = f"lambda module, name: isinstance(module, Linear) and name not in {left!r}"
        return Code(names | {"torch.nn": {"Linear"}}, statements=[f"quantize_(base, {code}, {chosen})"])
    return Code(names, statements=[f"quantize_(base, {code})"])


_LIBRARIES: dict[str, set[str]] = {
    "torch": {f"int{bits}" for bits in range(1, 9)},
    "torchao.prototype.mx_formats.inference_workflow": {"NVFP4WeightOnlyConfig"},
    "torchao.prototype.quantization.int4.inference_workflow": {"PrototypeInt4WeightOnlyConfig"},
    "torchao.quantization": {
        "Float8DynamicActivationFloat8WeightConfig",
        "Float8WeightOnlyConfig",
        "Int4WeightOnlyConfig",
        "Int8DynamicActivationInt8WeightConfig",
        "Int8DynamicActivationIntxWeightConfig",
        "Int8WeightOnlyConfig",
        "IntxWeightOnlyConfig",
        "MappingType",
    },
    "torchao.quantization.granularity": {"PerAxis", "PerGroup", "PerTensor"},
}


# The tensor classes of int4 that a config has to ask for, and what asks for them.
_INT4 = {
    "Int4OpaqueTensor": "PrototypeInt4WeightOnlyConfig(group_size={block})",
    "Int4TilePackedTo4dTensor": "Int4WeightOnlyConfig(group_size={block}, int4_packing_format='tile_packed_to_4d')",
}


def _config_code(weight: str, layout: str) -> str:
    """torchao's config for a format as `TorchaoWeight.name` tells it, e.g. `"intx4-64"`."""
    kind, block, *rest = weight.split("-")
    if kind == "nvfp4":
        return "NVFP4WeightOnlyConfig()"
    if kind == "int4":
        return _INT4.get(layout, "Int4WeightOnlyConfig(group_size={block})").format(block=block)
    dynamic = "Dynamic" if rest else ""
    if kind.startswith("intx"):
        prefix = "weight_" if rest else ""
        granularity = "PerAxis(0)" if block == "row" else f"PerGroup({block})"
        name = "Int8DynamicActivationIntxWeightConfig" if rest else "IntxWeightOnlyConfig"
        return f"{name}(weight_dtype={kind.replace('x', '')}, {prefix}granularity={granularity})"
    if kind == "int8":
        name = "Int8DynamicActivationInt8WeightConfig" if dynamic else "Int8WeightOnlyConfig"
    else:
        name = "Float8DynamicActivationFloat8WeightConfig" if dynamic else "Float8WeightOnlyConfig"
    granularity = "" if block == "row" else "PerTensor()" if "x" in block else f"PerGroup({block})"
    arguments = [f"granularity={granularity}"] if granularity else []
    if "asymmetric" in rest:
        arguments.append("act_mapping_type=MappingType.ASYMMETRIC")
    return f"{name}({', '.join(arguments)})"
