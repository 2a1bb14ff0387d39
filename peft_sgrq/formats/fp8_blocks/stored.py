"""Fine-grained fp8 (DeepSeek's): `weight` float8 `[N, K]` and `weight_scale_inv`, a scale for each block."""

from __future__ import annotations

from peft_sgrq.config import SGRQConfig
from peft_sgrq.files.folder import CheckpointFolder
from peft_sgrq.formats.fp8_blocks.weight import geometry
from peft_sgrq.formats.stored_weight import PlainScales, StoredWeight


class StoredFp8Blocks(PlainScales):
    """A scale for each block of, usually, 128 x 128 weights; one for the whole weight if there are no blocks."""

    scale_name = "weight_scale_inv"

    @classmethod
    def find(cls, folder: CheckpointFolder, prefix: str, config: SGRQConfig) -> StoredWeight | None:
        if f"{prefix}.weight_scale_inv" not in folder or f"{prefix}.weight" not in folder:
            return None
        layer = cls(folder, prefix)
        block = folder.quantization.get("weight_block_size")
        layer._set_geometry(geometry(layer.tensor("weight"), layer.tensor("weight_scale_inv"), block))
        return layer
