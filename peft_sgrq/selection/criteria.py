"""Saliency criteria: what a weight is worth.

With `w` a weight of column `j`, `H = 2/N sum_t x_t x_t^T` over the inputs of its layer, and `g` the gradient in `w` of
the loss of one sequence, summed over its tokens:

===========  ============================  ==========================================================================
obs          w^2 / [H^-1]_jj               what removing it costs when the others make up for it: OBS (Hassibi and
                                           Stork 1993), SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774)
billm        w^2 / [H^-1]_jj^2             BiLLM (Huang et al. 2024, arXiv 2402.04291)
diag         w^2 H_jj                      what removing it costs, the others left alone: OBD (LeCun et al. 1990),
                                           the square of Wanda (Sun et al. 2023, arXiv 2306.11695)
error        (w - w_original)^2 H_jj       what quantizing it cost: OWQ (Lee et al. 2024, arXiv 2306.02272)
fisher       w^2 sum g^2 / N               the diagonal of the Fisher information (SqueezeLLM, Kim et al. 2024, arXiv
                                           2306.07629), for a relative change
gradient     sum (dL/ddelta)^2 / N         by scale: what tuning could gain on this data
magnitude    w^2                           needs no data
random       uniform                       the control
===========  ============================  ==========================================================================

Scores are summed over the rows of each column (in a row format over the columns of each row), and over the columns of
each group when groups are selected. In H^-1, H is damped by 1 % of its mean diagonal. Dead columns (H_jj = 0) score 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from peft_sgrq.formats.scaled_weight import ScaledWeight
from peft_sgrq.formats.selectable_unit import SelectableUnit
from peft_sgrq.passes.statistics import InputStatistics


@dataclass
class LayerStatistics:
    """What a criterion knows about a layer.

    Attributes:
        name (`str`): Name of the module.
        weight (`torch.Tensor`): The weight the layer computes with, float32 `[N, K]`.
        inputs (`InputStatistics`): Its inputs: `diagonal` and `inverse_diagonal` float64 `[K]`, `hessian` `[K, K]`.
        original (`torch.Tensor` or `None`): The weight before quantization, float32 `[N, K]`.
    """

    name: str
    weight: torch.Tensor
    inputs: InputStatistics
    original: torch.Tensor | None = None


Criterion = Callable[[LayerStatistics], torch.Tensor]


def obs(layer: LayerStatistics) -> torch.Tensor:
    return layer.weight.square() / layer.inputs.inverse_diagonal.float()  # (N, K)


def billm(layer: LayerStatistics) -> torch.Tensor:
    return (layer.weight / layer.inputs.inverse_diagonal.float()).square()  # (N, K)


def diag(layer: LayerStatistics) -> torch.Tensor:
    return layer.weight.square() * layer.inputs.diagonal.float()  # (N, K)


def error(layer: LayerStatistics) -> torch.Tensor:
    before: torch.Tensor = layer.original  # type: ignore[assignment]  # `calibrate` refuses to be without
    return (layer.weight - before).square() * layer.inputs.diagonal.float()  # (N, K)


def fisher(weight: torch.Tensor, gradient: torch.Tensor, scaled_weight: ScaledWeight) -> torch.Tensor:
    """`w^2 g^2` of one sequence, from the weight and its gradient, float32 `[N, K]`."""
    return (weight * gradient).square()  # (N, K)


def gradient(weight: torch.Tensor, gradient: torch.Tensor, scaled_weight: ScaledWeight) -> torch.Tensor:
    """The squared gradient of each scale's relative change for one sequence, divided among the columns it scales.

    `dL/ddelta = sum w g` over what the scale multiplies; the columns of a group get equal parts of the square, so that
    they add up to it.
    """
    product = weight * gradient  # (N, K)
    if scaled_weight.unit is SelectableUnit.ROW:
        return product.sum(1).square()  # (N,)
    return scaled_weight.spread_to_lines(scaled_weight.sum_groups(product).square().sum(0))  # (K,)


HESSIAN: dict[str, Criterion] = {"obs": obs, "billm": billm}  # need all of H
DIAGONAL: dict[str, Criterion] = {"diag": diag, "error": error}  # need its diagonal
GRADIENTS = {"fisher": fisher, "gradient": gradient}  # need a backward pass
COMPARABLE = tuple(GRADIENTS)  # scores in units of the model's loss, comparable between layers


@torch.no_grad()
def weight_scores(name: str, scaled_weight: ScaledWeight, criterion: str, seed: int = 0) -> torch.Tensor:
    """The scores of a criterion that needs no data, `"magnitude"` or `"random"`: float32, `[K]`, or `[N]` of rows.

    Random scores depend on the seed and the name of the layer, not on any state.
    """
    if criterion == "magnitude":
        return squared_weights(scaled_weight)
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    scores = torch.rand(scaled_weight.selectable, generator=generator).to(scaled_weight.device)
    return scaled_weight.spread_to_lines(scores)


_PART_BYTES = 2 << 20  # of the weight in float32; as much as stays in a cache, twice as fast as more


def squared_weights(scaled_weight: ScaledWeight) -> torch.Tensor:
    """The sum of squared weights of each column, float32 `[K]`, or of each row in a row format, `[N]`."""
    scales, unit = scaled_weight.scales(), scaled_weight.unit
    if not scaled_weight.in_parts:
        return unit.sum_to_lines(scaled_weight.dequantize(scales, torch.float32).square_())
    size = unit.columns(scaled_weight.group_size)
    step = max(1, _PART_BYTES // (4 * scaled_weight.out_features * size)) * size
    sums = []
    for start in range(0, scaled_weight.in_features, step):
        columns = slice(start, min(start + step, scaled_weight.in_features))
        sums.append(unit.sum_to_lines(scaled_weight.dequantize_columns(scales, torch.float32, columns).square_()))
    return torch.stack(sums).sum(0) if unit is SelectableUnit.ROW else torch.cat(sums)
