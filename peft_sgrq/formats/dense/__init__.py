"""Weights that are not quantized."""

from peft_sgrq.formats.dense.stored import StoredDense
from peft_sgrq.formats.dense.weight import DenseWeight

WEIGHTS = (DenseWeight,)
STORED = (StoredDense,)
