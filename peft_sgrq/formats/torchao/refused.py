"""torchao layouts whose scales cannot be tuned, each with the reason."""

from __future__ import annotations

from torch import nn

from peft_sgrq.formats.torchao.weight import TorchaoWeight, weight_type

_REASONS = {
    "MXTensor": (
        "its scales are powers of two (an MX format), so a scale can only double or halve and no change that is "
        "learnt survives the merge; quantize to NVFP4 or int4"
    ),
    "Int4PreshuffledTensor": (
        "its codes and scales are shuffled for one kernel; quantize with another `int4_packing_format`"
    ),
    "IntxOpaqueTensor": "its codes and scales are packed for one kernel; quantize with `unpacked_to_int8`",
}


class TorchaoRefusedWeight(TorchaoWeight):
    """Any other torchao tensor: a layer of a quantized format, and one that is refused with a sentence."""

    def __new__(cls, module: nn.Module) -> TorchaoRefusedWeight:
        kind = weight_type(module) or ""
        raise ValueError(
            _REASONS.get(
                kind,
                f"its weight is torchao's {kind}, expected Int8Tensor, IntxUnpackedToInt8Tensor, Float8Tensor, "
                "NVFP4Tensor, Int4OpaqueTensor or Int4TilePackedTo4dTensor; quantize with a config that makes one",
            )
            + ", or leave the layer out with `exclude_modules`"
        )

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return weight_type(module) is not None
