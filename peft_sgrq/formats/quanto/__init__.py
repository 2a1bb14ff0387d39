"""optimum-quanto."""

from peft_sgrq.formats.quanto.weight import QuantoWeight, quantizing_code

WEIGHTS = (QuantoWeight,)
STORED = ()
QUANTIZING_CODE = quantizing_code
