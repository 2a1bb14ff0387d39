"""The selectable unit: what of a layer is selected, or not, as a whole."""

from __future__ import annotations

from enum import Enum

import torch


class SelectableUnit(str, Enum):
    """A group of columns, in all rows; or, in a format with one scale a row, a row.

    Scores are kept by line: a column where groups are selected, a row where rows are.
    """

    GROUP = "group"
    ROW = "row"

    @property
    def dim(self) -> int:
        """The dimension of the weight, and of its scales, along which units and lines lie: 1 or 0."""
        return 0 if self is SelectableUnit.ROW else 1

    def delta_shape(self, selected: int, scales_shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of the deltas of `selected` units, where `scales_shape` is `(rows, groups)`."""
        rows, groups = scales_shape
        return (selected, groups) if self is SelectableUnit.ROW else (rows, selected)

    def columns(self, group_size: int) -> int:
        """How many columns go together: those of a group, or one where rows are selected."""
        return 1 if self is SelectableUnit.ROW else group_size

    def sum_to_lines(self, elements: torch.Tensor) -> torch.Tensor:
        """Values of each weight, `[N, K]`, summed by line, `[K]` or `[N]`; what is by line already stays as it is."""
        return elements.sum(1 - self.dim) if elements.dim() == 2 else elements
