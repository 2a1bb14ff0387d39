"""compressed-tensors: `weight_packed` and `weight_shape`, or `weight`; and `weight_scale`."""

from __future__ import annotations

from typing import Any

import torch

from peft_sgrq.config import SGRQConfig
from peft_sgrq.files.folder import CheckpointFolder
from peft_sgrq.formats.compressed_tensors.weight import digest_tensors, geometry
from peft_sgrq.formats.stored_weight import PlainScales, StoredWeight


class StoredCompressedTensors(PlainScales):
    """Integers packed into int32, int8, or float8; a scale for a group, a row, a block or the whole weight."""

    scale_name = "weight_scale"

    @classmethod
    def find(cls, folder: CheckpointFolder, prefix: str, config: SGRQConfig) -> StoredWeight | None:
        scale, packed, plain = (f"{prefix}.{name}" for name in ("weight_scale", "weight_packed", "weight"))
        if scale not in folder or (packed not in folder and plain not in folder):
            return None
        layer = cls(folder, prefix)
        layer.set_trained_dtype(config)
        layer.code_name = "weight_packed" if packed in folder else "weight"
        stored = layer.tensor(layer.code_name)
        if f"{prefix}.weight_shape" in folder:
            shape = tuple(layer.tensor("weight_shape").tolist())
        else:
            shape = tuple(stored.shape)
        layer._set_geometry(geometry(shape, stored, layer.tensor("weight_scale"), _blocks(folder.quantization)))
        return layer

    def fingerprint_tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return digest_tensors(self.tensor(self.code_name), self.tensor(self.scale_name))


def _blocks(quantization: dict[str, Any]) -> list[tuple[int, int]]:
    groups = (quantization.get("config_groups") or {}).values()
    blocks = [(group.get("weights") or {}).get("block_structure") for group in groups]
    return [(int(block[0]), int(block[1])) for block in blocks if block]
