"""What the model beneath needs done to it before its scales are read, and when they have been written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from peft_sgrq.base.workarounds.awq_scale_dtype import keep_awq_scales
from peft_sgrq.base.workarounds.bnb_cpu_packing import disable_cpu_packing
from peft_sgrq.base.workarounds.dropped_rotations import refuse_dropped_rotations
from peft_sgrq.base.workarounds.gptq_zero_points import save_zero_points_as_loaded
from peft_sgrq.base.workarounds.loading_attributes import forget_loading_attributes
from peft_sgrq.base.workarounds.transformers_save import drop_irreversible_conversions
from peft_sgrq.formats.bnb_4bit.nesting import nested_layers, note_unnested


def prepare_base(model: nn.Module) -> None:
    """Undoes and prevents what libraries do to the layers of a model that changes their scales or loses gradients.

    Raises:
        ValueError: If the model lost rotations when it was loaded.
    """
    refuse_dropped_rotations(model)
    disable_cpu_packing(model)
    keep_awq_scales(model)


@contextmanager
def writing_scales(model: nn.Module, what: str, nested: Mapping[str, int] | None = None) -> Iterator[None]:
    """Scales are written while this is open; at the end the model's config is true, and the model can be saved.

    Args:
        model (`nn.Module`): The model.
        what (`str`): What writes them, to begin a sentence with, such as `"Merging"`.
        nested (`Mapping` or `None`): What `nested_layers` says of the model without adapters; asked here if `None`.
    """
    before = nested_layers(model) if nested is None else dict(nested)
    yield
    note_unnested(model, before, what)
    forget_loading_attributes(model)
    drop_irreversible_conversions(model)
    save_zero_points_as_loaded(model)
