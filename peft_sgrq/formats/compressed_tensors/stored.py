"""compressed-tensors: `weight_packed` and `weight_shape`, or `weight`; and `weight_scale`."""

from __future__ import annotations

from typing import Any

from peft_sgrq.config import SGRQConfig
from peft_sgrq.formats.compressed_tensors.weight import DIGEST_DTYPE, geometry
from peft_sgrq.formats.stored_weight import PlainScales


class StoredCompressedTensors(PlainScales):
    """Integers packed into int32, int8, or float8; a scale for a group, a row, a block or the whole weight."""

    scale_name = "weight_scale"
    needed = ("weight_scale",)
    digest_dtype = DIGEST_DTYPE

    def measure(self, config: SGRQConfig) -> bool:
        self.set_trained_dtype(config)
        self.code_name = "weight_packed" if self.has("weight_packed") else "weight"
        if not self.has(self.code_name):
            return False
        stored = self.tensor(self.code_name)
        shape = tuple(self.tensor("weight_shape").tolist() if self.has("weight_shape") else stored.shape)
        self._set_geometry(geometry(shape, stored, self.tensor("weight_scale"), _blocks(self.folder.quantization)))
        return True


def _blocks(quantization: dict[str, Any]) -> list[tuple[int, int]]:
    groups = (quantization.get("config_groups") or {}).values()
    blocks = [(group.get("weights") or {}).get("block_structure") for group in groups]
    return [(int(block[0]), int(block[1])) for block in blocks if block]
