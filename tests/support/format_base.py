"""What the tests know of a quantized format: how a model gets it, and how its own loader reads it back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

# Code that sets `model` from `directory`, run where peft_sgrq is not installed.
AUTO = "from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained(directory)"
NO_PACKING = "\nfor module in model.modules():\n    module.support_avx512bf16_for_cpu = False"  # by bitsandbytes


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
    reload: str = AUTO
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


def dequantized(layer: Any) -> torch.Tensor:
    return layer.weight.dequantize().detach().float()
