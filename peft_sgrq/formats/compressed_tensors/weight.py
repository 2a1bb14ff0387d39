"""compressed-tensors layers, as transformers loads them: codes and scales, until something decompresses the model.

transformers loads the compressed tensors into plain `nn.Linear` modules and decompresses the whole model to dense
weights at its first forward pass; the codes are gone then. A model with an adapter stays compressed
(`keep_compressed`): each layer decompresses its weight when it computes, by compressed-tensors' own function, so the
bits are those of the decompressed model. Schemes that quantize activations do so in training as in inference,
straight-through in the gradient, which compressed-tensors' own fake quantization would lose.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from peft_sgrq.formats.compressed_tensors.kv_cache import StraightThrough, let_caches_be_copied, pass_gradients
from peft_sgrq.formats.scale_arithmetic import gather_groups
from peft_sgrq.formats.scale_matrix import Geometry
from peft_sgrq.formats.scaled_weight import ScaledWeight
from peft_sgrq.formats.selectable_unit import SelectableUnit
from peft_sgrq.formats.stored_scales import ParameterScales

_RELOAD = "load the model anew and add the adapter before its first forward pass"


def geometry(
    shape: tuple[int, ...], codes: torch.Tensor, scales: torch.Tensor, blocks: Sequence[tuple[int, int]] = ()
) -> Geometry:
    """What the stored tensors of a layer say about its scheme.

    Args:
        shape (`tuple[int, ...]`): Shape of the weight, `(N, K)`.
        codes (`torch.Tensor`): `weight_packed` (int32 `[N, ceil(K * bits / 32)]`) or `weight` (int8 or float8).
        scales (`torch.Tensor`): `weight_scale`: `[N, groups]`, `[N, 1]`, `[blocks, blocks]` or a single number.
        blocks (`Sequence[tuple[int, int]]`): The block shapes `(rows, columns)` the quantization config names.

    Raises:
        ValueError: If its scales cannot be tuned; a clause about the layer.
    """
    if scales.dtype in (torch.uint8, torch.float8_e8m0fnu):
        raise ValueError(
            "its scales are powers of two (E8M0, an MX format), which a small change leaves as they are; use a format "
            "with floating-point scales"
        )
    if scales.dtype not in (torch.float32, torch.float16, torch.bfloat16) or codes.dtype not in _CODE_DTYPES:
        raise ValueError(
            f"its codes are {codes.dtype} and its scales {scales.dtype} (NVFP4?), expected integers or float8 with "
            "scales in float32, float16 or bfloat16, such as the schemes W4A16, W8A16, W8A8, FP8 and FP8_BLOCK"
        )
    rows, columns = (int(size) for size in shape)
    kind = {torch.float8_e4m3fn: "fp8", torch.int8: "int8"}.get(codes.dtype)
    name = f"ct-{kind or f'int{codes.shape[1] * 32 // columns}'}"
    if scales.numel() == 1:
        return Geometry(f"{name}-tensor", SelectableUnit.GROUP, rows, columns, columns, rows)
    count, groups = scales.shape
    if count == rows and groups == 1:
        return Geometry(f"{name}-row", SelectableUnit.ROW, rows, columns, columns, 1)
    if count == rows:
        return Geometry(f"{name}-{columns // groups}", SelectableUnit.GROUP, rows, columns, columns // groups, 1)
    for height, width in blocks:
        if (-(-rows // height), -(-columns // width)) == (count, groups):
            return Geometry(f"{name}-{height}x{width}", SelectableUnit.GROUP, rows, columns, width, height)
    raise ValueError(
        f"its {count} x {groups} scales fit neither groups nor blocks {list(blocks)} of its {rows} x {columns} "
        "weight; check that the quantization config belongs to the weights"
    )


_CODE_DTYPES = (torch.int32, torch.int8, torch.float8_e4m3fn)
DIGEST_DTYPE = torch.bfloat16  # transformers casts scales to the dtype a model is loaded in


class CompressedTensorsWeight(ParameterScales, ScaledWeight):
    """A compressed `nn.Linear`: integers of any width, or float8; scales for groups, rows, blocks or the weight."""

    layer_class = ("torch.nn", "Linear")
    stored_fields = ("weight_scale",)
    digest_dtype = DIGEST_DTYPE

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        if not _is_compressed(module):
            raise ValueError(
                "compressed-tensors has decompressed it to a dense weight at a forward pass, which leaves no codes; "
                + _RELOAD
            )
        weights = self._scheme.weights
        shape = getattr(module, "weight_shape", None)
        shape = tuple(self.stored_codes.shape) if shape is None else tuple(shape.tolist())
        block = weights.block_structure
        self._set_geometry(geometry(shape, self.stored_codes, self._stored, [tuple(block)] if block else ()))

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return (
            "compressed_tensors" in sys.modules
            and isinstance(module, nn.Linear)
            and getattr(getattr(module, "quantization_scheme", None), "weights", None) is not None
        )

    @property
    def _scheme(self) -> Any:
        return self.module.quantization_scheme

    @property
    def stored_codes(self) -> torch.Tensor:
        packed = getattr(self.module, "weight_packed", None)
        return (self.module.weight if packed is None else packed).data  # type: ignore[return-value]

    def codes(self, units: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        stored, packed, count = self._stored.detach(), self.stored_codes, self.scales_shape[1]
        words = packed.shape[1] // count
        # Only what is selected is unpacked, where that is whole words.
        if units is not None and self.unit is SelectableUnit.ROW:
            part, shape = packed.index_select(0, units), (len(units), self.in_features)
            ones = torch.ones_like(stored[: len(units)])
        elif units is not None and self.rows_per_scale == 1 and words * count == packed.shape[1]:
            part = packed.view(-1, count, words).index_select(1, units).flatten(1)  # (N, n * words)
            shape = (self.out_features, len(units) * self.group_size)
            ones = torch.ones_like(stored[:, : len(units)])
        else:
            codes = _decompress(self.module, torch.ones_like(stored)).to(dtype)
            return gather_groups(codes, units, count, self.group_size)
        return _decompress(self.module, ones, part, shape).to(dtype)

    def dequantize(self, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self.prepare(scales).to(dtype)

    def prepare(self, scales: torch.Tensor) -> torch.Tensor:
        return _decompress(self.module, self._to_stored(scales))  # (N, K)

    def linear(self, x: torch.Tensor, prepared: torch.Tensor) -> torch.Tensor:
        return F.linear(x, prepared, self.bias)

    def cast_input(self, x: torch.Tensor) -> torch.Tensor:
        return _quantize_activation(self.module, x, "input")

    @property
    def rounds_input(self) -> bool:
        return self._scheme.input_activations is not None

    def cast_output(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return _quantize_activation(self.module, y, "output")

    def quantization(self) -> dict[str, Any] | None:
        return {"quant_method": "compressed-tensors", "scale_dtype": str(self.storage_dtype).removeprefix("torch.")}


def keep_compressed(model: nn.Module) -> None:
    """Keeps the layers of a model compressed that compressed-tensors would decompress at its first forward pass.

    Gradients pass straight through the rounding of activations, keys, values and queries then.
    """
    if "compressed_tensors" not in sys.modules:
        return
    from compressed_tensors.compressors import decompress_module
    from compressed_tensors.offload import unwrap_offload_forward

    pass_gradients(model)
    let_caches_be_copied(model)
    for module in model.modules():
        hook = module.__dict__.pop("ct_decompress_hook", None)
        if hook is not None:
            hook.remove()
        if stays_compressed(module):
            with unwrap_offload_forward(module):
                module.forward = types.MethodType(_compressed_forward, module)
        elif _is_compressed(module):  # an embedding
            decompress_module(module)


def stays_compressed(module: nn.Module) -> bool:
    """Whether a layer is one that `keep_compressed` makes compute straight-through."""
    return CompressedTensorsWeight.matches(module) and _is_compressed(module)


def _is_compressed(module: nn.Module) -> bool:
    status = getattr(module, "quantization_status", None)
    return getattr(status, "value", status) == "compressed" and hasattr(module, "weight_scale")


def _compressed_forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    weight = _decompress(module, module.weight_scale.detach())
    y = F.linear(_quantize_activation(module, x, "input"), weight, module.bias)
    return _quantize_activation(module, y, "output")


@torch.no_grad()
def _decompress(
    module: Any, scale: torch.Tensor, codes: torch.Tensor | None = None, shape: tuple[int, int] = (0, 0)
) -> torch.Tensor:
    """The dense weight for a given `weight_scale`, by compressed-tensors' own function.

    Args:
        module (`nn.Linear`): The layer.
        scale (`torch.Tensor`): In the shape and the dtype of `weight_scale`.
        codes (`torch.Tensor` or `None`): A part of the layer's codes, to be decompressed in place of all.
        shape (`tuple[int, int]`): The shape of that part of the weight.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.utils import get_direct_state_dict

    scheme = module.quantization_scheme
    state = get_direct_state_dict(module) | {"weight_scale": scale}
    if codes is not None:
        packed = "weight_packed" in state
        state |= {"weight_packed": codes, "weight_shape": torch.tensor(shape)} if packed else {"weight": codes}
    return BaseCompressor.get_value_from_registry(scheme.format.value).decompress(state, scheme)["weight"]


def _quantize_activation(module: Any, x: torch.Tensor, kind: Literal["input", "output"]) -> torch.Tensor:
    scheme = module.quantization_scheme
    args = scheme.input_activations if kind == "input" else scheme.output_activations
    if args is None or not getattr(module, "quantization_enabled", True):
        return x
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize

    return StraightThrough.apply(x, lambda values: forward_quantize(module, values, kind, args))
