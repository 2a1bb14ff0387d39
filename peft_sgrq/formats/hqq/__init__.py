"""HQQ."""

from peft_sgrq.formats.hqq.weight import HQQWeight, quantizing_code

WEIGHTS = (HQQWeight,)
STORED = ()
QUANTIZING_CODE = {"hqq": quantizing_code}
