"""Parameters whose values DeepSpeed ZeRO-3 keeps in parts on all processes."""

from __future__ import annotations

from typing import Any

import torch


def is_partitioned(parameter: torch.Tensor) -> bool:
    """Whether the values of a parameter are not in it now, but in parts on all processes."""
    status = getattr(parameter, "ds_status", None)
    return status is not None and status.name == "NOT_AVAILABLE"


def shape_of(parameter: torch.Tensor) -> torch.Size:
    """The shape of a parameter, whether its values are there or not."""
    return getattr(parameter, "ds_shape", parameter.shape)


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """The values of a parameter, detached; gathered if they are in parts, which all processes must do together."""
    if not is_partitioned(parameter):
        return parameter.detach()
    import deepspeed

    owner: Any = parameter
    with deepspeed.zero.GatheredParameters([owner]):
        return owner.detach().clone()
