"""GPTQ, AWQ and AutoRound: integer codes packed into int32 words."""

from peft_sgrq.formats.int32_packed.autoround import AutoRoundWeight
from peft_sgrq.formats.int32_packed.awq import AWQWeight
from peft_sgrq.formats.int32_packed.gptq import GPTQWeight
from peft_sgrq.formats.int32_packed.stored import StoredAWQ, StoredGPTQ

WEIGHTS = (AutoRoundWeight, GPTQWeight, AWQWeight)  # AutoRound first: some of its kernels are GPTQModel's
STORED = (StoredAWQ, StoredGPTQ)
