"""Saliencies made of numbers, without a model."""

from __future__ import annotations

import torch

from peft_sgrq import Saliency
from peft_sgrq.selection.layer_saliency import LayerSaliency


def example() -> Saliency:
    layers = {
        "a.b": LayerSaliency(torch.rand(64), (8, 64), "group", 16, "dense-16:01:"),
        "a.c": LayerSaliency(torch.rand(32), (4, 32), "group", 8, "x:2:3", torch.randperm(32) // 8),
        "b": LayerSaliency(torch.rand(64), (8, 64), "group", 32, "fp8-blocks:0:0", scale_rows=2),
        "d": LayerSaliency(torch.rand(6), (6, 32), "row", 32, "bnb-int8-row:0:0"),
    }
    return Saliency(layers, "obs", 123, {"total": 1.5}, {"a.b": 0.1})
