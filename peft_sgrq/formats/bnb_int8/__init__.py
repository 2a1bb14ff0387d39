"""bitsandbytes int8."""

from peft_sgrq.formats.bnb_int8.stored import StoredBnbInt8
from peft_sgrq.formats.bnb_int8.weight import BnbInt8Weight

WEIGHTS = (BnbInt8Weight,)
STORED = (StoredBnbInt8,)
