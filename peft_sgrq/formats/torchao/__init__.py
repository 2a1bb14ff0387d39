"""torchao."""

from peft_sgrq.formats.torchao.int4 import TorchaoInt4PlainWeight, TorchaoInt4Weight
from peft_sgrq.formats.torchao.nvfp4 import TorchaoNVFP4Weight
from peft_sgrq.formats.torchao.stored import StoredTorchao
from peft_sgrq.formats.torchao.weight import TorchaoPlainWeight, quantizing_code

WEIGHTS = (
    TorchaoInt4Weight,
    TorchaoInt4PlainWeight,
    TorchaoNVFP4Weight,
    TorchaoPlainWeight,  # and any other torchao tensor, to be refused
)
STORED = (StoredTorchao,)
QUANTIZING_CODE = quantizing_code
