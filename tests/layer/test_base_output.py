"""What an adapted layer leaves to its base: disabled, merged or trained whole, it computes right or says that not."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from support.single_layers import (
    adapt,
    add_adapter,
    conv1d,
    delta_of,
    linear_4bit,
    linear_8bit,
    linear_dense,
    the_layer,
)
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

makers = pytest.mark.parametrize("make", [linear_4bit, linear_8bit, linear_dense, conv1d])


@pytest.mark.parametrize("state", ["adapted", "disabled", "merged", "another adapter"])
def test_a_4bit_layer_refuses_what_its_kernel_makes_nothing_of(state):
    model, x = adapt(linear_4bit(8, 128)), torch.randn(3, 128, dtype=torch.float64)
    layer = the_layer(model)
    if state == "merged":
        layer.merge()
    elif state == "disabled":
        layer.enable_adapters(False)
    elif state == "another adapter":
        layer._active_adapter = "absent"
    with pytest.raises(ValueError, match="its output would be arbitrary"):
        model(x)
    assert model(x.float()).isfinite().all()
    assert torch.equal(model(x), model(x.float()).double())  # it has a compute dtype now


@makers
@pytest.mark.parametrize("state", ["disabled", "merged"])
def test_passes_of_the_base_leave_its_bias_as_it_is(make, state):
    model, x = adapt(make(8, 128)).eval(), torch.randn(3, 128)
    layer = the_layer(model)
    expected, bias = model(x), layer.base_layer.bias.clone()
    layer.enable_adapters(False) if state == "disabled" else layer.merge()
    if make in (linear_dense, conv1d):
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
    else:
        model(x.bfloat16())
    layer.enable_adapters(True) if state == "disabled" else layer.unmerge()
    assert layer.base_layer.bias.dtype == bias.dtype and torch.equal(layer.base_layer.bias, bias)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("make", [linear_dense, conv1d])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("adapters", [1, 2])
def test_a_dense_weight_that_is_trained_beside_its_scales_gets_its_gradient(make, frozen, adapters):
    model, x = adapt(make(8, 128)), torch.randn(3, 128)
    if adapters == 2:
        add_adapter(model, "b", ratio=1.0)
    base, dy = the_layer(model).base_layer, torch.randn(3, 8)
    expected = model(x)
    (expected * dy).sum().backward()
    before = {name: delta_of(model, name).grad.clone() for name in model.peft_config}
    model.zero_grad()
    base.weight.requires_grad_()
    base.bias.requires_grad_()
    for name in model.peft_config:
        delta_of(model, name).requires_grad_(not frozen)
    y = model(x)
    assert torch.equal(y, expected)
    (y * dy).sum().backward()
    scales = the_layer(model).effective_scales(tuple(model.peft_config)).repeat_interleave(64, 1)  # (N, K)
    gradient = (dy.t() @ x) * scales
    found = base.weight.grad.t() if make is conv1d else base.weight.grad
    torch.testing.assert_close(found, gradient)
    torch.testing.assert_close(base.bias.grad, dy.sum(0))
    for name, grad in before.items():
        if frozen:
            assert delta_of(model, name).grad is None
        else:
            torch.testing.assert_close(delta_of(model, name).grad, grad)
    model.merge_adapter()
    assert torch.equal(model(x), expected)


@makers
def test_decoding_sees_what_is_written_through_data(make):
    model, x = adapt(make(8, 128)).eval(), torch.randn(1, 128)
    delta = delta_of(model)
    with torch.no_grad():
        for _ in range(2):
            before = model(x)
        delta.data.copy_(torch.randn_like(delta) * 0.1)  # as averaging callbacks do it
        after = model(x)
        assert not torch.equal(after, before)
        torch.testing.assert_close(after, model(torch.cat([x, x]))[:1])
        for other in (copy.deepcopy(delta), pickle.loads(pickle.dumps(delta))):
            assert torch.equal(other, delta) and not other.__dict__


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        spectral_norm,
        weight_norm,
        parametrizations.weight_norm,
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_nothing_is_merged_where_a_weight_has_come_to_be_computed(change):
    model = adapt(nn.Sequential(linear_dense(8, 128), linear_dense(8, 8)), target_modules=["0.0", "0.1"], ratio=1.0)
    first, second = model.base_model.model[0]
    change(second.base_layer)
    weight = first.base_layer.weight
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"cannot be merged into layer '0\.1': its weight is no parameter"):
            merge()
    assert first.base_layer.weight is weight and not first.merged
