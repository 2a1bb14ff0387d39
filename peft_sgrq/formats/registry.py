"""Weight formats whose scales can be tuned; a layer of an unknown format has no scaled weight."""

from __future__ import annotations

from torch import nn

from peft_sgrq.formats.bnb_4bit.weight import Bnb4bitWeight
from peft_sgrq.formats.bnb_int8.weight import BnbInt8Weight
from peft_sgrq.formats.compressed_tensors.weight import CompressedTensorsWeight
from peft_sgrq.formats.dense.weight import DenseWeight
from peft_sgrq.formats.fp8_blocks.weight import Fp8BlocksWeight
from peft_sgrq.formats.hqq.weight import HQQWeight
from peft_sgrq.formats.int32_packed.autoround import AutoRoundWeight
from peft_sgrq.formats.int32_packed.awq import AWQWeight
from peft_sgrq.formats.int32_packed.gptq import GPTQWeight
from peft_sgrq.formats.quanto.weight import QuantoWeight
from peft_sgrq.formats.scaled_weight import ScaledWeight
from peft_sgrq.formats.torchao.int4 import TorchaoInt4PlainWeight, TorchaoInt4Weight
from peft_sgrq.formats.torchao.nvfp4 import TorchaoNVFP4Weight
from peft_sgrq.formats.torchao.refused import TorchaoRefusedWeight
from peft_sgrq.formats.torchao.weight import TorchaoPlainWeight

SUPPORTED_LAYERS = (
    "torch.nn.Linear (dense, or with a torchao weight), transformers' Conv1D, bitsandbytes' Linear4bit and "
    "Linear8bitLt, the GPTQ and AWQ layers of GPTQModel, AutoRound's QuantLinear, HQQLinear, quanto's QLinear, "
    "compressed-tensors' layers and fine-grained fp8"
)

_QUANTIZED: tuple[type[ScaledWeight], ...] = (  # the first that matches is taken
    Bnb4bitWeight,
    BnbInt8Weight,
    CompressedTensorsWeight,
    Fp8BlocksWeight,
    AutoRoundWeight,  # before GPTQ: some of its kernels are GPTQModel's
    GPTQWeight,
    AWQWeight,
    TorchaoPlainWeight,
    TorchaoInt4Weight,
    TorchaoInt4PlainWeight,
    TorchaoNVFP4Weight,
    TorchaoRefusedWeight,
    HQQWeight,
    QuantoWeight,
)


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is a layer of a supported quantized format."""
    return any(scaled_weight.matches(module) for scaled_weight in _QUANTIZED)


def is_supported(module: nn.Module) -> bool:
    """Whether a module is a layer of any supported format, quantized or dense."""
    return is_quantized(module) or DenseWeight.matches(module)


def resolve_weight(module: nn.Module, group_size: int) -> ScaledWeight:
    """The scaled weight of a layer.

    Args:
        module (`nn.Module`): A linear layer, quantized or dense.
        group_size (`int`): Columns per scale in a dense layer; a quantized one has its own.

    Raises:
        ValueError: If the layer is of no supported format, or of one but cannot be tuned. The sentence is a clause
            about the layer ("its weight is ..."), for the caller to put the layer's name in front of.
    """
    for scaled_weight in _QUANTIZED:
        if scaled_weight.matches(module):
            return scaled_weight(module)
    if DenseWeight.matches(module):
        return DenseWeight(module, group_size)
    raise ValueError(
        f"it is a {type(module).__module__}.{type(module).__qualname__}, expected one of {SUPPORTED_LAYERS}; name "
        "only such layers in `target_modules`, or list this one in `exclude_modules`"
    )
