"""Bits by layer, and what other tools are told of them."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from peft_sgrq.files.described import read_described, write_described
from peft_sgrq.rotation.scheme import Scheme

_WORD = 32  # codes are packed into int32, row by row
_SHAPE = 2 * 64  # `weight_shape`, two int64


def stored_bits(layer: nn.Linear, width: int, scheme: Scheme) -> int:
    """The bits that a quantized layer takes in a checkpoint: packed codes, scales, and its shape."""
    rows, columns = layer.weight.shape
    groups = 1 if scheme.by_row(columns) else columns // scheme.group_size
    words = -(-columns * width // _WORD)
    return rows * (words * _WORD + groups * 8 * layer.weight.itemsize) + _SHAPE  # scales have the dtype of the weight


@dataclass
class BitPlan:
    """How many bits each layer gets; what [`quantize`] takes in place of a scheme.

    Attributes:
        layers (`dict[str, int]`): Module name -> bits.
        group_size (`int`): Columns that share a scale.
        bits (`float`): Bits a weight in the mean, with scales.
        size (`int`): Bytes of the quantized layers in a checkpoint.
        budget (`int`): Bytes that were allowed.
        criterion (`str`): What the values of widths were.
        by_row (`list[str]`): The layers with one scale a row, whose columns no group divides.
        ignored (`list[str]`): The linear layers that stay as they are, the output head among them.
        predicted (`dict[str, float]`): Module names of a unit, joined by commas -> what its width was taken to cost.
        curve (`list[tuple[float, float]]`): Bits a weight, and what the best plan of so many is predicted to cost.
        held_out (`dict[str, float]`): The loss on the half of the data that nothing was chosen by: of the plan that
            was found ("planned"), of the best uniform one in the budget ("uniform"), and before ("dense").
        uniform (`bool`): Whether this is the uniform plan, which was as good.
    """

    layers: dict[str, int]
    group_size: int
    bits: float
    size: int
    budget: int
    criterion: str
    by_row: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    predicted: dict[str, float] = field(default_factory=dict)
    curve: list[tuple[float, float]] = field(default_factory=list)
    held_out: dict[str, float] = field(default_factory=dict)
    uniform: bool = False

    def table(self) -> str:
        """Layers with their bits, what the unit of each was predicted to cost, and the curve."""
        costs = {name: cost for names, cost in self.predicted.items() for name in names.split(",")}
        width = max(map(len, self.layers))
        lines = [f"{name:{width}}  {bits}  {costs.get(name, 0.0):.4g}" for name, bits in self.layers.items()]
        lines.append(f"{self.bits:.3f} bits a weight with scales, {self.size / 1e6:.2f} MB")
        lines += [f"at {bits:.2f} bits: predicted {cost:.4g}" for bits, cost in self.curve]
        lines += [f"held-out loss, {name}: {loss:.4f}" for name, loss in self.held_out.items()]
        if self.uniform:
            lines.append("the uniform plan, as good on held-out data as what was found")
        return "\n".join(lines)

    def quantization_config(self) -> dict[str, Any]:
        """compressed-tensors' `quantization_config`, as config.json has it: a group of layers for each width."""
        scheme = Scheme(max(self.layers.values()), group_size=self.group_size)
        return scheme.config(self.layers, self.by_row, self.ignored).model_dump(mode="json")

    def autoround(self) -> dict[str, dict[str, Any]]:
        """AutoRound's `layer_config`: it learns the rounding that [`quantize`] takes to nearest."""
        return {name: self._fields(name) for name in self.layers}

    def gptqmodel(self) -> dict[str, dict[str, Any]]:
        """GPTQModel's `dynamic`."""
        # It orders groups of columns by their activations, and refuses a layer that has none.
        unordered = {name: {"act_group_aware": False} for name in self.by_row}
        return {f"+:^{re.escape(name)}$": {**self._fields(name), **unordered.get(name, {})} for name in self.layers}

    def _fields(self, name: str) -> dict[str, Any]:
        size = -1 if name in self.by_row else self.group_size
        return {"bits": self.layers[name], "group_size": size, "sym": True}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it as JSON, with what compressed-tensors, AutoRound and GPTQModel are told."""
        told = {
            "compressed_tensors": self.quantization_config(),
            "autoround": self.autoround(),
            "gptqmodel": self.gptqmodel(),
        }
        write_described(path, "bit plan", {"plan": asdict(self), **told})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> BitPlan:
        """Reads what `save` or `peft-sgrq allocate` wrote.

        Raises:
            ValueError: If the file holds no plan.
            OSError: If there is none.
        """
        fields = read_described(path, "bit plan")["plan"]
        return cls(**{**fields, "curve": [tuple(point) for point in fields["curve"]]})
