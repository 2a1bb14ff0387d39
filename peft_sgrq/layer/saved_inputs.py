"""The columns of a layer's input that its backward pass needs.

A layer that trains all of its groups saves its input as it is, which costs nothing where it is the tensor that query,
key and value projections share, or gate and up projections. Where the format casts it first, they share the cast of
the first of them. A layer that trains some of its groups saves their columns.
"""

from __future__ import annotations

import torch
from torch.utils.weak import TensorWeakRef

from peft_sgrq.formats.scaled_weight import ScaledWeight

# The last input that was cast, what it was, and the cast; weak, so the graph alone keeps tensors.
_last_cast: tuple[TensorWeakRef, tuple[object, ...], TensorWeakRef] | None = None


class SavedInput:
    """What layers save of one input tensor.

    Args:
        source (`torch.Tensor` or `None`): The tensor the layers are given, before any cast; `None` shares nothing.
    """

    def __init__(self, source: torch.Tensor | None = None) -> None:
        self._source = source

    def save(
        self, x: torch.Tensor, units: torch.Tensor | None, scaled_weight: ScaledWeight, dtype: torch.dtype
    ) -> torch.Tensor:
        """What a layer has to keep of its input.

        Args:
            x (`torch.Tensor`): The input as the layer computes with it, `[..., K]`.
            units (`torch.Tensor` or `None`): The groups the layer selects, int64 `[n]`; `None` for all.
            scaled_weight (`ScaledWeight`): The layer.
            dtype (`torch.dtype`): The dtype to save in, that of the layer's output.

        Returns:
            `torch.Tensor`: `[T, K]`, or the columns of the selected groups, `[T, n * group_size]`.
        """
        computed = scaled_weight.computed_input(x)
        if units is not None:
            return scaled_weight.select_columns(computed.detach(), units).to(dtype)
        rows = computed.detach().reshape(-1, x.shape[-1])  # (T, K)
        rounded = computed is not x or scaled_weight.rounds_input  # by each layer in its own way
        if rounded or (x is self._source and x.dtype == dtype):
            return rows.to(dtype)
        return self._shared(rows, dtype)

    def _shared(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        global _last_cast
        source = self._source
        # The compiler decides itself what is kept; tensors made in inference mode count no versions.
        if source is None or torch.compiler.is_compiling() or source.is_inference():
            return rows.to(dtype)
        state = (source._version, source.data_ptr(), source.shape, source.stride(), rows.dtype, dtype)
        if _last_cast is not None:
            last, last_state, cast = _last_cast
            kept = cast() if last() is source and last_state == state else None
            if kept is not None:
                return kept
        kept = rows.to(dtype)
        _last_cast = TensorWeakRef(source), state, TensorWeakRef(kept)
        return kept
