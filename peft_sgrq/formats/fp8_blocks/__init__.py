"""Fine-grained fp8, a scale for each block."""

from peft_sgrq.formats.fp8_blocks.stored import StoredFp8Blocks
from peft_sgrq.formats.fp8_blocks.weight import Fp8BlocksWeight

WEIGHTS = (Fp8BlocksWeight,)
STORED = (StoredFp8Blocks,)
