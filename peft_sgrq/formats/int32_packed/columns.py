"""Which columns of a weight share scales: consecutive ones, or, with activation order, any."""

from __future__ import annotations

import torch


class ColumnGroups:
    """The map `k(c)` of a layer and its inverse, made of an index that may be replaced, moved or loaded into.

    Args:
        in_features (`int`): Columns of the weight, `K`.
        group_size (`int`): Most columns a group has, `g`.
    """

    def __init__(self, in_features: int, group_size: int) -> None:
        self.in_features, self.group_size = in_features, group_size
        self.count = -(-in_features // group_size)
        self._source: tuple[torch.Tensor, int, torch.device] | None = None
        self._groups: torch.Tensor | None = None  # the group of each column, int64 (K,); None if consecutive
        self._table: torch.Tensor | None = None  # the columns of each group, int64 (G, g), padded by K

    @property
    def consecutive(self) -> bool:
        """Whether group `k` is the columns from `k * g` on."""
        return self._groups is None

    @property
    def padded(self) -> bool:
        """Whether some group has fewer than `g` columns."""
        return self.count * self.group_size != self.in_features

    def update(self, index: torch.Tensor | None, device: torch.device) -> None:
        """Takes over an index (the group of each column, integer `[K]`); `None` means consecutive groups.

        Args:
            index (`torch.Tensor` or `None`): The index.
            device (`torch.device`): Where the maps are wanted.

        Raises:
            ValueError: If a group has more than `g` columns, or one outside of the scales.
        """
        if index is None or index.is_meta:
            self._source = self._groups = self._table = None
            return
        version = 0 if index.is_inference() else index._version
        if self._source is not None and self._source[0] is index and self._source[1:] == (version, device):
            return
        groups = index.detach().to("cpu", torch.int64)
        self._groups = self._table = None
        if not torch.equal(groups, torch.arange(self.in_features) // self.group_size):
            self._groups, self._table = groups.to(device), self._invert(groups).to(device)
        self._source = (index, version, device)

    def _invert(self, units: torch.Tensor) -> torch.Tensor:
        if units.min() < 0 or units.max() >= self.count:
            raise ValueError(
                f"its g_idx names groups {int(units.min())} to {int(units.max())}, expected 0 to {self.count - 1}; "
                "the checkpoint is damaged, or of a layout that is not known"
            )
        sizes = torch.bincount(units, minlength=self.count)
        if sizes.max() > self.group_size:
            raise ValueError(
                f"its g_idx puts {int(sizes.max())} columns into one group, expected at most the group size "
                f"{self.group_size}; the checkpoint is damaged, or of a layout that is not known"
            )
        order = units.argsort(stable=True)
        place = torch.arange(self.in_features) - (sizes.cumsum(0) - sizes)[units[order]]
        table = torch.full((self.count, self.group_size), self.in_features)
        table[units[order], place] = order
        return table

    def split(self, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The columns of each group divided, in the order they occur, among parts of another size.

        Args:
            group_size (`int`): Most columns of a part, a divisor of `g`.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: The part of each column, int64 `[K]`, and how many parts each group
            has, int64 `[G]`, on the CPU. Parts are numbered group by group.
        """
        cpu = torch.device("cpu")
        columns = self.indices(cpu)  # (G, g)
        group, place = (columns < self.in_features).nonzero(as_tuple=True)
        sizes = torch.bincount(group, minlength=self.count)
        parts = (sizes + group_size - 1) // group_size
        index = torch.empty(self.in_features, dtype=torch.int64)
        index[columns[group, place]] = (parts.cumsum(0) - parts)[group] + place // group_size
        return index, parts

    def group_of_column(self, device: torch.device) -> torch.Tensor | None:
        """The group of each column, int64 `[K]`; `None` if groups are consecutive and complete."""
        if self.consecutive and not self.padded:
            return None
        if self._groups is None:
            return torch.arange(self.in_features, device=device) // self.group_size
        return self._groups.to(device)

    def table(self, device: torch.device) -> torch.Tensor | None:
        """The columns of each group, int64 `[G, g]`, padded by `K`; `None` if groups are consecutive."""
        return None if self._table is None else self._table.to(device)

    def indices(self, device: torch.device) -> torch.Tensor:
        """The columns of each group, int64 `[G, g]`, padded by numbers from `K` on."""
        table = self.table(device)
        if table is None:
            table = torch.arange(self.count * self.group_size, device=device).view(self.count, self.group_size)
        return table
