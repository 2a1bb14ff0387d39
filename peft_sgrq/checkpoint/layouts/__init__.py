"""How each weight format lays a layer out in a checkpoint."""

from __future__ import annotations

from peft_sgrq.checkpoint.folder import CheckpointFolder
from peft_sgrq.checkpoint.layouts.base import StoredLayer
from peft_sgrq.checkpoint.layouts.bnb_4bit import Bnb4bitLayer
from peft_sgrq.checkpoint.layouts.bnb_int8 import BnbInt8Layer
from peft_sgrq.checkpoint.layouts.compressed_tensors import CompressedTensorsLayer
from peft_sgrq.checkpoint.layouts.dense import DenseLayer
from peft_sgrq.checkpoint.layouts.fp8_blocks import Fp8BlocksLayer
from peft_sgrq.checkpoint.layouts.int32_packed import AwqLayer, GptqLayer
from peft_sgrq.checkpoint.layouts.torchao import TorchaoLayer
from peft_sgrq.config import SGRQConfig

LAYOUTS: tuple[type[StoredLayer], ...] = (
    Bnb4bitLayer,
    BnbInt8Layer,
    AwqLayer,
    GptqLayer,
    CompressedTensorsLayer,
    Fp8BlocksLayer,
    TorchaoLayer,
    DenseLayer,
)


def find_layer(folder: CheckpointFolder, prefix: str, config: SGRQConfig) -> StoredLayer | None:
    """The layer whose tensors have names with this prefix, as the first layout that knows it; `None` if none does.

    Raises:
        ValueError: If its format is known but its scales cannot be tuned; a clause about the layer.
    """
    for layout in LAYOUTS:
        layer = layout.find(folder, prefix, config)
        if layer is not None:
            return layer
    return None


__all__ = ["LAYOUTS", "StoredLayer", "find_layer"]
