"""Single layers of every format whose groups can be split, and into which size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from support.packed_layers import LIBRARY, VARIANTS, packed_layer
from support.single_layers import linear_4bit
from torch import nn

ROWS, COLUMNS = 128, 256


@dataclass(frozen=True)
class Case:
    """A layer to be split.

    Attributes:
        name (`str`): For test ids and `pytest -k`.
        library (`str`): The package it needs; tests skip by its name where it is not installed.
        make (`Callable`): Makes the layer, in eval mode.
        size (`int`): The group size to have.
        codes (`str`): The attribute that holds the codes.
    """

    name: str
    library: str
    make: Callable[[], Any]
    size: int
    codes: str

    def layer(self) -> Any:
        """The layer, the same at every call."""
        if find_spec(self.library) is None:
            pytest.skip(f"{self.library} is not installed, which the layer {self.name} needs")
        torch.manual_seed(0)
        return self.make()


def _bnb(quant_type: str, block: int = 64, size: int = 32, **options: Any) -> Case:
    def make() -> nn.Module:
        layer = linear_4bit(ROWS, COLUMNS, quant_type=quant_type, block=block, **options).eval()
        layer.support_avx512bf16_for_cpu = False  # or its first forward pass repacks it
        return layer

    words = [key for key, value in options.items() if value]
    return Case("-".join([quant_type, str(block), *words]), "bitsandbytes", make, size, "weight")


def hqq_layer(bits: int, group_size: int | None = 64, axis: int = 1, view_as_float: bool = False) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=bits, group_size=group_size, axis=axis, view_as_float=view_as_float)
    dense = nn.Linear(COLUMNS, ROWS, dtype=torch.float32).requires_grad_(False)
    return HQQLinear(dense, config, compute_dtype=torch.float32, device="cpu")


def _hqq(bits: int, suffix: str = "", **options: Any) -> Case:
    return Case(f"hqq-{bits}bit{suffix}", "hqq", lambda: hqq_layer(bits, **options), 16, "W_q")


def _packed(name: str, size: int = 16, **options: Any) -> Case:
    return Case(name, LIBRARY[options["kind"]], lambda: packed_layer(**options).layer, size, "qweight")


_ACT_ORDER = {"kind": "gptq", "group_size": 64, "act_order": True}
PACKED = [
    *(_packed(name, **options) for name, options in VARIANTS.items() if options.get("group_size", 32) > 16),
    _packed("gptq-ragged-to-32", 32, kind="gptq", columns=160, group_size=64),
    _packed("gptq-act-order-incomplete-part", columns=100, rows=36, **_ACT_ORDER),  # groups of 64 and 36 columns
    _packed("gptq-bias", kind="gptq", bias=True),
]
CASES = [
    *(_bnb(quant_type, nested=nested) for quant_type in ("nf4", "fp4") for nested in (False, True)),
    _bnb("nf4", block=256, size=64),
    _bnb("nf4", storage=torch.bfloat16),
    *(_hqq(bits) for bits in (1, 2, 3, 4, 8)),
    *(_hqq(bits, "-row", group_size=None) for bits in (3, 4)),
    _hqq(4, "-as-float", view_as_float=True),
    *PACKED,
]
SCHEMES = [
    case
    for case in CASES
    if case.library in ("bitsandbytes", "hqq")
    or case.name in ("gptq-bias", "gptq-ragged-to-32", "gptq-act-order-incomplete-part", "gptq-3bit")
    or case.name in ("awq-4bit", "autoround-4bit", "autoround-zp-4bit")
]
