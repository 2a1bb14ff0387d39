"""The probe: a model with trial deltas and no adapter is the model, and has the gradients of an adapter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model
from support.bases import DENSE, INT8, NF4, Base
from support.ratio_inputs import (
    GROUP,
    QUICK,
    assert_same_state,
    everything,
    saliency_of,
    scaled_weights_of,
    state_of,
    text,
)

from peft_sgrq import SGRQConfig, allocate_ratios
from peft_sgrq.selection.layerwise.probe import probing


@pytest.fixture
def dense(llama_dir) -> tuple[Any, SGRQConfig]:
    return DENSE.load(llama_dir), SGRQConfig(group_size=GROUP)


@pytest.mark.parametrize("base", [NF4, INT8, DENSE, Base("nf4", True, torch.bfloat16)], ids=lambda base: base.name)
def test_without_deltas_the_probe_is_the_model_bit_for_bit(base, llama_dir, ids):
    model = base.load(llama_dir)
    expected = model(input_ids=ids, labels=ids).loss.float()
    scaled_weights = scaled_weights_of(model, SGRQConfig(group_size=GROUP))
    with probing(model, scaled_weights, everything(scaled_weights)) as probe:
        assert torch.equal(probe.loss({"input_ids": ids, "labels": ids}), expected)


@pytest.mark.parametrize("base", [NF4, INT8, DENSE], ids=lambda base: base.name)
def test_gradients_of_the_probe_are_those_of_an_adapter(base, llama_dir, ids):
    model = base.load(llama_dir)
    scaled_weights = scaled_weights_of(model, SGRQConfig(group_size=GROUP))
    groups = {name: torch.arange(0, scaled_weight.selectable, 2) for name, scaled_weight in scaled_weights.items()}
    with probing(model, scaled_weights, groups) as probe:
        found = probe.gradients({"input_ids": ids, "labels": ids})
    from peft_sgrq.layer.masks import encode_mask

    masks = {
        name: encode_mask(groups[name], scaled_weight.selectable) for name, scaled_weight in scaled_weights.items()
    }
    adapted = get_peft_model(model, SGRQConfig(group_size=GROUP, selection=masks)).eval()
    adapted(input_ids=ids, labels=ids).loss.backward()
    for name, gradient in found.items():
        expected = adapted.get_submodule(f"base_model.model.{name}").sgrq_delta["default"].weight.grad
        assert float(expected.abs().max()) > 0
        assert torch.equal(gradient, expected), name


@pytest.mark.parametrize("base", [NF4, INT8, DENSE], ids=lambda base: base.name)
@pytest.mark.parametrize("fails", [False, True], ids=["done", "interrupted"])
def test_the_model_stays_as_it_was(base, fails, llama_dir):
    model = base.load(llama_dir).train()
    model.model.norm.eval()
    model.model.norm.register_forward_hook(lambda *_: None)
    model.model.norm.weight.grad = torch.ones(64)
    config = SGRQConfig(group_size=GROUP)
    saliency = saliency_of(model, config)
    before = state_of(model)
    data: Any = text()
    if fails:
        data = [*text(), {"input_ids": torch.full((1, 8), 10**6)}]  # no such token: the embedding fails
    settings = copy.copy(config.__dict__)
    if fails:
        with pytest.raises(IndexError):
            allocate_ratios(model, config, data, saliency, budget=0.9, **QUICK)
    else:
        allocate_ratios(model, config, data, saliency, budget=0.9, **QUICK)
    assert_same_state(state_of(model), before)
    assert config.__dict__ == settings
