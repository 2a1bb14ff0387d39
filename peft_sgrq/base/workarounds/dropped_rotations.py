"""transformers loads a model without the online rotations it was saved with; such a model is not the one it was.

`test_transformers_still_drops_online_rotations` fails once this is not needed any more.
"""

from __future__ import annotations

from torch import nn

FIELD = "online_rotations"  # of the config of a model that has some


def has_online_rotations(model: nn.Module) -> bool:
    """Whether a model computes with online rotations of compressed-tensors."""
    return any(type(module).__name__ == "HadamardTransform" for module in model.modules())


def refuse_dropped_rotations(model: nn.Module) -> None:
    """Raises a ValueError if a model was saved with online rotations and does not have them."""
    if getattr(getattr(model, "config", None), FIELD, None) and not has_online_rotations(model):
        raise ValueError(
            "The model was saved with online rotations, which transformers dropped when it loaded it, so that it "
            "computes something else; load it with `peft_sgrq.load_rotated`."
        )
