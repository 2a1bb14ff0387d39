"""What tuning the selected scales of a layer gains, alone and together with other layers of its block.

This is the matrix `M` of `knapsack.py`. In the paper it comes from (arXiv 2511.17801) the perturbation of a layer is
the error of quantizing it, which raises the loss. Here it is what tuning does: a step on the selected scales,

    D[l, m] = -eta * E[g] / sqrt(E[g^2])    on the groups that layer l selects at ratio m, zero elsewhere,

`g` the gradient of a calibration row's loss in the deltas. It is the first step of Adam, which is what trains them,
with the mean taken over the data: a scale moves by up to `eta`, and less where rows disagree about the direction.
`eta` is the step that is best when all layers take it together at their largest ratio, so that every layer is judged
by its part in a joint step and not by the longer one it could take alone. What a choice gains is then

    dL = sum_l dL[l, m_l] + sum_{l1 < l2} (dL[l1, m1; l2, m2] - dL[l1, m1] - dL[l2, m2])

with pair terms inside a block only. Values are losses, so negative is good. Pair terms are mostly positive: two layers
that do the same work gain less together than the sum. In terms of the paper, `M_ll = 2 dL[l, m]`, its off-diagonal
entries are the pair terms, and this is `1/2 d^T M d`. `measure` takes these terms as the paper does, `estimate` takes
the quadratic form they stand for, with the Fisher information as the curvature.

Directions are taken on one half of the rows and judged on the other. On the same rows every layer would be credited
with the noise it can fit, those with many scales the most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from peft_sgrq.passes.processes import gather, sum_over_processes
from peft_sgrq.selection.layerwise.knapsack import Block
from peft_sgrq.selection.layerwise.probe import Probe, Row, count_labels, mean_loss

STEP_LENGTHS = tuple(2.0**-power for power in range(14))  # relative changes of a scale, from 1.2e-4 to 1


class Options(NamedTuple):
    """What a layer can choose from.

    Attributes:
        masks (`torch.Tensor`): For each option the groups it selects of those with deltas, float32
            `[options, 1, groups]`, or `[options, rows, 1]` in a row format.
        costs (`numpy.ndarray`): How many scales each selects, ascending, int64 `[options]`.
    """

    masks: torch.Tensor
    costs: NDArray[np.int64]


def halves(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows directions are taken on, and those they are judged on; one row serves as both."""
    return list(rows[0::2]), list(rows[1::2] or rows)


def directions(probe: Probe, rows: Sequence[Row], tick: Callable[[], None]) -> dict[str, torch.Tensor]:
    """`-E[g] / sqrt(E[g^2])` by layer over the rows of all processes, weighted by labels; shaped as the deltas."""
    first = {name: torch.zeros_like(delta, requires_grad=False) for name, delta in probe.deltas.items()}
    second = {name: torch.zeros_like(delta) for name, delta in first.items()}
    total = sum(gather(sum(map(count_labels, rows))))
    for row in rows:
        weight = count_labels(row) / total
        for name, gradient in probe.gradients(row).items():
            first[name].add_(gradient, alpha=weight)
            second[name].addcmul_(gradient, gradient, value=weight)
        tick()
    sum_over_processes([*first.values(), *second.values()])
    tiny = torch.finfo(torch.float32).tiny
    return {name: -first[name] / second[name].sqrt().clamp_min_(tiny) for name in first}


def estimate(
    probe: Probe,
    steps: Mapping[str, torch.Tensor],
    options: Mapping[str, Options],
    blocks: Sequence[Sequence[str]],
    rows: Sequence[Row],
    tick: Callable[[], None],
) -> list[Block]:
    """The terms from Fisher information: one backward pass over the rows, and no pass for any of the terms.

    With `a_s` the derivative of row `s`'s loss along a step (a number for each layer and option), the loss changes by
    `eta E[a] + eta^2 / 2 F[a, a]`. `F` is the Fisher information of a token, the usual stand-in for the curvature.
    It is estimated from rows: the gradients of a row's `T_s` tokens add up, so if they are independent
    `F = E[a] E[a]^T + 1 / sum(T) sum_s T_s^2 (a_s - E[a]) (a_s - E[a])^T`. On text the model does not know the Fisher
    information is larger than the curvature. A common factor shortens `eta` and the expected gain by as much and does
    not change what is chosen.

    `steps` is what `directions` returned, `rows` are others than those it was given, `blocks` names the layers of each
    block. The terms are in units of the loss. `tick` is called after each row.
    """
    found: list[tuple[int, dict[str, torch.Tensor]]] = []  # by row: its labels, and by layer slopes, float64 [options]
    for row in rows:
        slopes = {}
        for name, gradient in probe.gradients(row).items():
            masks = options[name].masks
            by_group = (gradient * steps[name]).sum(0 if masks.shape[1] == 1 else 1)  # (groups,)
            slopes[name] = (masks.flatten(1) @ by_group).double().cpu()
        found.append((count_labels(row), slopes))
        tick()
    found = [row for part in gather(found) for row in part]
    tokens = torch.tensor([count for count, _ in found], dtype=torch.float64).unsqueeze(1)  # (S, 1)
    sums = {name: torch.stack([slopes[name] for _, slopes in found]) * tokens for name in options}  # (S, options)
    means = {name: values.sum(0) / tokens.sum() for name, values in sums.items()}  # (options,)
    noise = {name: values - tokens * means[name] for name, values in sums.items()}  # (S, options)

    def fisher(one: str, other: str) -> torch.Tensor:
        return torch.outer(means[one], means[other]) + noise[one].T @ noise[other] / tokens.sum()

    mean_all = sum(float(mean[-1]) for mean in means.values())
    noise_all = torch.stack([values[:, -1] for values in noise.values()]).sum(0)  # (S,)
    curvature = mean_all**2 + float(noise_all.square().sum() / tokens.sum())
    # Where the step does not even help at the start there is no best length; any shows that nothing is gained.
    eta = min(-mean_all / curvature, STEP_LENGTHS[0]) if mean_all < 0 else STEP_LENGTHS[-1]
    return [
        Block(
            costs=[options[name].costs for name in names],
            values=[(eta * means[name] + eta**2 / 2 * fisher(name, name).diagonal()).numpy() for name in names],
            pairs={
                (i, j): (eta**2 * fisher(names[i], names[j])).numpy() for i, j in combinations(range(len(names)), 2)
            },
        )
        for names in blocks
    ]


def measure(
    probe: Probe,
    steps: Mapping[str, torch.Tensor],
    options: Mapping[str, Options],
    blocks: Sequence[Sequence[str]],
    batches: Sequence[Row],
    tick: Callable[[], None],
) -> list[Block]:
    """The terms as measured changes of the loss: a forward pass over the batches for each of them.

    For a block of `n` layers with `r` options these are `n r + n (n - 1) / 2 r^2` passes: 560 for 7 layers, 5 ratios.
    Arguments and result are those of `estimate`, with rows in batches; `tick` is called after each term.
    """
    batches = list(batches)
    base = mean_loss(probe.model, batches)
    eta = _best_step(probe, steps, batches)

    def change(*chosen: tuple[str, int]) -> float:
        for name, option in chosen:
            probe.set(name, eta * (steps[name] * options[name].masks[option]))
        loss = mean_loss(probe.model, batches)
        for name, _ in chosen:
            probe.set(name, 0.0)
        tick()
        return loss - base

    measured = []
    for names in blocks:
        values = [np.array([change((name, m)) for m in range(len(options[name].costs))]) for name in names]
        pairs = {}
        for i, j in combinations(range(len(names)), 2):
            pairs[i, j] = np.zeros((len(values[i]), len(values[j])))
            for m, k in product(*map(range, pairs[i, j].shape)):
                pairs[i, j][m, k] = change((names[i], m), (names[j], k)) - values[i][m] - values[j][k]
        measured.append(Block([options[name].costs for name in names], values, pairs))
    return measured


def _best_step(probe: Probe, steps: Mapping[str, torch.Tensor], batches: list[Row]) -> float:
    """The step length at which all layers together lower the loss most."""
    losses = {}
    for eta in STEP_LENGTHS:
        for name, step in steps.items():
            probe.set(name, eta * step)
        losses[eta] = mean_loss(probe.model, batches)
    for name in steps:
        probe.set(name, 0.0)
    return min(losses, key=lambda eta: losses[eta])
