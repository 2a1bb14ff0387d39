"""The columns of a layer's input that its backward pass needs, saved once for all layers that share the input.

Query, key and value projections get the same tensor, so do gate and up projections, and their selections overlap. The
first layer saves its selected columns; the next ones save only those that are not there yet. All together save no more
than the input itself, whatever each selects.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from peft_sgrq.formats.scaled_weight import ScaledWeight, gather_groups

_SAVED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # input -> `SavedInput`
_PLANS: dict[tuple[int, ...], tuple[tuple[torch.Tensor | None, ...], Plan]] = {}
_MAX_PLANS = 4096


class Part(NamedTuple):
    """Some of a layer's selected groups: in which saved piece their columns are, and where.

    Attributes:
        piece (`int`): Number of the piece, in the order of saving.
        positions (`torch.Tensor` or `None`): Where in the piece they are, int64; `None` if they are all of it.
        groups (`torch.Tensor` or `None`): Their indices in the layer, int64; `None` if they are all groups.
        targets (`torch.Tensor` or `None`): Their places among the layer's selected groups, int64; `None` if they are
            all of those.
    """

    piece: int
    positions: torch.Tensor | None
    groups: torch.Tensor | None
    targets: torch.Tensor | None


class Plan(NamedTuple):
    """What a layer saves when some groups are saved already, and how it finds its own.

    Attributes:
        saves (`bool`): Whether there is anything to save.
        new (`torch.Tensor` or `None`): The groups to save, int64; `None` for all of them: the input as it is.
        parts (`tuple[Part, ...]`): Where the layer's selected groups are then.
    """

    saves: bool
    new: torch.Tensor | None
    parts: tuple[Part, ...]


class _Piece(NamedTuple):
    groups: torch.Tensor | None
    columns: TensorWeakRef


class SavedInput:
    """The pieces of one input tensor that layers have saved for their backward passes.

    Only the graph keeps the pieces. Where hooks decide what it keeps (activation checkpointing, offloading) each
    layer saves its own: checkpointing compares what is saved by the first pass with what is saved by the second.
    """

    def __init__(self, state: tuple[object, ...] = ()) -> None:
        self.state = state
        self._pieces: dict[tuple[str, int, torch.dtype], list[_Piece]] = {}

    @classmethod
    def of(cls, x: torch.Tensor) -> SavedInput:
        """What is saved of a tensor; forgotten with the tensor, and when it changes.

        As anywhere in autograd a change through `.data` or a NumPy view goes unseen.
        """
        # The compiler decides itself what is kept; tensors made in inference mode count no versions.
        if torch.compiler.is_compiling() or x.is_inference():
            return cls()
        state = (x._version, x.data_ptr(), x.shape, x.stride())
        saved = _SAVED.get(x)
        if saved is None or saved.state != state:
            saved = _SAVED[x] = cls(state)
        return saved

    def save(
        self, x: torch.Tensor, groups: torch.Tensor | None, scaled_weight: ScaledWeight, dtype: torch.dtype
    ) -> tuple[list[torch.Tensor], tuple[Part, ...]]:
        """Saves what a layer needs and is not saved yet.

        Args:
            x (`torch.Tensor`): The input as the layer computes with it, `[..., K]`.
            groups (`torch.Tensor` or `None`): The groups the layer selects, int64 `[n]`; `None` for all.
            scaled_weight (`ScaledWeight`): The layer.
            dtype (`torch.dtype`): The dtype to save in, that of the layer's output.

        Returns:
            The saved pieces, `[T, columns]` each, and where the layer's groups are in them.
        """
        computed = scaled_weight.computed_input(x)  # layers may round it each in their own way
        alone = computed is not x or not scaled_weight.consecutive or not self.state
        if alone or torch.compiler.is_compiling() or _hooks_are_active():
            columns = scaled_weight.select_columns(computed, groups)
            return [columns.to(dtype)], (Part(0, None, groups, None),)
        pieces = self._pieces.setdefault((scaled_weight.name, scaled_weight.group_size, dtype), [])
        kept = [(piece.groups, there) for piece in pieces if (there := piece.columns()) is not None]
        plan = _plan([there for there, _ in kept], groups, scaled_weight.selectable)
        if plan.saves:
            rows = x.detach().reshape(-1, x.shape[-1])  # (T, K)
            kept.append((plan.new, _columns(rows, plan.new, scaled_weight).to(dtype)))
        pieces[:] = [_Piece(there, TensorWeakRef(columns)) for there, columns in kept]
        return [columns for _, columns in kept], plan.parts


def _hooks_are_active() -> bool:
    # A function torch uses itself and does not document; without it nothing is shared.
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(False) is not None


def columns_of(part: Part, piece: torch.Tensor, scaled_weight: ScaledWeight) -> torch.Tensor:
    """The columns of a part's groups, `[T, n * group_size]`; a partial last group is padded by zeros."""
    size = scaled_weight.group_size
    return gather_groups(piece, part.positions, -(-piece.shape[1] // size), size)


def _columns(x: torch.Tensor, groups: torch.Tensor | None, scaled_weight: ScaledWeight) -> torch.Tensor:
    """Columns of the groups, `[T, K]` -> `[T, columns]`, without padding: a partial last group stays partial."""
    if groups is None:
        return x
    size, width = scaled_weight.group_size, x.shape[1]
    columns = gather_groups(x, groups, scaled_weight.scales_shape[1], size)
    missing = scaled_weight.scales_shape[1] * size - width
    if missing and len(groups) and int(groups[-1]) == scaled_weight.selectable - 1:
        return columns[:, :-missing].contiguous()
    return columns


def _plan(kept: list[torch.Tensor | None], groups: torch.Tensor | None, selectable: int) -> Plan:
    # Selections are the same tensors at every step, so the plan is made once, without a look at their values later.
    tensors = (*kept, groups)
    key = (selectable, *map(id, tensors))
    known = _PLANS.get(key)
    if known is not None:
        return known[1]
    if len(_PLANS) >= _MAX_PLANS:
        _PLANS.clear()
    plan = _make_plan(kept, groups, selectable)
    _PLANS[key] = tensors, plan  # the tensors are kept, lest an id is used again
    return plan


def _make_plan(kept: list[torch.Tensor | None], groups: torch.Tensor | None, selectable: int) -> Plan:
    everything = range(selectable)
    own = list(everything) if groups is None else groups.tolist()
    place = {group: target for target, group in enumerate(own)}
    missing = dict.fromkeys(own)
    device = next((tensor.device for tensor in (groups, *kept) if tensor is not None), None)
    parts = []

    def index(values: list[int], complete: int) -> torch.Tensor | None:
        return None if values == list(range(complete)) else torch.tensor(values, device=device)

    def add_part(piece: int, there: list[int]) -> None:
        found = [(position, group) for position, group in enumerate(there) if group in missing]
        if found:
            for _, group in found:
                del missing[group]
            shared = [group for _, group in found]
            parts.append(
                Part(
                    piece,
                    index([position for position, _ in found], len(there)),
                    index(shared, selectable),
                    index([place[group] for group in shared], len(own)),
                )
            )

    for piece, tensor in enumerate(kept):
        add_part(piece, list(everything) if tensor is None else tensor.tolist())
    new = list(missing)
    add_part(len(kept), new)
    if not kept:  # the layer's own index tensor, so that a layer which selects the same has the same plan
        return Plan(True, groups, tuple(part._replace(groups=groups) for part in parts))
    return Plan(bool(new), index(new, selectable), tuple(parts))
