"""Single layers of GPTQ, AWQ and AutoRound with random codes, packed here by plain integer arithmetic.

The packing is written down a second time, as the formats' papers and files have it, so that a test compares the
scaled weights with something other than themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_sgrq import SGRQConfig
from peft_sgrq.formats.registry import resolve_weight
from peft_sgrq.layer.masks import encode_mask

LIBRARY = {"gptq": "gptqmodel", "awq": "gptqmodel", "autoround": "auto_round", "autoround-zp": "auto_round"}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
VARIANTS: dict[str, dict[str, Any]] = {
    **{f"{kind}-{bits}bit": {"kind": kind, "bits": bits} for kind in LIBRARY for bits in (2, 3, 4, 8)},
    **{f"gptq-act-order-{bits}bit": {"kind": "gptq", "bits": bits, "act_order": True} for bits in (2, 3, 4, 8)},
    "gptq-ragged": {"kind": "gptq", "columns": 160, "group_size": 64},  # groups of 64, 64 and 32 columns
    "gptq-ragged-3bit": {"kind": "gptq", "bits": 3, "columns": 160, "group_size": 64},
    "gptq-ragged-act-order": {"kind": "gptq", "columns": 160, "group_size": 64, "act_order": True},
    "gptq-one-group": {"kind": "gptq", "group_size": 128},
    "gptq-group-in-a-word": {"kind": "gptq", "bits": 2, "group_size": 16},
    "gptq-3bit-unaligned-groups": {"kind": "gptq", "bits": 3, "group_size": 16},
    "gptq-half-a-word": {"kind": "gptq", "columns": 100, "rows": 36},
    "gptq-zero-scales": {"kind": "gptq", "zero_scales": True},
    "awq-zero-scales": {"kind": "awq", "zero_scales": True},
    "autoround-5bit": {"kind": "autoround", "bits": 5},
    "autoround-6bit": {"kind": "autoround-zp", "bits": 6},
    "autoround-7bit": {"kind": "autoround-zp", "bits": 7},
}
# One variant of each way to make the weight: consecutive groups, columns in any order, codes that straddle words.
SCHEMES = ("gptq-4bit", "gptq-3bit", "gptq-ragged-act-order", "awq-4bit", "autoround-4bit", "autoround-zp-4bit")
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the code that is in each nibble of a word, from the low one on


def require(kind: str) -> None:
    """Skips the test, by the name of the library, where it is not installed."""
    if find_spec(LIBRARY[kind]) is None:
        pytest.skip(f"{LIBRARY[kind]} is not installed, which the format {kind} needs")


def pack(codes: Sequence[int], bits: int) -> list[int]:
    """Codes as one little-endian bit stream in 32-bit words, as signed numbers."""
    stream = sum(int(code) << (index * bits) for index, code in enumerate(codes))
    words = [(stream >> shift) & 0xFFFFFFFF for shift in range(0, len(codes) * bits, 32)]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def pack_along(codes: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """A matrix of codes packed along one dimension, int32."""
    lines = codes.T if dim == 0 else codes
    packed = torch.tensor([pack(line, bits) for line in lines.tolist()], dtype=torch.int32)
    return packed.T.contiguous() if dim == 0 else packed


def _interleaved(codes: torch.Tensor) -> torch.Tensor:
    return codes.view(len(codes), -1, 8)[:, :, list(_AWQ_ORDER)].flatten(1)


@dataclass
class Packed:
    """A layer and what it was packed from.

    Attributes:
        layer (`nn.Module`): The library's layer on its torch kernel.
        codes, zeros (`torch.Tensor`): `q` `[K, N]` and `z` `[groups, N]`, int64.
        scales (`torch.Tensor`): `s`, float16 `[groups, N]`.
        groups (`torch.Tensor`): The group of each column, int64 `[K]`.
    """

    kind: str
    layer: Any
    codes: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    groups: torch.Tensor

    @property
    def levels(self) -> torch.Tensor:
        """`q - z` of every column, float64 `[N, K]`."""
        return (self.codes - self.zeros[self.groups]).double().T

    def product_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What a layer multiplies in, given the dtype of its input: AWQ's kernel knows no float32."""
        return torch.float16 if self.kind == "awq" and dtype == torch.float32 else dtype

    def weight(self, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The weight a layer with other scales (float32 `[N, groups]`) multiplies by, float64 `[N, K]`."""
        stored = scales.half()
        made = stored.to(dtype) if self.kind == "awq" else stored
        product = (made.double()[:, self.groups] * self.levels).to(made.dtype)  # one rounding
        return product.to(dtype).double()


def packed_layer(
    kind: str,
    rows: int = 64,
    columns: int = 128,
    bits: int = 4,
    group_size: int = 32,
    act_order: bool = False,
    bias: bool = False,
    zero_scales: bool = False,
) -> Packed:
    """A random layer: `gptq`, `awq`, `autoround` (zero points as they are) or `autoround-zp` (stored less one)."""
    require(kind)
    count, top = -(-columns // group_size), 1 << bits
    codes = torch.randint(top, (columns, rows))
    # Less one, a zero point of zero cannot be packed.
    zeros = torch.randint(1 if kind == "autoround-zp" else 0, top, (count, rows))
    scales = (torch.rand(count, rows) * 0.1 + 0.01).half()
    if zero_scales:
        scales[::2, ::3] = 0
    groups = torch.arange(columns) // group_size
    if act_order:
        groups = groups[torch.randperm(columns)]
    layer = _MAKERS[kind](rows, columns, bits, group_size, bias)
    layer.qweight.copy_(_pack_codes(kind, codes, bits))
    layer.qzeros.copy_(_pack_codes(kind, zeros - int(kind == "autoround-zp"), bits, dim=1))
    layer.scales.copy_(scales)
    if act_order:
        layer.g_idx.copy_(groups)
    if bias:
        layer.bias.copy_(torch.randn(rows))
    return Packed(kind, layer.eval(), codes, zeros, scales, groups)


def _pack_codes(kind: str, codes: torch.Tensor, bits: int, dim: int | None = None) -> torch.Tensor:
    if kind != "awq":
        return pack_along(codes, bits, 0 if dim is None else dim)
    return pack_along(_interleaved(codes) if bits == 4 else codes, bits, 1)


def _gptq(rows: int, columns: int, bits: int, group_size: int, bias: bool) -> nn.Module:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    layer = TorchLinear(
        bits=bits,
        group_size=group_size,
        sym=False,
        desc_act=False,
        in_features=columns,
        out_features=rows,
        bias=bias,
    )
    layer.qzero_format(2)
    return layer


def _awq(rows: int, columns: int, bits: int, group_size: int, bias: bool) -> nn.Module:
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    return AwqTorchLinear(
        bits=bits,
        group_size=group_size,
        sym=False,
        desc_act=False,
        in_features=columns,
        out_features=rows,
        bias=bias,
        register_buffers=True,
    )


def _autoround(rows: int, columns: int, bits: int, group_size: int, bias: bool) -> nn.Module:
    from auto_round_extension.torch.qlinear_torch import QuantLinear

    return QuantLinear(bits, group_size, columns, rows, bias)


def _autoround_zp(rows: int, columns: int, bits: int, group_size: int, bias: bool) -> nn.Module:
    from auto_round_extension.torch.qlinear_torch_zp import QuantLinear

    return QuantLinear(bits, group_size, columns, rows, bias)


_MAKERS = {"gptq": _gptq, "awq": _awq, "autoround": _autoround, "autoround-zp": _autoround_zp}


def adapted(layer: nn.Module, groups: list[int] | None = None, **config: Any) -> PeftModel:
    options: dict[str, Any] = {"target_modules": ["0"], "init_weights": False, "ratio": 0.5, **config}
    if groups is not None:
        count = resolve_weight(layer, 64).selectable
        options["selection"] = {"0": encode_mask(torch.tensor(groups), count)}
    return get_peft_model(nn.Sequential(layer), SGRQConfig(**options)).eval()
