"""What a format's layout on the disk must offer: the scales of one layer, and the tensors that hold changed ones."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection
from typing import Any, ClassVar

import torch

from peft_sgrq.config import SGRQConfig
from peft_sgrq.files.folder import CheckpointFolder
from peft_sgrq.files.tensors import Change, Changes
from peft_sgrq.formats.scale_matrix import ScaleMatrix


class StoredWeight(ScaleMatrix):
    """One linear layer in a checkpoint, seen as the `ScaledWeight` of its format sees it in memory.

    `fingerprint` gives what it gives in memory, from the bytes of the file; `scales` and `round_to_storage` are what
    `functional.effective_scales` needs.

    Args:
        folder (`CheckpointFolder`): The checkpoint.
        prefix (`str`): What the names of the layer's tensors begin with, without the dot.

    Attributes:
        needed (`tuple[str, ...]`): Names, within the layer, of tensors that every layer of the format has.
    """

    needed: ClassVar[tuple[str, ...]]

    def __init__(self, folder: CheckpointFolder, prefix: str) -> None:
        self.folder = folder
        self.prefix = prefix

    @classmethod
    def find(cls, folder: CheckpointFolder, prefix: str, config: SGRQConfig) -> StoredWeight | None:
        """The layer, if its tensors are those of this format.

        Args:
            folder (`CheckpointFolder`): The checkpoint.
            prefix (`str`): The name of the layer in it.
            config (`SGRQConfig`): The adapter's config, which says what a file cannot.

        Raises:
            ValueError: If it is of this format but its scales cannot be tuned; a clause about the layer.
        """
        layer = cls(folder, prefix)
        return layer if all(map(layer.has, cls.needed)) and layer.measure(config) else None

    @abstractmethod
    def measure(self, config: SGRQConfig) -> bool:
        """Takes the geometry from the tensors, which `find` has seen; whether they are of this format."""

    def has(self, name: str) -> bool:
        """Whether the layer has a tensor of this name."""
        return self.key(name) in self.folder

    def key(self, name: str) -> str:
        """The full name of one of the layer's tensors."""
        return f"{self.prefix}.{name}"

    def tensor(self, name: str) -> torch.Tensor:
        """One of the layer's tensors."""
        return self.folder.tensor(self.key(name))

    @abstractmethod
    def changes(self, scales: Callable[[], torch.Tensor]) -> Changes:
        """The tensors to be written for changed scales.

        Args:
            scales (`Callable`): Makes the changed scales, float32 `[rows, groups]`; not to be called before a tensor
                is made.
        """

    @staticmethod
    def adjust_config(config: dict[str, Any], names: Collection[str]) -> None:
        """Corrects, in place, what the merge made untrue in `config.json`; `names` are the merged checkpoint's."""


class PlainScales(StoredWeight):
    """A layer whose scales are one tensor, stored as `[rows, groups]` or transposed.

    Attributes:
        scale_name (`str`): Name of that tensor within the layer.
        code_name (`str`): Name of the tensor of codes.
        transposed (`bool`): Whether the scales are stored as `[groups, rows]`.
        trained_dtype (`torch.dtype` or `None`): The dtype of the scales in memory, which training rounded to, where a
            loader may cast them; it is what is written. `None` if it is that of the file.
    """

    scale_name: str
    code_name: str = "weight"
    transposed: bool = False
    trained_dtype: torch.dtype | None = None

    @property
    def storage_dtype(self) -> torch.dtype:
        return self.trained_dtype or self.tensor(self.scale_name).dtype

    def scales(self) -> torch.Tensor:
        stored = self.tensor(self.scale_name).to(self.storage_dtype).float()
        return (stored.t() if self.transposed else stored).reshape(self.scales_shape)

    def changes(self, scales: Callable[[], torch.Tensor]) -> Changes:
        shape = self.folder.entry(self.key(self.scale_name)).shape
        dtype = self.storage_dtype

        def make() -> torch.Tensor:
            made = scales().to(dtype)
            return (made.t() if self.transposed else made).reshape(shape)

        return {self.key(self.scale_name): Change(dtype, shape, make)}

    def set_trained_dtype(self, config: SGRQConfig) -> None:
        """Takes `trained_dtype` from what the adapter's config says of its base."""
        name = (config.base_quantization or {}).get("scale_dtype")
        self.trained_dtype = None if name is None else getattr(torch, name)

    def fingerprint_tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.tensor(self.code_name), self.tensor(self.scale_name)
