"""Fine-tune a 4-bit model and get a 4-bit model back, bit for bit: a tuner for PEFT that trains quantization scales.

Importing this package registers the tuner type SGRQ with PEFT.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_sgrq.base.precision import compute_in as compute_in
    from peft_sgrq.base.precision import fast_dtype as fast_dtype
    from peft_sgrq.base.restore import restore_codes as restore_codes
    from peft_sgrq.base.split import split_groups as split_groups
    from peft_sgrq.base.workarounds.trainer_refusal import allow_quantized_training as allow_quantized_training
    from peft_sgrq.checkpoint.merge import MergeReport as MergeReport
    from peft_sgrq.checkpoint.merge import merge_checkpoint as merge_checkpoint
    from peft_sgrq.checkpoint.verify import VerifyReport as VerifyReport
    from peft_sgrq.checkpoint.verify import verify_checkpoint as verify_checkpoint
    from peft_sgrq.config import SGRQConfig as SGRQConfig
    from peft_sgrq.formats.gguf.dense_weights import keep_dense as keep_dense
    from peft_sgrq.formats.gguf.loading import load_gguf as load_gguf
    from peft_sgrq.formats.gguf.quantizer import SGRQGgufConfig as SGRQGgufConfig
    from peft_sgrq.formats.gguf.saving import save_gguf as save_gguf
    from peft_sgrq.layer.linear import SGRQLinear as SGRQLinear
    from peft_sgrq.model import SGRQModel as SGRQModel
    from peft_sgrq.plugin.registration import register as register
    from peft_sgrq.recovery.recover import Recovery as Recovery
    from peft_sgrq.recovery.recover import recover as recover
    from peft_sgrq.rotation.allocate_bits import allocate_bits as allocate_bits
    from peft_sgrq.rotation.bit_plan import BitPlan as BitPlan
    from peft_sgrq.rotation.online import load_rotated as load_rotated
    from peft_sgrq.rotation.quantize import quantize as quantize
    from peft_sgrq.rotation.rotate import rotate as rotate
    from peft_sgrq.rotation.rotations import Rotations as Rotations
    from peft_sgrq.selection.calibrate import calibrate as calibrate
    from peft_sgrq.selection.criteria import LayerStatistics as LayerStatistics
    from peft_sgrq.selection.layerwise.allocate_ratios import allocate_ratios as allocate_ratios
    from peft_sgrq.selection.saliency import Saliency as Saliency

__version__ = "0.1.0"

_HOMES = {  # public name -> the module it is imported from when it is asked for
    "BitPlan": "rotation.bit_plan",
    "LayerStatistics": "selection.criteria",
    "MergeReport": "checkpoint.merge",
    "Recovery": "recovery.recover",
    "Rotations": "rotation.rotations",
    "SGRQConfig": "config",
    "SGRQGgufConfig": "formats.gguf.quantizer",
    "SGRQLinear": "layer.linear",
    "SGRQModel": "model",
    "Saliency": "selection.saliency",
    "VerifyReport": "checkpoint.verify",
    "allocate_bits": "rotation.allocate_bits",
    "allocate_ratios": "selection.layerwise.allocate_ratios",
    "allow_quantized_training": "base.workarounds.trainer_refusal",
    "calibrate": "selection.calibrate",
    "compute_in": "base.precision",
    "fast_dtype": "base.precision",
    "keep_dense": "formats.gguf.dense_weights",
    "load_gguf": "formats.gguf.loading",
    "load_rotated": "rotation.online",
    "merge_checkpoint": "checkpoint.merge",
    "quantize": "rotation.quantize",
    "recover": "recovery.recover",
    "register": "plugin.registration",
    "restore_codes": "base.restore",
    "rotate": "rotation.rotate",
    "save_gguf": "formats.gguf.saving",
    "split_groups": "base.split",
    "verify_checkpoint": "checkpoint.verify",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _is_command() -> bool:
    return os.path.splitext(os.path.basename((getattr(sys, "argv", None) or [""])[0]))[0] == "peft-sgrq"


# While bitsandbytes is being imported it is its entry point that imports this package; `plugin.autoload` decides then.
# The command registers when it knows what to do: `--help` is at once.
if not (getattr(getattr(sys.modules.get("bitsandbytes"), "__spec__", None), "_initializing", False) or _is_command()):
    import_module(f"{__name__}.plugin.registration").register()
