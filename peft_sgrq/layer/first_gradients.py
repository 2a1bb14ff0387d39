"""A check of training: each delta that takes part in a forward pass gets a gradient in the backward pass after it.

Something between a layer and the loss may drop its gradient without a word: a quantizer under `torch.no_grad()`, a
`detach`, a kernel without a backward pass. Deltas are watched until their first gradient, and cost nothing afterwards.
A layer whose output is still held, with the graph behind it, may get its gradient in a further backward pass, and is
waited for until the graph is gone, or two more forward passes have begun: something may hold it for good, as caches
of keys and values do. A backward pass to some tensors alone (`inputs=`) says nothing of the others. Not watched are
frozen deltas, adapters that are not active, layers that did not run (experts without tokens; `read_weights.py` tells
those that a model passes by), layers that something runs without the whole model, and whatever `torch.compile`
compiles.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peft_sgrq.layer.read_weights import ReadWeights

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
        self._in_forward = self._ended = self._called = False
        self._open: bool | None = None  # whether the pass that is open is one of training
        self._partial: set[int] = set()  # backward passes to some tensors alone
        self._last: weakref.ref[Any] | None = None  # of the graph, what the last layer that ran recorded
        self.read_weights = ReadWeights()
        # The delta nearest to the loss. Once all others are watched no more, its gradient tells of a backward pass.
        self._witness: weakref.ref[Any] | None = None
        self._witness_handle: Any = None

    @classmethod
    def of(cls, model: nn.Module) -> FirstGradients:
        """That of a model, which looks on whenever the model is called, by PEFT or without (`inject_adapter`)."""
        for hook in model._forward_pre_hooks.values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, FirstGradients):
                return owner
        made = cls()
        model.register_forward_pre_hook(made._before)
        model.register_forward_hook(made._after, always_call=True)
        return made

    @classmethod
    def forget(cls, model: nn.Module) -> None:
        """Looks on no more."""
        for hooks in (model._forward_pre_hooks, model._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), cls)]:
                del hooks[key]
                model._forward_hooks_always_called.pop(key, None)

    def _before(self, model: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling() and self._open is None:
            self._begin(model.training and torch.is_grad_enabled())
            self._called = True

    def _after(self, model: nn.Module, args: Any, output: Any) -> None:
        if self._called:
            self._called = False
            self._end_forward(judge=output is not None)

    @contextmanager
    def forward_pass(self, training: bool) -> Iterator[None]:
        """Open while the whole model computes.

        Args:
            training (`bool`): Whether the model is in training mode.

        Raises:
            RuntimeError: In training, if layers of an earlier pass ran under `torch.no_grad()` and never got a
                gradient, or their graph is gone since the backward pass, or held for long after it; or if the model
                computed with the weight of a layer past its adapter.
        """
        self._begin(training and torch.is_grad_enabled())
        done = False
        try:
            yield
            done = True
        finally:
            self._end_forward(judge=done)

    def _begin(self, trains: bool) -> None:
        if trains:
            self._look_back()
            self._ended = False
        self.read_weights.begin()
        self._open, self._in_forward = trains, trains

    def _end_forward(self, judge: bool) -> None:
        trained, self._open, self._in_forward = self._open, None, False
        if judge:
            self.read_weights.end(trains=bool(trained))

    def _look_back(self) -> None:
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

    def note(self, node: Any) -> None:
        """Notes what autograd recorded of a layer that runs in training, whether its gradient is waited for or not."""
        if self._waiting and node is not None:
            self._last = weakref.ref(node)

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

    def _goes_to_some(self) -> bool:
        """Whether the backward pass that runs does not go to all that its graph reaches: one with `inputs=`."""
        recorded = [self._last, *(wait.node for wait in self._waiting.values())]
        found = [node() for node in recorded if node is not None]
        nodes = {node for node in found if node is not None and _is_run(node)}
        left = list(nodes)
        while left:
            for node, _ in left.pop().next_functions:
                if node is None or node in nodes:
                    continue
                if not _is_run(node):
                    return True
                nodes.add(node)
                left.append(node)
        return False

    def _look_later(self, inside: bool) -> None:
        task = torch._C._current_graph_task_id()
        if task not in self._tasks:
            self._tasks.add(task)
            if self._goes_to_some():
                self._partial.add(task)
            # As torch's own data parallelism does it; there is no documented call.
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: self._end(task, inside))

    def _end(self, task: int, inside: bool) -> None:
        """At the end of a backward pass that has brought a first gradient."""
        self._tasks.discard(task)
        if task in self._partial:  # those it did not go to wait for their own
            self._partial.discard(task)
            for key in [key for key, wait in self._waiting.items() if wait.arrived]:
                self._waiting.pop(key).handle.remove()
            return
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


def _is_run(node: Any) -> bool:
    """Whether the backward pass that runs comes to a node."""
    return bool(torch._C._will_engine_execute_node(node))
