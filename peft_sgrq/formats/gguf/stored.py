"""A packed linear layer in a GGUF file as codes and scales, seen as `GGUFWeight` sees it in memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch

from peft_sgrq.formats.gguf.block_scales import BlockScales
from peft_sgrq.formats.gguf.file import GGUFFile
from peft_sgrq.formats.gguf.names import Place
from peft_sgrq.formats.gguf.sub_block_scales import scales_of
from peft_sgrq.formats.gguf.weight import digest_tensors, format_name
from peft_sgrq.formats.gguf.writing import in_file_order
from peft_sgrq.formats.scale_matrix import ScaleMatrix


class StoredGGUFWeight(ScaleMatrix):
    """One matrix of a file, its rows in the order of the model.

    Args:
        file (`GGUFFile`): The file.
        tensor (`str`): The name of its tensor, in blocks and packable.
        place (`Place`): Where it goes in the model.
        sub_blocks (`bool`): Whether sub-blocks have scales of their own.
    """

    def __init__(self, file: GGUFFile, tensor: str, place: Place, sub_blocks: bool) -> None:
        info = file.tensors[tensor]
        kind = info.kind
        if kind is None or not place.packable:
            raise ValueError("the file does not hold it in blocks of a type whose scales can be tuned")
        self.file, self.tensor, self.kind = file, tensor, kind
        self._rows, self._sub_blocks = place.rows, sub_blocks
        self.out_features, self.in_features = info.shape
        self.group_size = kind.sub.size if sub_blocks and kind.sub is not None else kind.size
        self.movable_zero_points = kind.offset_at is not None and (kind.sub is None or sub_blocks)
        self.name = format_name(kind, self.group_size)

    @cached_property
    def _held(self) -> BlockScales:
        packed = self.file.blocks(self.tensor)
        return scales_of(self.kind, packed if self._rows is None else packed[self._rows], self._sub_blocks)

    def forget(self) -> None:
        """Drops the bytes read; they are read again when needed."""
        self.__dict__.pop("_held", None)

    @property
    def storage_dtype(self) -> torch.dtype:
        return torch.float16

    def scales(self) -> torch.Tensor:
        return self._held.scales()

    def round_to_storage(self, scales: torch.Tensor) -> torch.Tensor:
        return self._held.round(scales)

    def fingerprint_tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return digest_tensors(self._held)

    def with_scales(self, scales: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The tensor's bytes for changed scales, as the file is to hold them, uint8 `[N, bytes of a row]`."""
        changed = in_file_order(self._held.with_scales(scales()), self._rows)
        self.forget()
        return changed
