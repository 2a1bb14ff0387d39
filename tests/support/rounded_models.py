"""What the tests of recovery run on: tiny models rounded to few bits, and the data to recover them with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from peft_sgrq import Recovery, SGRQConfig, recover
from peft_sgrq.layer.linear import SGRQLinear


def rounded(directory: Path, bits: int = 2, group_size: int = 16) -> Any:
    """A tiny model whose blocks' weights are rounded to a grid of a few bits, asymmetric, in plain `nn.Linear`s."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            layer.weight.data = _round(layer.weight.data, bits, group_size)
    return model


def _round(weight: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    rows, columns = weight.shape
    groups = F.pad(weight, (0, -columns % group_size)).view(rows, -1, group_size)
    low, high = groups.amin(2, keepdim=True).clamp(max=0), groups.amax(2, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-8)
    zero = torch.round(-low / scale)
    codes = (torch.round(groups / scale) + zero).clamp(0, 2**bits - 1)
    return ((codes - zero) * scale).view(rows, -1)[:, :columns].contiguous()


def full(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def sequences(count: int = 12, length: int = 24, seed: int = 7) -> list[dict[str, Any]]:
    """Random tokens, sequences of several lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {"input_ids": torch.randint(3, 256, (length - number % 5,), generator=generator).tolist()}
        for number in range(count)
    ]


def recovered(directory: Path, model: Any = None, reference: Any = None, data: Any = None, **options: Any) -> Recovery:
    """A tiny model with its recovery adapter; 2 bits unless a model is given."""
    settings: dict[str, Any] = {"epochs": 3, "batch_size": 4, "learning_rate": 2e-2, "progress": False, **options}
    config = settings.pop("config", SGRQConfig(ratio=1.0, group_size=16, task_type="CAUSAL_LM"))
    return recover(
        rounded(directory) if model is None else model,
        full(directory) if reference is None else reference,
        sequences() if data is None else data,
        config,
        **settings,
    )


def deltas(model: Any, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    """Layer name -> its deltas."""
    return {
        name.removeprefix("base_model.model."): module.sgrq_delta[adapter_name].weight.detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, SGRQLinear)
    }
