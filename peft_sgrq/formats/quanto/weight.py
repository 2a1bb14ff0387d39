"""optimum-quanto layers with frozen weights: int8 and float8 (a scale a row), int4 and int2 (groups, with a shift).

The int4 and int2 weights are `q * scale - shift` with a float shift, the zero point times the scale: it changes with
the scale, so that `W'` is the weight times `1 + delta` (see `rescaled_offset`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from peft_sgrq.formats.code import Code
from peft_sgrq.formats.scale_arithmetic import rescaled_offset
from peft_sgrq.formats.scale_matrix import split_zero_points
from peft_sgrq.formats.scaled_weight import ScaledWeight
from peft_sgrq.formats.selectable_unit import SelectableUnit

_PACKED = "TinyGemmWeightQBitsTensor"  # bfloat16, groups of 128: `(q - 8) * scale + offset` by another kernel


class QuantoWeight(ScaledWeight):
    """`optimum.quanto.nn.QLinear` with weights alone quantized."""

    layer_class = ("optimum.quanto.nn", "QLinear")
    keeps_dtype = True
    saved_by = "`save_file(model.state_dict(), file)` beside `optimum.quanto.quantization_map(model)`"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        layer: Any = module
        if not layer.frozen:
            raise ValueError(
                "its weight is quantized anew at each forward pass; call optimum.quanto.freeze(model) first"
            )
        if layer.activation_qtype is not None:
            raise ValueError(
                f"its activations are quantized to {layer.activation_qtype.name}, which is not supported; quantize "
                "weights only"
            )
        weight = layer.weight
        self.out_features, self.in_features = weight.shape
        kind = type(weight).__name__
        self._grouped = hasattr(weight, "_group_size")
        if kind not in ("WeightQBytesTensor", "WeightQBitsTensor", _PACKED) or weight.axis != 0:
            raise ValueError(
                f"its weight is a {kind} along axis {weight.axis}, expected quanto's WeightQBytesTensor, "
                f"WeightQBitsTensor or {_PACKED} along axis 0; leave it out with `exclude_modules`"
            )
        self.group_size = int((weight._group_size if self._grouped else None) or self.in_features)
        if self.group_size == self.in_features:
            self.unit = SelectableUnit.ROW
        self.movable_zero_points = self._scales_and_offsets()[1] is not None
        block = "row" if self.unit is SelectableUnit.ROW else str(self.group_size)
        self.name = f"quanto-{weight.qtype.name}-{block}"

    @property
    def owner(self) -> Any:
        return self.module.weight

    @property
    def stored_fields(self) -> tuple[str, ...]:  # type: ignore[override]
        if not self._grouped:
            return ("_scale",)
        return ("_scale_shift",) if type(self.owner).__name__ == _PACKED else ("_scale", "_shift")

    def _scales_and_offsets(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What is stored, float32 `[N, G]` each; an integer shift is a zero point and does not count."""
        stored = self.stored()
        if self.stored_fields == ("_scale_shift",):
            scales, offsets = stored[0].float().transpose(0, 1).unbind(-1)  # stored as (G, N, 2)
            return scales, offsets
        scales = stored[0].float().view(self.scales_shape)
        if len(stored) == 1 or not stored[1].dtype.is_floating_point:
            return scales, None
        return scales, -stored[1].float().view(self.scales_shape)

    def scales(self) -> torch.Tensor:
        return self._scales_and_offsets()[0]

    def changed(self, scales: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scales, moves = split_zero_points(scales)
        old, offsets = self._scales_and_offsets()
        stored = self.stored()
        if len(stored) == 1 and offsets is not None:  # `_scale_shift`: both in one tensor
            dtype = stored[0].dtype
            scales, offset = scales.to(dtype), rescaled_offset(offsets, scales, old, moves).to(dtype)
            # quanto's files hold `8 * scale - offset`, in this dtype: the offset is one that survives the way there
            # and back, as those of the base are.
            offset = 8 * scales - (8 * scales - offset)
            return (torch.stack((scales, offset), -1).transpose(0, 1).contiguous(),)
        changed = scales.to(stored[0].dtype).reshape(stored[0].shape)
        if len(stored) == 1:
            return (changed,)
        if offsets is None:
            return changed, stored[1]
        shift = -rescaled_offset(offsets, scales, old, moves)
        return changed, shift.to(stored[1].dtype).reshape(stored[1].shape)

    def prepare(self, scales: torch.Tensor) -> torch.Tensor:
        changed = self.changed(scales)
        return changed[0] if len(changed) == 1 else torch.stack(changed)

    def linear(self, x: torch.Tensor, prepared: torch.Tensor) -> torch.Tensor:
        weight, fields = self.owner, self.stored_fields
        changed = (prepared,) if len(fields) == 1 else tuple(prepared.unbind())
        names, attributes = weight.__tensor_flatten__()
        tensors = {name: getattr(weight, name) for name in names} | dict(zip(fields, changed, strict=True))
        return F.linear(x, type(weight).__tensor_unflatten__(tensors, attributes, None, None), self.bias)

    def _unit_values(self) -> torch.Tensor:
        weight = self.owner
        if not self._grouped:
            return weight._data.float()
        if type(weight).__name__ == _PACKED:
            codes = weight._data.unpack().float() - 8  # (N, K)
        else:
            codes = weight._data.unpack().float().view(self.out_features, self.in_features)
            if not weight._shift.dtype.is_floating_point:
                codes = codes - self._spread(weight._shift.float().view(self.scales_shape))
        scales, offsets = self._scales_and_offsets()
        if offsets is None:
            return codes
        return codes + self._spread(torch.where(scales == 0, 0.0, offsets / scales))

    def _spread(self, units: torch.Tensor) -> torch.Tensor:
        return units.repeat_interleave(self.group_size, 1)

    def codes(self, units: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        return self.select_codes(self._unit_values(), units).to(dtype)

    def dequantize(self, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        scales, moves = split_zero_points(scales)
        codes = self._unit_values()
        return ((codes if moves is None else codes + self._spread(moves)) * self._spread(scales)).to(dtype)

    def fingerprint_tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        codes: Any = self.owner._data
        codes = getattr(codes, "_data", codes)  # packed codes are a tensor in a tensor
        return codes, torch.cat([tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in self.stored()])

    def quantization(self) -> dict[str, Any] | None:
        return {"quant_method": "quanto", "weights": self.owner.qtype.name}


def quantizing_code(quantization: Mapping[str, Any]) -> Code | None:
    """The Python code that quantizes a model by quanto; `None` if transformers did it while loading."""
    weights = str(quantization.get("weights"))
    if not weights.startswith("q"):  # transformers' name of it
        return None
    left = quantization.get("modules_to_not_convert")
    statement = f"quantize(base, weights={weights}{f', exclude={left!r}' if left else ''})"
    return Code({"optimum.quanto": {"freeze", "quantize", weights}}, statements=[statement, "freeze(base)"])
