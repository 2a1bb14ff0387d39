"""HQQ layers in HQQ's own format: 8, 4, 3, 2 or 1 bit, groups along rows (axis 1) or along columns (axis 0).

`W = (q - zero) * scale` over the weight reshaped to `[-1, group_size]` (axis 1: a group is `group_size` columns of one
row) or `[group_size, -1]` (axis 0: a group is every `out_features / group_size`-th row of one column). Axis 0 thus
has a scale matrix of shape `[out_features / group_size, in_features]`: columns are selected one by one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from peft_sgrq.formats.code import Code
from peft_sgrq.formats.scale_matrix import split_zero_points
from peft_sgrq.formats.scaled_weight import ScaledWeight
from peft_sgrq.formats.selectable_unit import SelectableUnit


class HQQWeight(ScaledWeight):
    """`hqq.core.quantize.HQQLinear`. Scales are stored in the compute dtype and rounded to it in the forward pass."""

    layer_class = ("hqq.core.quantize", "HQQLinear")
    movable_zero_points = True
    saved_by = "`AutoHQQHFModel.save_quantized(model, directory)`"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        meta = self._meta
        if not getattr(module, "ready", False) or meta is None:
            raise ValueError("its weight is not quantized yet; call HQQLinear.initialize() first")
        if "scale" not in meta or meta.get("quant_scale") or meta.get("quant_zero"):
            raise ValueError(
                "its scales are quantized themselves or offloaded with the zero points, expected plain ones; quantize "
                "with quant_scale=False, quant_zero=False and offload_meta=False"
            )
        self.out_features, self.in_features = (int(size) for size in meta["shape"])
        self._axis, size = int(meta["axis"]), meta["group_size"]
        along = (self.out_features, self.in_features)[self._axis]
        size = along if size is None else int(size)
        if meta["scale"].numel() * size != self.out_features * self.in_features:
            raise ValueError(
                f"it has {meta['scale'].numel()} scales for groups of {size}, expected one a group; quantize with "
                "channel_wise=True"
            )
        if along % size:
            side, across = (("out_features", "columns"), ("in_features", "rows"))[self._axis]
            raise ValueError(
                f"{side}={along} is not a multiple of its group size {size}, so groups straddle {across}; leave it "
                "out with `exclude_modules`, or quantize with a group size that divides it"
            )
        self._shared = size if self._axis == 0 else 1  # rows that share a scale
        self.group_size = size if self._axis == 1 else 1
        if self._axis == 1 and size == self.in_features:
            self.unit = SelectableUnit.ROW
        self.splittable = self._axis == 1
        self.name = f"hqq-{meta['nbits']}bit-axis{self._axis}-{size}"

    @property
    def _meta(self) -> Any:
        return self.module.meta

    @property
    def stored_codes(self) -> torch.Tensor:
        return self.module.W_q.data  # type: ignore[return-value]

    @property
    def scales_shape(self) -> tuple[int, int]:
        return self.out_features // self._shared, self.in_features // self.group_size

    def reduce_rows(self, sums: torch.Tensor) -> torch.Tensor:
        if self._axis == 1:
            return sums
        return sums.unflatten(0, (self._shared, -1)).sum(0)  # (N / g, n): row o has the scales of row o % (N / g)

    def scales(self) -> torch.Tensor:
        return self._meta["scale"].float().view(self.scales_shape)

    def stored(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._meta["scale"], self._meta["zero"]

    def prepare(self, scales: torch.Tensor) -> torch.Tensor:
        scales, moves = split_zero_points(scales)
        stored, zero = self._meta["scale"], self._meta["zero"]
        prepared = scales.to(stored.dtype).reshape(stored.shape)
        if moves is None:
            return prepared
        # `(q - zero + e) * scale`; where nothing moves the zero point keeps its bits.
        moved = (zero.float() - moves.reshape(zero.shape)).to(zero.dtype)
        return torch.stack((prepared, moved.to(stored.dtype)))

    def _fields(self, prepared: torch.Tensor) -> dict[str, torch.Tensor]:
        """What `prepare` made, as fields of the layer's metadata."""
        if prepared.dim() == self._meta["scale"].dim():
            return {"scale": prepared}
        return {"scale": prepared[0], "zero": prepared[1].to(self._meta["zero"].dtype)}

    def _dequantize(self, fields: Mapping[str, Any], dtype: torch.dtype) -> torch.Tensor:
        from hqq.core.quantize import Quantizer

        return Quantizer.dequantize(self.module.W_q, {**self._meta, **fields, "compute_dtype": dtype})

    def codes(self, units: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        return self.select_codes(self._dequantize({"scale": 1.0}, dtype).to(dtype), units)

    def dequantize(self, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self._dequantize(self._fields(self.prepare(scales)), dtype).to(dtype)

    def linear(self, x: torch.Tensor, prepared: torch.Tensor) -> torch.Tensor:
        # The layer's own forward pass, whichever HQQ has been told to use, on a copy that shares all but the scales.
        twin: Any = copy.copy(self.module)
        twin.meta = {**self._meta, **self._fields(prepared)}
        return twin.forward(x)

    def changed(self, scales: torch.Tensor) -> Any:
        return {name: tensor.contiguous() for name, tensor in self._fields(self.prepare(scales)).items()}

    def restore_scales(self, stored: Any) -> Any:
        replaced = {name: self._meta[name] for name in stored}
        self._meta.update(stored)
        return replaced

    def convert_stored(self, stored: Any, fn: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        return stored  # HQQ layers ignore `to`, and so do their scales

    def split(self, group_size: int) -> None:
        from hqq.core.quantize import Quantizer

        module: Any = self.module
        packed, meta = module.W_q.data, self._meta
        packing, stored = meta["packing"], module.W_q.dtype
        if packing is None:
            module.W_q = nn.Parameter(packed.reshape(-1, group_size), requires_grad=False)
        else:
            if meta["view_as_float"]:
                packed = packed.view(meta["unpack_view_dtype"])
            # 3-bit codes are padded to whole words.
            codes = Quantizer.unpack[packing](packed, dtype=torch.uint8)[: meta["scale"].numel()]  # (N * G, g)
            packed = Quantizer.pack[packing](codes.reshape(-1, group_size))
            module.W_q = nn.Parameter(packed.view(stored), requires_grad=False)
        for key in ("scale", "zero"):
            meta[key] = meta[key].repeat_interleave(self.group_size // group_size, 0)
        meta["group_size"] = group_size
        if module.quant_config:  # files of older versions do not have it
            module.quant_config["weight_quant_params"]["group_size"] = group_size

    def quantization(self) -> dict[str, Any] | None:
        meta = self._meta
        return {
            "quant_method": "hqq",
            "nbits": meta["nbits"],
            "group_size": self._shared if self._axis == 0 else self.group_size,
            "axis": self._axis,
            "compute_dtype": str(self.module.compute_dtype).removeprefix("torch."),
        }


def quantizing_code(quantization: Mapping[str, Any]) -> Code:
    """The Python code that quantizes a model by HQQ as its layers are."""
    config = ", ".join(f"{key}={quantization.get(key)!r}" for key in ("nbits", "group_size", "axis"))
    dtype = str(quantization.get("compute_dtype"))
    return Code(
        {"hqq.core.quantize": {"BaseQuantizeConfig"}, "hqq.models.hf.base": {"AutoHQQHFModel"}, "torch": {dtype}},
        statements=[
            f"AutoHQQHFModel.quantize_model(base, quant_config=BaseQuantizeConfig({config}), compute_dtype={dtype}, "
            "device=str(base.device))"
        ],
    )
