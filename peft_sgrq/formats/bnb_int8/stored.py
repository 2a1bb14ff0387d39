"""bitsandbytes LLM.int8(): `weight` int8 `[N, K]` and `SCB` float32 `[N]`."""

from __future__ import annotations

from peft_sgrq.config import SGRQConfig
from peft_sgrq.files.folder import CheckpointFolder
from peft_sgrq.formats.selectable_unit import SelectableUnit
from peft_sgrq.formats.stored_weight import PlainScales, StoredWeight


class StoredBnbInt8(PlainScales):
    """One scale a row."""

    unit = SelectableUnit.ROW
    name = "bnb-int8-row"
    scale_name = "SCB"

    @classmethod
    def find(cls, folder: CheckpointFolder, prefix: str, config: SGRQConfig) -> StoredWeight | None:
        if f"{prefix}.SCB" not in folder or f"{prefix}.weight" not in folder:
            return None
        layer = cls(folder, prefix)
        layer.out_features, layer.in_features = folder.entry(f"{prefix}.weight").shape
        layer.group_size = layer.in_features
        return layer
