"""Which scales are trained: criteria give scores, a ratio gives how many, a mask stores the choice."""

from peft_sgrq.selection.criteria import magnitude
from peft_sgrq.selection.masks import decode_mask, encode_mask
from peft_sgrq.selection.ratio import count_selected, select_top

__all__ = ["count_selected", "decode_mask", "encode_mask", "magnitude", "select_top"]
