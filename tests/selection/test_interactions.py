"""What groups gain, alone and together: the terms are changes of the loss, and of the Fisher information."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from support.bases import DENSE
from support.ratio_inputs import GROUP, everything, rows_of, scaled_weights_of, text

from peft_sgrq import SGRQConfig
from peft_sgrq.selection.layerwise.gains import STEP_LENGTHS, Options, directions, estimate, halves, measure
from peft_sgrq.selection.layerwise.probe import count_labels, probing, stack_rows

COUNTS = (1, 3)  # groups that the two options of each layer select


@pytest.fixture
def dense(llama_dir) -> tuple[Any, SGRQConfig]:
    return DENSE.load(llama_dir), SGRQConfig(group_size=GROUP)


def options_for(scaled_weights: dict[str, Any], counts: tuple[int, ...]) -> dict[str, Options]:
    """Each layer may take its first groups."""
    return {
        name: Options(
            masks=(torch.arange(scaled_weight.selectable) < torch.tensor(counts)[:, None]).float().unsqueeze(1),
            costs=np.array(counts) * scaled_weight.out_features,
        )
        for name, scaled_weight in scaled_weights.items()
    }


@pytest.fixture
def block(dense):
    """The layers of the first block, with options and rows."""
    model, config = dense
    scaled_weights = {
        name: scaled_weight for name, scaled_weight in scaled_weights_of(model, config).items() if ".layers.0." in name
    }
    rows = rows_of(text(8))
    return model, scaled_weights, options_for(scaled_weights, COUNTS), [list(scaled_weights)], rows


def test_directions_are_the_first_step_of_adam_on_the_mean_gradient(block):
    model, scaled_weights, _, _, rows = block
    with probing(model, scaled_weights, everything(scaled_weights)) as probe:
        gradients = [probe.gradients(row) for row in rows]
        found = directions(probe, rows, lambda: None)
    for name in scaled_weights:
        stacked = torch.stack([gradient[name] for gradient in gradients]).double()
        expected = -stacked.mean(0) / stacked.square().mean(0).sqrt()
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-4, atol=1e-6)
        assert float(found[name].abs().max()) <= 1 + 1e-5


@pytest.mark.slow
def test_measured_terms_are_changes_of_the_loss(block):
    model, scaled_weights, options, blocks, rows = block
    names = blocks[0]
    with probing(model, scaled_weights, everything(scaled_weights)) as probe:
        steps = directions(probe, rows[:4], lambda: None)
        (found,) = measure(probe, steps, options, blocks, stack_rows(rows[4:], 8), lambda: None)
        # Every value is the loss of the model with one step length for all; find it from one of them.
        batch = stack_rows(rows[4:], 8)[0]

        def loss(eta: float, *chosen: tuple[str, int]) -> float:
            for name in names:
                probe.set(name, 0.0)
            for name, option in chosen:
                step = eta * steps[name]
                step[:, COUNTS[option] :] = 0
                probe.set(name, step)
            return float(probe.loss(batch).detach().double())

        base = loss(0)
        full = {eta: _loss_of_all(probe, steps, eta, batch) for eta in STEP_LENGTHS}
        eta = min(full, key=lambda eta: full[eta])
        for i, j in ((0, 1), (2, 6)):
            for m, k in itertools.product(range(2), range(2)):
                one, other = loss(eta, (names[i], m)) - base, loss(eta, (names[j], k)) - base
                assert found.values[i][m] == pytest.approx(one, abs=1e-6)
                both = loss(eta, (names[i], m), (names[j], k)) - base
                assert found.pairs[i, j][m, k] == pytest.approx(both - one - other, abs=2e-6)
    assert min(values.min() for values in found.values) < -1e-4  # far more than the tolerance
    assert all(costs is options[name].costs for costs, name in zip(found.costs, names, strict=True))


def _loss_of_all(probe: Any, steps: dict[str, torch.Tensor], eta: float, batch: dict[str, torch.Tensor]) -> float:
    for name, step in steps.items():
        probe.set(name, eta * step)
    return float(probe.loss(batch).detach())


def test_estimated_terms_are_those_of_the_fisher_information(block):
    model, scaled_weights, options, blocks, rows = block
    names = blocks[0]
    rows = [*rows[:3], {key: value[:, :7] for key, value in rows[3].items()}]  # of unequal length
    with probing(model, scaled_weights, everything(scaled_weights)) as probe:
        steps = directions(probe, rows_of(text(4, seed=1)), lambda: None)
        (found,) = estimate(probe, steps, options, blocks, rows, lambda: None)
        gradients = [probe.gradients(row) for row in rows]
    columns, last = [], []
    for name in names:
        for option, count in enumerate(COUNTS):
            step = steps[name].double().clone()
            step[:, count:] = 0
            columns.append([float((gradient[name].double() * step).sum()) for gradient in gradients])
            if option == 1:
                last.append(columns[-1])
    slopes = np.array(columns).T  # (S, layers * options)
    tokens = np.array([count_labels(row) for row in rows], dtype=float)
    mean = tokens @ slopes / tokens.sum()
    centred = tokens[:, None] * (slopes - mean)
    fisher = np.outer(mean, mean) + centred.T @ centred / tokens.sum()
    every = np.kron(np.ones(len(names)), [0.0, 1.0])  # all layers at their largest option
    eta = -(every @ mean) / (every @ fisher @ every)
    assert 0 < eta < 1
    for i, name in enumerate(names):
        part = slice(2 * i, 2 * i + 2)
        expected = eta * mean[part] + eta**2 / 2 * np.diag(fisher)[part]
        np.testing.assert_allclose(found.values[i], expected, rtol=1e-4, atol=1e-9, err_msg=name)
    for i, j in itertools.combinations(range(len(names)), 2):
        expected = eta**2 * fisher[2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        np.testing.assert_allclose(found.pairs[i, j], expected, rtol=1e-4, atol=1e-9)


def test_directions_and_what_they_gain_come_from_different_rows():
    rows = rows_of(text(5))
    first, second = halves(rows)
    assert len(first) + len(second) == len(rows)
    assert not {id(row) for row in first} & {id(row) for row in second}
    assert halves(rows[:1]) == (rows[:1], rows[:1])
