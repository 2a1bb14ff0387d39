"""What it costs to round a layer to a width: by the Fisher information, by measured losses, or by its outputs.

Layer-Wise High-Impact Parameter Ratio Optimization (arXiv 2511.17801) measures the loss with single layers and pairs
of layers of a block at few bits. The same by one backward pass over the data is the second-order model of the loss
with the Fisher information for its curvature: for a change `D` of a weight and the gradient `g` of a sequence of `T`
labels, `a = <g, D>` and the change of the loss is about `E[a] + (E[a]^2 + T Var[a]) / 2`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from peft_sgrq.passes.running import loss_of
from peft_sgrq.passes.untouched import untouched
from peft_sgrq.rotation.rounding import rounded_weight, weight_scales
from peft_sgrq.rotation.scheme import Scheme
from peft_sgrq.selection.layerwise.probe import Row, count_labels, mean_loss, run_row

Units = Sequence[Sequence[str]]
Pairs = dict[tuple[int, int], NDArray[np.float64]]


class Rounding:
    """The layers of a model at several widths: scales are kept, weights are rounded when they are asked for."""

    def __init__(self, layers: Mapping[str, nn.Linear], widths: Sequence[int], scheme: Scheme) -> None:
        self.layers, self.widths, self._scheme = layers, widths, scheme
        self._scales = {
            (name, width): weight_scales(layer.weight.detach(), self._args(name, width))
            for name, layer in layers.items()
            for width in widths
        }

    def _args(self, name: str, width: int) -> Any:
        return self._scheme.weight_args(width, self._scheme.by_row(self.layers[name].in_features))

    def weight(self, name: str, width: int) -> torch.Tensor:
        """A layer's weight at a width."""
        return rounded_weight(self.layers[name].weight.detach(), *self._scales[name, width], self._args(name, width))

    @contextmanager
    def applied(self, widths: Mapping[str, int]) -> Iterator[None]:
        """While this is open some layers compute with rounded weights."""
        kept = {name: self.layers[name].weight.data for name in widths}
        try:
            for name, width in widths.items():
                self.layers[name].weight.data = self.weight(name, width)
            yield
        finally:
            for name, weight in kept.items():
                self.layers[name].weight.data = weight


def by_fisher(
    model: nn.Module, rounding: Rounding, units: Units, rows: Sequence[Row], tick: Callable[[], object]
) -> list[NDArray[np.float64]]:
    """For each unit, what each width changes the loss by, to second order; one backward pass a row."""
    slopes = {name: np.zeros((len(rows), len(rounding.widths))) for name in rounding.layers}
    weights: dict[torch.Tensor, list[str]] = {}  # of several layers where they are tied: each has its share
    for name, layer in rounding.layers.items():
        weights.setdefault(layer.weight, []).append(name)
    current = [0]  # the row

    def take(names: list[str]) -> Callable[[torch.Tensor], None]:
        def hook(parameter: torch.Tensor) -> None:
            gradient: Any = parameter.grad
            own = parameter.detach()
            for index, width in enumerate(rounding.widths):
                change = rounding.weight(names[0], width).double() - own.double()
                slope = float((gradient.double() * change).sum())
                for name in names:
                    slopes[name][current[0], index] += slope / len(names)
            parameter.grad = None  # one gradient is in memory at a time

        return hook

    with _gradients_of(model, weights), untouched(model), torch.enable_grad(), ExitStack() as stack:
        for weight, names in weights.items():
            stack.callback(weight.register_post_accumulate_grad_hook(take(names)).remove)
        for current[0], row in enumerate(rows):
            loss_of(run_row(model, row), row).backward()
            tick()
    counts = np.array([count_labels(row) for row in rows], dtype=np.float64)
    shares = (counts / counts.sum())[:, None]
    values = []
    for unit in units:
        slope = sum(slopes[name] for name in unit)  # (rows, widths)
        mean = (shares * slope).sum(0)
        spread = (shares * counts[:, None] * (slope - mean) ** 2).sum(0)
        values.append(mean + (mean**2 + spread) / 2)
    return values


@contextmanager
def _gradients_of(model: nn.Module, weights: Any) -> Iterator[None]:
    """While this is open these weights alone have gradients; afterwards all are as they were."""
    kept = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    chosen = {id(weight) for weight in weights}
    try:
        for parameter, _, _ in kept:
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in chosen)
        yield
    finally:
        for parameter, required, gradient in kept:
            parameter.grad = None
            parameter.requires_grad_(required)
            parameter.grad = gradient


def by_measured_loss(
    model: nn.Module,
    rounding: Rounding,
    units: Units,
    blocks: Sequence[Sequence[int]],
    pairs: bool,
    rows: Sequence[Row],
    tick: Callable[[], object],
) -> tuple[list[NDArray[np.float64]], Pairs]:
    """What each width of each unit changes the loss by, and with `pairs` what two of a block do together."""

    def loss(widths: dict[str, int]) -> float:
        with rounding.applied(widths):
            tick()
            return mean_loss(model, rows)

    together: Pairs = {}
    with untouched(model):
        base = mean_loss(model, rows)
        alone = [np.array([loss(dict.fromkeys(unit, width)) for width in rounding.widths]) - base for unit in units]
        for block in blocks if pairs else ():
            for one, other in combinations(block, 2):
                table = np.array(
                    [
                        [
                            loss({**dict.fromkeys(units[one], a), **dict.fromkeys(units[other], b)})
                            for b in rounding.widths
                        ]
                        for a in rounding.widths
                    ]
                )
                together[one, other] = table - base - alone[one][:, None] - alone[other][None, :]
    return alone, together


def by_output(
    model: nn.Module, rounding: Rounding, units: Units, rows: Sequence[Row], tick: Callable[[], object]
) -> list[NDArray[np.float64]]:
    """The squared errors of a unit's outputs relative to these, at each width; inputs are those of the dense model."""
    errors = {name: np.zeros(len(rounding.widths)) for name in rounding.layers}
    squares = dict.fromkeys(rounding.layers, 0.0)

    def watch(name: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
            exact = F.linear(args[0], module.weight).double()
            squares[name] += exact.square().sum().item()
            for index, width in enumerate(rounding.widths):
                found = F.linear(args[0], rounding.weight(name, width)).double()
                errors[name][index] += (found - exact).square().sum().item()

        return hook

    with untouched(model), torch.no_grad(), ExitStack() as stack:
        for name, layer in rounding.layers.items():
            stack.callback(layer.register_forward_hook(watch(name)).remove)
        for row in rows:
            run_row(model, row)
            tick()
    return [np.sum([errors[name] / max(squares[name], 1e-30) for name in unit], axis=0) for unit in units]
