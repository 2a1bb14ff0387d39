"""bitsandbytes LLM.int8(): `weight` int8 `[N, K]` and `SCB` float32 `[N]`."""

from __future__ import annotations

from peft_sgrq.config import SGRQConfig
from peft_sgrq.formats.selectable_unit import SelectableUnit
from peft_sgrq.formats.stored_weight import PlainScales


class StoredBnbInt8(PlainScales):
    """One scale a row."""

    unit = SelectableUnit.ROW
    name = "bnb-int8-row"
    scale_name = "SCB"
    needed = ("SCB", "weight")

    def measure(self, config: SGRQConfig) -> bool:
        self.out_features, self.in_features = self.folder.entry(self.key("weight")).shape
        self.group_size = self.in_features
        return True
