"""Fine-tune a 4-bit model and get a 4-bit model back, bit for bit: a tuner for PEFT that trains quantization scales.

Importing this package registers the tuner type SGRQ with PEFT.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_sgrq.base.restore import restore_codes
    from peft_sgrq.base.split import split_groups
    from peft_sgrq.checkpoint.merge import merge_checkpoint
    from peft_sgrq.checkpoint.verify import verify_checkpoint
    from peft_sgrq.config import SGRQConfig
    from peft_sgrq.layer.linear import SGRQLinear
    from peft_sgrq.model import SGRQModel
    from peft_sgrq.plugin.registration import register
    from peft_sgrq.recovery.recover import Recovery, recover
    from peft_sgrq.selection.calibrate import calibrate
    from peft_sgrq.selection.layerwise.allocate_ratios import allocate_ratios
    from peft_sgrq.selection.saliency import Saliency

__version__ = "0.1.0"

__all__ = [
    "Recovery",
    "SGRQConfig",
    "SGRQLinear",
    "SGRQModel",
    "Saliency",
    "allocate_ratios",
    "calibrate",
    "merge_checkpoint",
    "recover",
    "register",
    "restore_codes",
    "split_groups",
    "verify_checkpoint",
]

_HOMES = {
    "Recovery": "recovery.recover",
    "SGRQConfig": "config",
    "SGRQLinear": "layer.linear",
    "SGRQModel": "model",
    "Saliency": "selection.saliency",
    "allocate_ratios": "selection.layerwise.allocate_ratios",
    "calibrate": "selection.calibrate",
    "merge_checkpoint": "checkpoint.merge",
    "recover": "recovery.recover",
    "register": "plugin.registration",
    "restore_codes": "base.restore",
    "split_groups": "base.split",
    "verify_checkpoint": "checkpoint.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _is_being_imported(name: str) -> bool:
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


# While bitsandbytes is being imported it is its entry point that imports this package: `_autoload` decides then.
_explicitly_imported = not _is_being_imported("bitsandbytes")
if _explicitly_imported:
    importlib.import_module(f"{__name__}.plugin.registration").register()
