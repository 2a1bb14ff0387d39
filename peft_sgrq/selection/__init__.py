"""Which scales are trained: criteria give scores, a ratio gives how many, a mask stores the choice."""

from peft_sgrq.layer.masks import decode_mask, encode_mask
from peft_sgrq.selection.by_weights import select_without_data
from peft_sgrq.selection.layer_saliency import LayerSaliency
from peft_sgrq.selection.ratio import count_selected, knee, select_top
from peft_sgrq.selection.saliency import Saliency

__all__ = [
    "LayerSaliency",
    "Saliency",
    "count_selected",
    "decode_mask",
    "encode_mask",
    "knee",
    "select_top",
    "select_without_data",
]
