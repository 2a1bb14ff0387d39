"""transformers 5.23 cannot save a model that it loaded from a pre-quantized bitsandbytes checkpoint.

`save_pretrained` reverses the conversions recorded at load, and the ones that rebuilt the quantized weights have no
reverse: NotImplementedError. A quantized layer writes its stored layout by itself, so they need none.
`tests/base/test_upstream.py::test_transformers_still_cannot_save_a_prequantized_model` fails once this is not needed
any more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn


def drop_irreversible_conversions(model: nn.Module) -> None:
    """Forgets the load-time conversions of `model` that cannot be reversed, so that `save_pretrained` works."""
    drop_conversions(model, _is_irreversible)


def drop_conversions(model: nn.Module, dropped: Callable[[Sequence[Any]], bool]) -> None:
    """Forgets the load-time conversions of `model` whose operations are to be dropped: they are not reversed."""
    conversions: Any = getattr(model, "_weight_conversions", None)
    if conversions:
        kept: Any = [each for each in conversions if not dropped(getattr(each, "operations", None) or ())]
        model._weight_conversions = kept


def _is_irreversible(operations: Sequence[Any]) -> bool:
    try:
        for operation in operations:
            operation.reverse_op  # noqa: B018  (a property that raises where there is none)
    except NotImplementedError:
        return True
    return False
