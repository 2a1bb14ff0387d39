"""Which models can neither be rotated nor quantized here."""

from __future__ import annotations

from torch import nn

from peft_sgrq.base.workarounds.dropped_rotations import refuse_dropped_rotations
from peft_sgrq.layer.base_layers import refuse_unless_dense


def refuse_model(model: nn.Module, what: str) -> None:
    """Refuses a model that is not dense, or lost its online rotations, or has experts; `what` is asked for.

    Raises:
        ValueError: If it is such a model; the sentence names what is in the way.
    """
    refuse_unless_dense(model, what)
    refuse_dropped_rotations(model)
    for name, module in model.named_modules():
        if "Conv" not in type(module).__name__:
            for own, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3:  # as transformers 5 keeps mixtures of experts
                    raise ValueError(
                        f"{name}.{own} holds the weights of several experts as one parameter, expected linear layers; "
                        f"{what} a model without experts, or use another tool."
                    )
