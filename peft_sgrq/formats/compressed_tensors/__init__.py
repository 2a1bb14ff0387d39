"""compressed-tensors."""

from peft_sgrq.formats.compressed_tensors.stored import StoredCompressedTensors
from peft_sgrq.formats.compressed_tensors.weight import CompressedTensorsWeight

WEIGHTS = (CompressedTensorsWeight,)
STORED = (StoredCompressedTensors,)
