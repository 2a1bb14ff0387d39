"""bitsandbytes 4-bit layers: nf4 and fp4, any block size, with nested (double-quantized) scales or not.

The codes are packed two to a byte over the flattened weight, one float32 `absmax` a block. Blocks must not straddle
rows, so `in_features` has to be a multiple of the block size.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from peft_sgrq.formats.kernels import decodes_4bit, group_reduce_4bit
from peft_sgrq.formats.scale_matrix import ScaleMatrix
from peft_sgrq.formats.scaled_weight import ScaledWeight

_SMALLEST_BLOCK = 32
_COMPUTABLE = (torch.float32, torch.bfloat16, torch.float16)


class Bnb4bitScales(ScaleMatrix):
    """The scales of a bitsandbytes quantization state, wherever it is: float32, or nested and un-nested exactly."""

    @property
    @abstractmethod
    def _state(self) -> Any:
        """The `QuantState`."""

    @property
    @abstractmethod
    def stored_codes(self) -> torch.Tensor:
        """The packed codes."""

    @property
    def storage_dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def is_nested(self) -> bool | None:
        return bool(self._state.nested)

    def scales(self) -> torch.Tensor:
        state = self._state
        if not state.nested:
            return state.absmax.view(self.scales_shape)
        second = state.state2
        absmax = torch.ops.bitsandbytes.dequantize_blockwise.default(
            state.absmax, second.absmax, second.code, second.blocksize, torch.float32
        )
        return (absmax + state.offset).view(self.scales_shape)

    def fingerprint_tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        state = self._state
        if not state.nested:
            return self.stored_codes, state.absmax
        levels = (state.absmax, state.state2.absmax, state.offset)
        return self.stored_codes, torch.cat([level.reshape(-1).contiguous().view(torch.uint8) for level in levels])


class Bnb4bitWeight(Bnb4bitScales, ScaledWeight):
    """`bitsandbytes.nn.Linear4bit`. Scales are float32; nested ones stay so until a merge un-nests them exactly."""

    layer_class = ("bitsandbytes.nn", "Linear4bit")
    stored_fields = ("absmax", "offset", "state2", "nested")
    in_parts = True
    codes_follow = True
    splittable = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        state = self._state
        if state is None:
            raise ValueError(
                "its weight is not quantized yet, expected a bitsandbytes quant_state; move the model to its device "
                "first, bitsandbytes quantizes on the way"
            )
        self.out_features, self.in_features = (int(size) for size in state.shape)
        if (self.out_features, self.in_features) != (module.out_features, module.in_features):
            raise ValueError(
                f"its weight was quantized with shape {tuple(state.shape)}, expected (out_features, in_features) = "
                f"{(module.out_features, module.in_features)}; quantize it again from a weight of that orientation"
            )
        self.group_size = int(state.blocksize)
        if self.in_features % self.group_size:
            raise ValueError(
                f"in_features={self.in_features} is not a multiple of its block size {self.group_size}, so blocks "
                "straddle rows and have no column group; leave it out with `exclude_modules`, or quantize with a "
                "block size that divides in_features"
            )
        self.name = f"bnb-{state.quant_type}-{self.group_size}"

    @property
    def _state(self) -> Any:
        return quant_state_of(self.module)

    @property
    def owner(self) -> Any:
        return self._state

    @property
    def stored_codes(self) -> torch.Tensor:
        return self.module.weight.data.view(-1, 1)  # type: ignore[operator]

    def sources(self) -> list[torch.Tensor]:
        state = self._state
        levels = [state.offset, state.state2.absmax] if state.nested else []
        return [self.module.weight, state.absmax, *levels]

    @property
    def _packed_groups(self) -> torch.Tensor:
        return self.stored_codes.view(torch.uint8).view(*self.scales_shape, -1)  # (N, G, g / 2)

    def codes_of_rows(self, units: torch.Tensor | None, dtype: torch.dtype, rows: slice) -> torch.Tensor:
        packed = self._packed_groups[rows]
        if units is not None:
            packed = packed.index_select(1, units)  # (N, n, g / 2)
        count, selected = packed.shape[:2]
        ones = torch.ones(count * selected, dtype=torch.float32, device=packed.device)
        shape = (count, selected * self.group_size)
        return self._dequantize(packed.reshape(-1, 1), ones, shape, dtype)

    def reduce(self, product: torch.Tensor, units: torch.Tensor | None, rows: slice) -> torch.Tensor:
        if decodes_4bit(product):
            return group_reduce_4bit(product, self._packed_groups[rows], units, self._state.code)
        return super().reduce(product, units, rows)

    def dequantize_columns(self, scales: torch.Tensor, dtype: torch.dtype, columns: slice) -> torch.Tensor:
        groups = slice(columns.start // self.group_size, columns.stop // self.group_size)
        packed = self._packed_groups[:, groups].reshape(-1, 1)
        shape = (self.out_features, columns.stop - columns.start)
        return self._dequantize(packed, self.prepare(scales[:, groups]), shape, dtype)

    def _dequantize(
        self, packed: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype
    ) -> torch.Tensor:
        return torch.ops.bitsandbytes.dequantize_4bit.default(
            packed, absmax, self.group_size, self._state.quant_type, shape, dtype
        )

    def prepare(self, scales: torch.Tensor) -> torch.Tensor:
        return scales.reshape(-1).contiguous()  # (N * G,)

    def linear(self, x: torch.Tensor, prepared: torch.Tensor) -> torch.Tensor:
        if x.numel() == 0:  # as bitsandbytes does; its kernels are not made for it
            return x.new_empty(*x.shape[:-1], self.out_features)
        bias = self.bias
        return torch.ops.bitsandbytes.gemm_4bit.default(
            x,
            self.stored_codes,
            (self.out_features, self.in_features),
            prepared,
            self.group_size,
            self._state.quant_type,
            bias=None if bias is None else bias.to(x.dtype),
        )

    def bind(self, prepared: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        gemm = torch.ops.bitsandbytes.gemm_4bit.default
        module: Any = self.module
        packed, shape = self.stored_codes, (self.out_features, self.in_features)
        size, quant_type = self.group_size, self._state.quant_type

        def run(x: torch.Tensor) -> torch.Tensor:
            dtype, bias = module.compute_dtype, module.bias
            cast = x if dtype is None or x.dtype == dtype else x.to(dtype)
            if not cast.numel() or cast.dtype not in _COMPUTABLE:
                _check_computable(cast.dtype)
                return self.cast_output(self.linear(cast, prepared), x)
            own = None if bias is None else bias.to(cast.dtype)
            y = gemm(cast, packed, shape, prepared, size, quant_type, bias=own)
            return y if y.dtype == x.dtype else y.to(x.dtype)

        return run

    # bitsandbytes computes in `compute_dtype` and returns the dtype of the input.

    def cast_input(self, x: torch.Tensor) -> torch.Tensor:
        module: Any = self.module
        self.check_input(x)
        if not module.compute_type_is_set:
            module.set_compute_type(x)
            module.compute_type_is_set = True
        return x if module.compute_dtype is None else x.to(module.compute_dtype)

    def check_input(self, x: torch.Tensor) -> None:
        dtype: Any = self.module.compute_dtype
        _check_computable(dtype or x.dtype)

    def cast_output(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return y.to(x.dtype)

    def changed(self, scales: torch.Tensor) -> tuple[Any, ...]:
        return self.prepare(scales), None, None, False

    def restore_scales(self, stored: Any) -> Any:
        self.module.weight.compress_statistics = stored[-1]  # type: ignore[union-attr]  # which says the same again
        return super().restore_scales(stored)

    def convert_stored(self, stored: Any, fn: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        # As bitsandbytes does with the scales of the layer: they move, and keep their dtype.
        absmax, offset, second, nested = stored
        device = fn(torch.empty(0, device=absmax.device)).device
        if second is not None:
            second = copy.copy(second)
            second.absmax, second.code = second.absmax.to(device), second.code.to(device)
        return absmax.to(device), None if offset is None else offset.to(device), second, nested

    def split_obstacle(self, group_size: int) -> str | None:
        if group_size >= _SMALLEST_BLOCK:
            return None
        return (
            f"bitsandbytes computes with no blocks of {group_size}, expected {_SMALLEST_BLOCK} or more; pass "
            f"{_SMALLEST_BLOCK}"
        )

    def split(self, group_size: int) -> None:
        module: Any = self.module
        parts = self.group_size // group_size
        self.write_scales(self.scales().repeat_interleave(parts, 1))
        self._state.blocksize = module.weight.blocksize = group_size
        if getattr(module, "quant_state", None) is not None:
            module.quant_state = self._state  # a copied layer has a state of its own there

    def quantization(self) -> dict[str, Any] | None:
        state = self._state
        compute_dtype = self.module.compute_dtype or state.dtype
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": state.quant_type,
            "bnb_4bit_use_double_quant": bool(state.nested),
            "bnb_4bit_compute_dtype": str(compute_dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": str(self.module.weight.dtype).removeprefix("torch."),
        }


def _check_computable(dtype: torch.dtype) -> None:
    """Refuses a dtype that the kernels do not have: on CPUs they give back memory that nobody wrote to."""
    if dtype not in _COMPUTABLE:
        raise ValueError(
            f"A 4-bit layer of bitsandbytes is to compute in {dtype}, the dtype of its input where it has no compute "
            "dtype, expected one it can compute in (float32, bfloat16, float16), as its output would be arbitrary; "
            "cast the model or its input, or load it with another `bnb_4bit_compute_dtype`."
        )


def quant_state_of(module: nn.Module) -> Any:
    # A weight rebuilt by others (FSDP does so) may have lost its state; the layer has it too.
    state = getattr(module.weight, "quant_state", None)
    return getattr(module, "quant_state", None) if state is None else state
