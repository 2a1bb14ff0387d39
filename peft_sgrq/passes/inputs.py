"""Statistics of the inputs of layers, taken by hooks while a model or a block of it runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from peft_sgrq.formats.scaled_weight import ScaledWeight
from peft_sgrq.passes.data import Batch
from peft_sgrq.passes.padding import Padding
from peft_sgrq.passes.processes import gather, sum_over_processes
from peft_sgrq.passes.statistics import InputStatistics

_RECENT = 4  # inputs remembered to see which layers share one; such layers are called soon after one another


class SharingBrokenError(RuntimeError):
    """Layers that shared an input in one batch had different inputs in a later one."""


class InputCollector:
    """Collects statistics of the inputs of some layers; those with the same input share them.

    Args:
        scaled_weights (`dict[str, ScaledWeight]`): The layers by name, in the order of the model.
        padding (`Padding`): What takes padding out of inputs.
        full (`bool`): Keep whole Hessians, as in [`InputStatistics`].
        share (`bool`): Whether layers with the same input share statistics.

    Attributes:
        statistics (`dict[str, InputStatistics]`): By name, for the layers that have run; after [`reduce`] for all.
    """

    def __init__(
        self, scaled_weights: Mapping[str, ScaledWeight], padding: Padding, full: bool, share: bool = True
    ) -> None:
        self.statistics: dict[str, InputStatistics] = {}
        self._scaled_weights, self._padding, self._full, self._share = scaled_weights, padding, full, share
        self._broken = False
        self._new: set[InputStatistics] = set()  # made in this batch
        self._inputs: dict[InputStatistics, int] = {}  # how many each has had in this batch
        self._seen: dict[str, int] = {}  # how many each layer has had
        self._recent: deque[tuple[torch.Tensor, int, InputStatistics]] = deque(maxlen=_RECENT)

    @contextmanager
    def batch(self, batch: Batch) -> Iterator[None]:
        """While this is open the layers' inputs are those of a batch."""

        def hook(name: str) -> Any:
            return lambda module, args, kwargs: self._take(name, (*args, *kwargs.values())[0], batch)

        with ExitStack() as stack:
            for name, scaled_weight in self._scaled_weights.items():
                stack.callback(scaled_weight.module.register_forward_pre_hook(hook(name), with_kwargs=True).remove)
            yield
        # Each layer must have had all the inputs that its statistics have.
        self._broken |= any(
            self._inputs.get(own, 0) != self._seen.get(name, 0) for name, own in self.statistics.items()
        )
        for remembered in (self._new, self._inputs, self._seen, self._recent):
            remembered.clear()

    def _take(self, name: str, x: torch.Tensor, batch: Batch) -> None:
        self._seen[name] = self._seen.get(name, 0) + 1
        shared = self._find_shared(x) if self._share else None
        own = self.statistics.get(name)
        if own is None:
            own = shared if shared in self._new else InputStatistics(x.shape[-1], self._full, x.device)
            self._new.add(own)
            self.statistics[name] = own
        if shared is own:
            return
        own.update(self._padding.remove(x, self._scaled_weights[name].module, batch).detach())
        self._inputs[own] = self._inputs.get(own, 0) + 1
        self._recent.append((x, x._version, own))  # holding the tensor, its memory is not given to another

    def _find_shared(self, x: torch.Tensor) -> InputStatistics | None:
        for seen, version, statistics in self._recent:
            view = (seen.data_ptr(), seen.shape, seen.stride()) == (x.data_ptr(), x.shape, x.stride())
            if (seen is x or view) and version == x._version:
                return statistics
        return None

    def reduce(self) -> None:
        """Sums the statistics over all processes.

        Raises:
            SharingBrokenError: On all processes, if on one of them layers that shared an input later did not.
        """
        if any(gather(self._broken)):
            raise SharingBrokenError
        mine = [sorted(names) for names in self.shared().values()]
        if any(theirs != mine for theirs in gather(mine)):
            for names in self.shared().values():
                for name in names[1:]:
                    self.statistics[name] = self.statistics[name].copy()
        for name, scaled_weight in self._scaled_weights.items():
            if name not in self.statistics:  # a layer that no token has come to, such as an expert
                self.statistics[name] = InputStatistics(scaled_weight.in_features, self._full, scaled_weight.device)
        ordered = dict.fromkeys(self.statistics[name] for name in self._scaled_weights)
        sum_over_processes(tensor for one in ordered for tensor in (one.total, one.tokens))

    def shared(self) -> dict[InputStatistics, list[str]]:
        """Statistics -> the layers they are of."""
        found: dict[InputStatistics, list[str]] = {}
        for name in self._scaled_weights:
            if name in self.statistics:
                found.setdefault(self.statistics[name], []).append(name)
        return found
