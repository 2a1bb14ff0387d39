"""The term that holds salient weights is what its formula says, from two numbers for each scale."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rounded_models import deltas, full, recovered, rounded, sequences
from support.single_layers import conv1d, linear_4bit, linear_8bit, linear_dense
from torch import nn
from torch.nn import functional as F

from peft_sgrq import SGRQConfig
from peft_sgrq.formats.registry import resolve_weight
from peft_sgrq.layer.base_layers import scaled_weight_of
from peft_sgrq.layer.functional import effective_scales
from peft_sgrq.passes.data import load_batches
from peft_sgrq.passes.reference import Reference
from peft_sgrq.recovery.preservation import IMPORTANCES, Pull, preservation_terms

pytestmark = pytest.mark.slow

LAYERS = {
    "nf4": lambda: linear_4bit(24, 128),
    "nested": lambda: linear_4bit(24, 128, nested=True),
    "int8": lambda: linear_8bit(24, 40),
    "dense": lambda: linear_dense(24, 40),
    "conv1d": lambda: conv1d(24, 40),
}


@settings(max_examples=8, deadline=None)
@given(kind=st.sampled_from(sorted(LAYERS)), seed=st.integers(0, 99), by_row=st.booleans(), selected=st.booleans())
def test_the_term_equals_its_formula(kind, seed, by_row, selected):
    torch.manual_seed(seed)
    scaled_weight = resolve_weight(LAYERS[kind](), 16)
    shape = (scaled_weight.out_features, scaled_weight.in_features)
    original, importance = torch.randn(shape), torch.rand(shape if by_row else shape[1:])
    groups = torch.arange(0, scaled_weight.selectable, 2) if selected else None
    count = scaled_weight.selectable if groups is None else len(groups)
    delta = (torch.rand(scaled_weight.delta_shape(count)) - 0.5).requires_grad_(True)
    term = Pull.of(scaled_weight, original, importance).at(delta, groups, scaled_weight.unit.dim)
    (found,) = torch.autograd.grad(term, delta)
    reference = delta.detach().double().requires_grad_(True)
    scales = effective_scales(scaled_weight, delta.detach(), groups)
    before, scaled = (scaled_weight.dequantize(s, torch.float32).double() for s in (scaled_weight.scales(), scales))
    ratio = torch.where(before == 0, 1.0, scaled / before)  # 1 + delta, where it can be seen
    torch.testing.assert_close(
        term.double(),
        (importance.double() * (before * ratio - original.double()).square()).sum(),
        rtol=1e-4,
        atol=1e-4,
    )
    step = torch.zeros_like(reference)
    step.view(-1)[0] = 1e-3
    pull = Pull.of(scaled_weight, original, importance)
    ahead, behind = (
        pull.at(delta.detach() + sign * step.float(), groups, scaled_weight.unit.dim).double() for sign in (1, -1)
    )
    torch.testing.assert_close(found.view(-1)[0].double(), (ahead - behind) / 2e-3, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("streamed", [False, True], ids=["memory", "streamed"])
def test_gradients_are_those_of_each_sequence_of_the_reference(streamed, llama_dir: Path):
    model = rounded(llama_dir)
    scaled_weights = {
        name: scaled_weight_of(name, module, 16)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "layers" in name
    }
    reference = Reference(str(llama_dir) if streamed else full(llama_dir), model, "model.layers", scaled_weights)
    data = sequences(count=5)
    batches = load_batches(data, batch_size=2)
    pulls = preservation_terms("fisher", reference, reference.blocks(2), scaled_weights, batches, lambda: None)
    plain = full(llama_dir).double()
    fisher = {name: torch.zeros_like(plain.get_submodule(name).weight) for name in scaled_weights}
    for row in data:
        ids = torch.tensor([row["input_ids"]])
        plain.zero_grad()
        F.cross_entropy(plain(ids).logits[0, :-1], ids[0, 1:], reduction="sum").backward()
        for name, total in fisher.items():
            total += plain.get_submodule(name).weight.grad.square()
    for name, scaled_weight in scaled_weights.items():
        weight = scaled_weight.module.weight.detach().double()
        original = plain.get_submodule(name).weight.detach()
        groups = (weight.shape[0], -1, 16)
        torch.testing.assert_close(
            pulls[name].curvature.double(), (fisher[name] * weight**2).view(groups).sum(2), rtol=1e-3, atol=1e-6
        )
        torch.testing.assert_close(
            pulls[name].slope.double(),
            (fisher[name] * weight * (weight - original)).view(groups).sum(2),
            rtol=1e-3,
            atol=1e-5,
        )
        assert float(pulls[name].constant) == pytest.approx(
            float((fisher[name] * (weight - original) ** 2).sum()), rel=1e-3
        )
    assert all(parameter.grad is None for parameter in reference.model.parameters())


def distance(model: nn.Module, directory: Path) -> float:
    """How far weights are from those before quantization, all of them alike."""
    expected = full(directory)
    merged = model.merge_and_unload()
    return sum(
        float((module.weight - expected.get_submodule(name).weight).detach().square().sum())
        for name, module in merged.named_modules()
        if isinstance(module, nn.Linear) and "layers" in name
    )


def least_distance(directory: Path) -> float:
    """The least that any scales of the model in groups of 16 could reach."""
    model, expected = rounded(directory), full(directory)
    total = 0.0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "layers" in name:
            weight, original = module.weight.view(-1, 16), expected.get_submodule(name).weight.view(-1, 16)
            factor = (weight * original).sum(1) / weight.square().sum(1).clamp(min=1e-12)
            total += float((weight * factor[:, None] - original).detach().square().sum())
    return total


@pytest.mark.slow
def test_the_heavier_preservation_weighs_the_nearer_weights_stay(llama_dir: Path):
    options = {"importance": "magnitude", "learning_rate": 5e-2, "epochs": 12}
    found = [distance(recovered(llama_dir, preservation=p, **options).model, llama_dir) for p in (0.0, 1.0, 1000.0)]
    least = least_distance(llama_dir)
    assert found[0] > found[1] > found[2] > least
    assert found[2] - least < 0.1 * (found[0] - least)


def test_without_preservation_its_importance_does_not_matter(llama_dir: Path):
    zero = deltas(recovered(llama_dir, preservation=0.0, importance="magnitude").model)
    for name, delta in deltas(recovered(llama_dir).model).items():
        assert torch.equal(delta, zero[name])


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_every_importance_recovers(importance, llama_dir: Path):
    found = recovered(llama_dir, preservation=0.1, importance=importance)
    assert all(block.after < block.before for block in found.blocks)
    plain = deltas(recovered(llama_dir).model)
    assert not all(torch.equal(delta, plain[name]) for name, delta in deltas(found.model).items())


def test_gradients_need_a_loss(llama_dir: Path):
    model = rounded(llama_dir).model  # without its head there is no loss
    with pytest.raises(ValueError, match="returned no loss"):
        recovered(llama_dir, model, full(llama_dir).model, preservation=0.1, config=SGRQConfig(group_size=16))
