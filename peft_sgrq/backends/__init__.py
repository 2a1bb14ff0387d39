"""Weight formats whose scales can be tuned; a layer of an unknown format has no backend."""

from __future__ import annotations

from torch import nn

from peft_sgrq.backends.autoround import AutoRoundBackend
from peft_sgrq.backends.awq import AWQBackend
from peft_sgrq.backends.base import ScaleBackend
from peft_sgrq.backends.bnb_4bit import Bnb4bitBackend
from peft_sgrq.backends.bnb_int8 import BnbInt8Backend
from peft_sgrq.backends.compressed_tensors import CompressedTensorsBackend
from peft_sgrq.backends.dense import DenseBackend
from peft_sgrq.backends.fp8_blocks import Fp8BlocksBackend
from peft_sgrq.backends.gptq import GPTQBackend
from peft_sgrq.backends.hqq import HQQBackend
from peft_sgrq.backends.quanto import QuantoBackend
from peft_sgrq.backends.torchao import TorchaoPlainBackend
from peft_sgrq.backends.torchao_int4 import TorchaoInt4Backend, TorchaoInt4PlainBackend
from peft_sgrq.backends.torchao_nvfp4 import TorchaoNVFP4Backend
from peft_sgrq.backends.torchao_refused import TorchaoRefusedBackend

SUPPORTED_LAYERS = (
    "torch.nn.Linear (dense, or with a torchao weight), transformers' Conv1D, bitsandbytes' Linear4bit and "
    "Linear8bitLt, the GPTQ and AWQ layers of GPTQModel, AutoRound's QuantLinear, HQQLinear, quanto's QLinear, "
    "compressed-tensors' layers and fine-grained fp8"
)

_QUANTIZED: tuple[type[ScaleBackend], ...] = (  # the first that matches is taken
    Bnb4bitBackend,
    BnbInt8Backend,
    CompressedTensorsBackend,
    Fp8BlocksBackend,
    AutoRoundBackend,  # before GPTQ: some of its kernels are GPTQModel's
    GPTQBackend,
    AWQBackend,
    TorchaoPlainBackend,
    TorchaoInt4Backend,
    TorchaoInt4PlainBackend,
    TorchaoNVFP4Backend,
    TorchaoRefusedBackend,
    HQQBackend,
    QuantoBackend,
)


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is a layer of a supported quantized format."""
    return any(backend.matches(module) for backend in _QUANTIZED)


def is_supported(module: nn.Module) -> bool:
    """Whether a module is a layer of any supported format, quantized or dense."""
    return is_quantized(module) or DenseBackend.matches(module)


def resolve_backend(module: nn.Module, group_size: int) -> ScaleBackend:
    """The backend of a layer.

    Args:
        module (`nn.Module`): A linear layer, quantized or dense.
        group_size (`int`): Columns per scale in a dense layer; a quantized one has its own.

    Raises:
        ValueError: If the layer is of no supported format, or of one but cannot be tuned. The sentence is a clause
            about the layer ("its weight is ..."), for the caller to put the layer's name in front of.
    """
    for backend in _QUANTIZED:
        if backend.matches(module):
            return backend(module)
    if DenseBackend.matches(module):
        return DenseBackend(module, group_size)
    raise ValueError(
        f"it is a {type(module).__module__}.{type(module).__qualname__}, expected one of {SUPPORTED_LAYERS}; name "
        "only such layers in `target_modules`, or list this one in `exclude_modules`"
    )


__all__ = ["SUPPORTED_LAYERS", "ScaleBackend", "is_quantized", "is_supported", "resolve_backend"]
