"""bitsandbytes nf4 and fp4."""

from peft_sgrq.formats.bnb_4bit.stored import StoredBnb4bit
from peft_sgrq.formats.bnb_4bit.weight import Bnb4bitWeight

WEIGHTS = (Bnb4bitWeight,)
STORED = (StoredBnb4bit,)
