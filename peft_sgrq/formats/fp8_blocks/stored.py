"""Fine-grained fp8 (DeepSeek's): `weight` float8 `[N, K]` and `weight_scale_inv`, a scale for each block."""

from __future__ import annotations

from peft_sgrq.config import SGRQConfig
from peft_sgrq.formats.fp8_blocks.weight import geometry
from peft_sgrq.formats.stored_weight import PlainScales


class StoredFp8Blocks(PlainScales):
    """A scale for each block of, usually, 128 x 128 weights; one for the whole weight if there are no blocks."""

    scale_name = "weight_scale_inv"
    needed = ("weight_scale_inv", "weight")

    def measure(self, config: SGRQConfig) -> bool:
        block = self.folder.quantization.get("weight_block_size")
        self._set_geometry(geometry(self.tensor("weight"), self.tensor("weight_scale_inv"), block))
        return True
