"""A packed linear layer in a GGUF file as codes and scales, seen as `GGUFWeight` sees it in memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch

from peft_sgrq.formats.gguf.block_scales import BlockScales
from peft_sgrq.formats.gguf.file import GGUFFile
from peft_sgrq.formats.gguf.names import Place
from peft_sgrq.formats.gguf.sub_block_scales import scales_of
from peft_sgrq.formats.gguf.weight import GGUFScales
from peft_sgrq.formats.gguf.writing import in_file_order


class StoredGGUFWeight(GGUFScales):
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
        self.set_kind(scales_of(kind, torch.empty(0, kind.nbytes, dtype=torch.uint8), sub_blocks))

    @cached_property
    def held(self) -> BlockScales:
        packed = self.file.blocks(self.tensor)
        return scales_of(self.kind, packed if self._rows is None else packed[self._rows], self._sub_blocks)

    def forget(self) -> None:
        """Drops the bytes read; they are read again when needed."""
        self.__dict__.pop("held", None)

    def with_scales(self, scales: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The tensor's bytes for changed scales, as the file is to hold them, uint8 `[N, bytes of a row]`."""
        changed = in_file_order(self.held.with_scales(scales()), self._rows)
        self.forget()
        return changed
