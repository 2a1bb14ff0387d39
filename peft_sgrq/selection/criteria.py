"""Saliency criteria: a score for each selectable group (or row) of a layer."""

from __future__ import annotations

import torch

from peft_sgrq.backends.base import ScaleBackend


@torch.no_grad()
def magnitude(backend: ScaleBackend) -> torch.Tensor:
    """The sum of squared weights of each group of columns, or of each row in a row format; needs no data.

    Args:
        backend (`ScaleBackend`): The layer.

    Returns:
        `torch.Tensor`: float32 `[selectable]`.
    """
    weight = backend.dequantize(backend.scales(), torch.float32)  # (N, K)
    if backend.granularity == "row":
        return weight.square().sum(1)
    columns = weight.square().sum(0, keepdim=True)  # (1, K)
    return backend.select_columns(columns, None).view(-1, backend.group_size).sum(1)
