"""Several widths by columns in one layer, emulated in a dense model: no format holds that, and no loader.

The comparison of Layer-Wise High-Impact Parameter Ratio Optimization (arXiv 2511.17801): the columns of a layer are
sorted by their impact, some get one bit more than the others. How many is the same share everywhere (`fixed`),
follows from one threshold over all layers, or is the best there is by the programme, layer by layer. All three choose
of the same options, quarters of a layer's columns. Impact is the diagonal Fisher information times the squared error
of rounding. Columns of a width are put side by side, so that their groups are whole.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from peft_sgrq.passes.running import loss_of
from peft_sgrq.passes.untouched import untouched
from peft_sgrq.rotation.bit_values import Rounding, by_fisher
from peft_sgrq.rotation.rounding import quantized_weight
from peft_sgrq.rotation.scheme import Scheme
from peft_sgrq.selection.layerwise.knapsack import Block, allocate
from peft_sgrq.selection.layerwise.probe import Row

PARTS = 4  # a layer's columns are widened by quarters
WAYS = ("fixed", "threshold", "programme")


class Columns(Rounding):
    """The layers of a model with some columns at one width and the others at the next.

    Option `o` has the width `widths[o // PARTS]`, and the next one for `o % PARTS` quarters of the columns.

    Args:
        layers (`Mapping[str, nn.Linear]`): Dense.
        impacts (`Mapping[str, torch.Tensor]`): Of each column, `[K]`: what squared errors are multiplied by, `[N, K]`.
        widths (`Sequence[int]`): Bits, each one more than the one before.
        scheme (`Scheme`): For groups.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Linear],
        fisher: Mapping[str, torch.Tensor],
        widths: Sequence[int],
        scheme: Scheme,
    ) -> None:
        self.layers, self._bits, self._scheme = layers, list(widths), scheme
        self.widths = list(range((len(widths) - 1) * PARTS + 1))  # options, in the words of `Rounding`
        self._fisher = fisher
        self._order = {
            name: self.impact(name, self._rounded(name, widths[0])).argsort(descending=True) for name in layers
        }
        self._made: dict[tuple[str, int], torch.Tensor] = {}

    def _rounded(self, name: str, width: int, columns: torch.Tensor | None = None) -> torch.Tensor:
        weight = self.layers[name].weight.detach()
        chosen = weight if columns is None else weight[:, columns]
        return quantized_weight(chosen, self._scheme.weight_args(width, self._scheme.by_row(chosen.shape[1])))

    def impact(self, name: str, rounded: torch.Tensor) -> torch.Tensor:
        """What each column's error costs, `[K]`."""
        error = (rounded - self.layers[name].weight.detach()).square()
        return (self._fisher[name] * error).sum(0)

    def _wide(self, name: str, option: int) -> int:
        return round(self.layers[name].in_features * (option % PARTS) / PARTS)

    def cost(self, name: str, option: int) -> int:
        """Bits of the codes."""
        layer = self.layers[name]
        return layer.out_features * (layer.in_features * self._bits[option // PARTS] + self._wide(name, option))

    def weight(self, name: str, option: int) -> torch.Tensor:
        """A layer's weight at an option."""
        if (name, option) not in self._made:
            order, width, wide = self._order[name], self._bits[option // PARTS], self._wide(name, option)
            made = torch.empty_like(self.layers[name].weight)
            for columns, bits in ((order[:wide], width + 1), (order[wide:], width)):
                if len(columns):
                    made[:, columns] = self._rounded(name, bits, columns)
            self._made[name, option] = made
        return self._made[name, option]

    def choose(self, way: str, budget: int, model: nn.Module, rows: Sequence[Row]) -> dict[str, int]:
        """The option of each layer, within a budget of bits of codes."""
        return {"fixed": self._fixed, "threshold": self._threshold, "programme": self._programme}[way](
            budget, model, rows
        )

    def _fixed(self, budget: int, *_: Any) -> dict[str, int]:
        fitting = [o for o in self.widths if sum(self.cost(name, o) for name in self.layers) <= budget]
        return dict.fromkeys(self.layers, fitting[-1])

    def _threshold(self, budget: int, *_: Any) -> dict[str, int]:
        """Steps are taken in the order of what they are worth by bit, wherever they are."""
        found = dict.fromkeys(self.layers, 0)
        spent = sum(self.cost(name, 0) for name in self.layers)
        queue: list[tuple[float, str]] = []

        def offer(name: str) -> None:
            option = found[name]
            if option < self.widths[-1]:
                losses = [float(self.impact(name, self.weight(name, o)).sum()) for o in (option, option + 1)]
                bits = self.cost(name, option + 1) - self.cost(name, option)
                heapq.heappush(queue, ((losses[1] - losses[0]) / bits, name))

        for name in self.layers:
            offer(name)
        while queue:
            name = heapq.heappop(queue)[1]
            bits = self.cost(name, found[name] + 1) - self.cost(name, found[name])
            if spent + bits <= budget:
                found[name], spent = found[name] + 1, spent + bits
                offer(name)
        return found

    def _programme(self, budget: int, model: nn.Module, rows: Sequence[Row]) -> dict[str, int]:
        values = by_fisher(model, self, [[name] for name in self.layers], rows, lambda: None)
        costs = [np.array([self.cost(name, o) for o in self.widths], dtype=np.int64) for name in self.layers]
        blocks = [Block([cost], [np.minimum.accumulate(value)]) for cost, value in zip(costs, values, strict=True)]
        choices = allocate(blocks, math.floor(budget)).choices
        return {name: options[0] for name, options in zip(self.layers, choices, strict=True)}


def diagonal_fisher(model: nn.Module, layers: Mapping[str, nn.Linear], rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Squared gradients of the loss by weight, the mean over sequences: `[N, K]` by layer."""
    found = {name: torch.zeros_like(layer.weight) for name, layer in layers.items()}
    with untouched(model), torch.enable_grad():
        for layer in layers.values():
            layer.weight.requires_grad_(True)
        for row in rows:
            model.zero_grad()
            loss_of(model(**row, use_cache=False), row).backward()
            for name, layer in layers.items():
                found[name] += layer.weight.grad.square() / len(rows)
        model.zero_grad()
    return {name: fisher.detach() for name, fisher in found.items()}
