"""optimum-quanto."""

from peft_sgrq.formats.quanto.weight import QuantoWeight

WEIGHTS = (QuantoWeight,)
STORED = ()
