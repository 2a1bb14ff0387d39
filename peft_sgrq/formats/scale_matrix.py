"""The scales of one linear layer: their geometry, their rounding, and the digest that identifies a base."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch

from peft_sgrq.formats.selectable_unit import SelectableUnit

_SAMPLES = 4096
# `requantize_with_max_scale` in vllm/model_executor/layers/quantization/utils/w8a8_utils.py of vLLM 0.32.
SERVED_ANEW = (
    "vLLM makes one layer of query, key and value, and one of gate and up, with one scale for it where float8 weights "
    "have one scale a tensor: it quantizes what was merged anew. A base in FP8_DYNAMIC is served as it is merged."
)


class Geometry(NamedTuple):
    """What the stored shapes of a layer say about its format; the fields are attributes of a `ScaleMatrix`."""

    name: str
    unit: SelectableUnit
    out_features: int
    in_features: int
    group_size: int
    rows_per_scale: int


class ScaleMatrix(ABC):
    """The scales `S` of a layer with the weight `W[o, c] = C[o, c] * S[r(o), k(c)]`, wherever they are stored.

    A layer in memory (`ScaledWeight`) and a layer in a checkpoint (`StoredWeight`) are both one, so
    that both are changed by the same formula and recognized by the same digest.

    Attributes:
        name (`str`): The format, as it stands in fingerprints, e.g. `"bnb-nf4-64"`.
        unit (`SelectableUnit`): What is selected as a whole: a group of columns where a scale serves a group of one
            row (or of a block of rows), a row where it serves one whole row.
        in_features, out_features (`int`): Shape of the weight, `[out_features, in_features]` = `[N, K]`.
        group_size (`int`): Columns per scale, `g`. The last group may hold fewer.
        rows_per_scale (`int`): Rows per scale: 1, or the height of a block. The last block may hold fewer.
        storage_dtype (`torch.dtype`): The dtype the format stores its scales in (a dense layer: its weight).
        is_nested (`bool` or `None`): Whether the scales are quantized themselves; `None` in formats without such.
        movable_zero_points (`bool`): Whether the format stores an offset or a zero point for each scale as a float, so
            that it can be moved by parts of a step.
        digest_dtype (`torch.dtype` or `None`): What scales are rounded to in fingerprints, where loaders cast them, so
            that they are those of the file; `None` if they are not cast.
    """

    unit: SelectableUnit = SelectableUnit.GROUP
    movable_zero_points: bool = False
    digest_dtype: ClassVar[torch.dtype | None] = None

    name: str
    in_features: int
    out_features: int
    group_size: int
    rows_per_scale: int = 1

    def _set_geometry(self, geometry: Geometry) -> None:
        for field, value in geometry._asdict().items():
            setattr(self, field, value)

    @property
    def served_anew(self) -> bool:
        """Whether `SERVED_ANEW` holds of the layer."""
        return self.name.endswith("fp8-tensor")

    @property
    def scales_shape(self) -> tuple[int, int]:
        """Shape `(rows, groups)` of the scale matrix `S`."""
        return -(-self.out_features // self.rows_per_scale), -(-self.in_features // self.group_size)

    @property
    def selectable(self) -> int:
        """How many units there are to select from."""
        return self.scales_shape[self.unit.dim]

    def delta_shape(self, selected: int) -> tuple[int, int]:
        """Shape of the deltas when `selected` units are tuned."""
        return self.unit.delta_shape(selected, self.scales_shape)

    @property
    def lines(self) -> int:
        """How many lines scores are kept by: columns where groups are selected, rows where rows are."""
        return (self.out_features, self.in_features)[self.unit.dim]

    @property
    @abstractmethod
    def storage_dtype(self) -> torch.dtype:
        """The dtype the format stores its scales in; for a dense layer, the dtype of its weight."""

    @property
    def is_nested(self) -> bool | None:
        """Whether the scales are quantized themselves (double quantization); `None` in formats without such."""
        return None

    @abstractmethod
    def scales(self) -> torch.Tensor:
        """The scales `S`, float32 `[rows, groups]`. Not to be written to."""

    def round_to_storage(self, scales: torch.Tensor) -> torch.Tensor:
        """Rounds float32 scales to the grid of the storage dtype; the identity where they are stored in float32."""
        return scales if self.storage_dtype == torch.float32 else scales.to(self.storage_dtype).float()

    @abstractmethod
    def fingerprint_tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The stored codes and the stored scales, in any shape, as they identify the base."""

    def fingerprint(self) -> str:
        """A cheap digest of the layer, `format:codes:scales`, from samples of the stored bytes."""
        codes, scales = self.fingerprint_tensors()
        scales = scales if self.digest_dtype is None else scales.to(self.digest_dtype)
        return f"{self.name}:{_digest(codes, self.out_features, self.in_features)}:{_digest(scales)}"


def split_zero_points(scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `effective_scales` returns, apart: scales `[rows, groups]`, and by how many steps zero points are moved.

    Args:
        scales (`torch.Tensor`): float32 `[rows, groups]`, or both stacked, `[2, rows, groups]`.

    Returns:
        The scales, and the moves `e` of `W' = S' (C + e)`, or `None`: both float32 `[rows, groups]`.
    """
    return (scales, None) if scales.dim() == 2 else (scales[0], scales[1])


def _digest(tensor: torch.Tensor, *shape: int) -> str:
    raw = tensor.detach().reshape(-1)
    raw = raw.contiguous().view(torch.uint8)
    step = max(1, raw.numel() // _SAMPLES) | 1  # odd, so that no column or byte position is favoured
    sample = raw[::step][:_SAMPLES].cpu().numpy().tobytes()
    return hashlib.blake2b(sample + repr((raw.numel(), *shape)).encode(), digest_size=4).hexdigest()
