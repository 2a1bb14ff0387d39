"""HQQ."""

from peft_sgrq.formats.hqq.weight import HQQWeight

WEIGHTS = (HQQWeight,)
STORED = ()
