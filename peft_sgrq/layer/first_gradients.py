"""A check of training: each delta that takes part in a forward pass gets a gradient in the backward pass after it.

Something between a layer and the loss may drop its gradient without a word: a quantizer under `torch.no_grad()`, a
`detach`, a kernel without a backward pass. Deltas are watched until their first gradient, and cost nothing afterwards.
A layer whose output is still held, with the graph behind it, may get its gradient in a further backward pass, and is
waited for until the graph is gone, or two more forward passes have begun: something may hold it for good, as caches
of keys and values do. Not watched are frozen deltas, adapters that are not active, layers that did not
run (experts without tokens), layers that something runs without the whole PEFT model, and whatever `torch.compile`
compiles.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

_HELD = 2  # further forward passes that a held graph is waited for
_NAMED = 40  # layers in the error, all of those of a block or two, so that they can be excluded


@dataclass
class _Wait:
    delta: Any  # a `Delta`
    handle: Any  # of the hook on its weight
    backwards: int  # how many backward passes may end before the gradient is there
    node: weakref.ref[Any] | None  # of the graph; `None` if autograd did not record the forward pass
    inside: bool  # whether it ran inside of a backward pass, as reentrant checkpointing makes it
    arrived: bool = False

    @property
    def recorded(self) -> bool:
        return self.node is not None

    @property
    def gone(self) -> bool:
        """Whether no backward pass can reach the delta any more: nothing holds the graph of its forward pass."""
        return self.node is not None and self.node() is None


class FirstGradients:
    """What the layers of a model expect gradients for, from the first forward pass in training on."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[str, str], _Wait] = {}  # by layer and adapter
        self._tasks: set[int] = set()  # the backward passes at whose end there will be a look
        self._forwards = 0  # of the whole model, that no backward pass has followed yet
        self._in_forward = self._ended = False
        # The delta nearest to the loss. Once all others are watched no more, its gradient tells of a backward pass.
        self._witness: weakref.ref[Any] | None = None
        self._witness_handle: Any = None

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Open while the whole model computes in training.

        Raises:
            RuntimeError: If layers of an earlier pass ran under `torch.no_grad()` and never got a gradient, or their
                graph is gone since the backward pass, or held for long after it.
        """
        waiting = {key: wait for key, wait in self._waiting.items() if not wait.arrived}
        if self._ended:  # whatever reentrant checkpointing computed twice has its gradient now
            lost = [
                key
                for key, wait in waiting.items()
                if not wait.recorded or (wait.gone and wait.backwards <= 0) or wait.backwards <= 1 - _HELD
            ]
            for wait in waiting.values():
                wait.backwards -= wait.backwards <= 0
            self._raise(lost)
        else:  # no backward pass was made of what was computed last
            for key, wait in waiting.items():
                if wait.gone:
                    self._waiting.pop(key).handle.remove()
        self._forwards = self._forwards + 1 if self._waiting else 1
        self._in_forward, self._ended = True, False
        try:
            yield
        finally:
            self._in_forward = False

    def expect(self, layer: str, adapter: str, delta: Any, node: Any) -> None:
        """Notes that a delta took part in a forward pass, in training and before its first gradient.

        Args:
            layer (`str`): Name of the layer.
            adapter (`str`): Name of the adapter.
            delta (`Delta`): Its deltas, trainable.
            node (`torch.autograd.graph.Node` or `None`): What autograd recorded of the pass, a Python function's.
        """
        inside = torch._C._current_graph_task_id() != -1
        # Layers or blocks that something runs alone need not be followed by a backward pass.
        if not (self._in_forward or inside) or not delta.weight.is_leaf:
            return
        self._call_witness()
        known = self._waiting.get((layer, adapter))
        if known is not None and known.delta is delta and (known.recorded or node is None):
            return
        if known is not None:
            known.handle.remove()
        handle = delta.weight.register_post_accumulate_grad_hook(lambda _: self._arrive(layer, adapter))
        recorded = None if node is None else weakref.ref(node)
        self._waiting[layer, adapter] = _Wait(delta, handle, max(1, self._forwards), recorded, inside)

    def _call_witness(self) -> None:
        delta = None if self._witness is None else self._witness()
        if delta is not None and self._witness_handle is None and delta.weight.requires_grad and delta.weight.is_leaf:
            self._witness_handle = delta.weight.register_post_accumulate_grad_hook(lambda _: self._look_later(False))

    def _arrive(self, layer: str, adapter: str) -> None:
        wait = self._waiting.get((layer, adapter))
        if wait is None:
            return
        wait.arrived = wait.delta.has_had_gradient = True
        if self._witness is None and not wait.inside:
            self._witness = weakref.ref(wait.delta)
        self._look_later(wait.inside)

    def _look_later(self, inside: bool) -> None:
        task = torch._C._current_graph_task_id()
        if task not in self._tasks:
            self._tasks.add(task)
            # As torch's own data parallelism does it; there is no documented call.
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: self._end(task, inside))

    def _end(self, task: int, inside: bool) -> None:
        """At the end of a backward pass that has brought a first gradient."""
        self._tasks.discard(task)
        self._ended = True
        if not inside:
            if self._witness_handle is not None:
                self._witness_handle.remove()
                self._witness_handle = None
            self._forwards = max(0, self._forwards - 1)
        lost = []
        for key, wait in list(self._waiting.items()):
            if wait.arrived:
                wait.handle.remove()
                del self._waiting[key]
            elif wait.recorded and wait.inside == inside:
                wait.backwards -= 1
                if wait.backwards <= 0 and wait.gone:
                    lost.append(key)
        self._raise(lost)

    def _raise(self, lost: list[tuple[str, str]]) -> None:
        if not lost:
            return
        for key in lost:
            self._waiting.pop(key).handle.remove()
        names = list(dict.fromkeys(layer for layer, _ in lost))
        layers = ", ".join(map(repr, names[:_NAMED])) + (f" and {len(names) - _NAMED} more" * (len(names) > _NAMED))
        raise RuntimeError(
            f"No gradient reached the deltas of {len(names)} layers that ran in the forward pass ({layers}; adapter "
            f"{lost[0][1]!r}), expected one for each delta that is trained: either something between the layer and "
            "the loss drops it (torch.no_grad, detach, a kernel without a backward pass), and those before it get a "
            "wrong one, or the loss does not depend on the layer (a pooler, or the blocks behind the one whose output "
            "a vision tower gives). Mend the former; in the latter case leave the layers out, with these names as "
            "`exclude_modules`, or freeze their deltas with `requires_grad_(False)`."
        )

    def __getstate__(self) -> dict[str, Any]:
        return {}  # hooks are on tensors, which a copy does not share

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
