"""How each weight format lays a layer out in a checkpoint."""

from __future__ import annotations

from peft_sgrq.config import SGRQConfig
from peft_sgrq.files.folder import CheckpointFolder
from peft_sgrq.formats.bnb_4bit.stored import StoredBnb4bit
from peft_sgrq.formats.bnb_int8.stored import StoredBnbInt8
from peft_sgrq.formats.compressed_tensors.stored import StoredCompressedTensors
from peft_sgrq.formats.dense.stored import StoredDense
from peft_sgrq.formats.fp8_blocks.stored import StoredFp8Blocks
from peft_sgrq.formats.int32_packed.stored import StoredAWQ, StoredGPTQ
from peft_sgrq.formats.stored_weight import StoredWeight
from peft_sgrq.formats.torchao.stored import StoredTorchao

STORED_FORMATS: tuple[type[StoredWeight], ...] = (
    StoredBnb4bit,
    StoredBnbInt8,
    StoredAWQ,
    StoredGPTQ,
    StoredCompressedTensors,
    StoredFp8Blocks,
    StoredTorchao,
    StoredDense,
)


def find_layer(folder: CheckpointFolder, prefix: str, config: SGRQConfig) -> StoredWeight | None:
    """The layer whose tensors have names with this prefix, as the first layout that knows it; `None` if none does.

    Raises:
        ValueError: If its format is known but its scales cannot be tuned; a clause about the layer.
    """
    for layout in STORED_FORMATS:
        layer = layout.find(folder, prefix, config)
        if layer is not None:
            return layer
    return None
