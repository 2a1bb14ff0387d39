"""The saliency of one layer: a score for each column (a row format: each row), and which scale a column belongs to."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from peft_sgrq.formats.scaled_weight import ScaledWeight
from peft_sgrq.formats.selectable_unit import SelectableUnit


@dataclass(frozen=True, eq=False)
class LayerSaliency:
    """The saliency of one layer, and the geometry that a selection needs.

    Attributes:
        scores (`torch.Tensor`): Saliency of each column, float32 `[in_features]`; in a row format of each row,
            `[out_features]`. On the CPU, not negative.
        shape (`tuple[int, int]`): `(out_features, in_features)`.
        unit (`SelectableUnit`): What is selected: groups of columns, or rows.
        group_size (`int`): Columns per scale.
        fingerprint (`str`): Digest of the base layer, as in `ScaledWeight.fingerprint`.
        column_groups (`torch.Tensor` or `None`): The group of each column, int64 `[in_features]`; `None` if it is
            `column // group_size`, or in a row format.
        scale_rows (`int` or `None`): Rows of the scales where rows of the layer share one; `None` if each has its own.
    """

    scores: torch.Tensor
    shape: tuple[int, int]
    unit: SelectableUnit
    group_size: int
    fingerprint: str
    column_groups: torch.Tensor | None = None
    scale_rows: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "unit", SelectableUnit(self.unit))  # its word will do, as files have it
        object.__setattr__(self, "scores", self.scores.detach().to("cpu", torch.float32).contiguous())

    @classmethod
    def of(cls, scaled_weight: ScaledWeight, scores: torch.Tensor, fingerprint: str | None = None) -> LayerSaliency:
        """The saliency of a layer from `scores` as the attribute of that name has them, on any device."""
        return cls(
            scores=scores,
            shape=(scaled_weight.out_features, scaled_weight.in_features),
            unit=scaled_weight.unit,
            group_size=scaled_weight.group_size,
            fingerprint=scaled_weight.fingerprint() if fingerprint is None else fingerprint,
            column_groups=_groups_of_columns(scaled_weight),
            scale_rows=scaled_weight.scales_shape[0],
        )

    @property
    def selectable(self) -> int:
        """How many units there are to select from."""
        return self.scales_shape[self.unit.dim]

    @property
    def scales_per_group(self) -> int:
        """How many scales are trained for each selected unit."""
        return self.scales_shape[1 - self.unit.dim]

    @property
    def scales(self) -> int:
        """How many scales the layer has."""
        return self.scales_per_group * self.selectable

    @property
    def scales_shape(self) -> tuple[int, int]:
        """Shape `(rows, groups)` of the scales."""
        return self.scale_rows or self.shape[0], -(-self.shape[1] // self.group_size)

    def group_scores(self) -> torch.Tensor:
        """Saliency of each group, the sum over its columns, or of each row in a row format, float32 `[selectable]`."""
        if self.unit is SelectableUnit.ROW:
            return self.scores
        groups = self.column_groups
        if groups is None:
            groups = torch.arange(self.shape[1]) // self.group_size
        return torch.zeros(self.selectable, dtype=torch.float64).index_add_(0, groups, self.scores.double()).float()


def _groups_of_columns(scaled_weight: ScaledWeight) -> torch.Tensor | None:
    if scaled_weight.unit is SelectableUnit.ROW:
        return None
    groups = scaled_weight.group_of_columns().cpu()
    in_order = torch.arange(scaled_weight.in_features) // scaled_weight.group_size
    return None if torch.equal(groups, in_order) else groups
