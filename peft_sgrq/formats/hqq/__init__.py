"""HQQ."""

from peft_sgrq.formats.hqq.weight import HQQWeight, quantizing_code

WEIGHTS = (HQQWeight,)
STORED = ()
QUANTIZING_CODE = quantizing_code
