"""A base layer computes with an adapter as it would alone: forward passes of its own, hooks, arguments."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import get_peft_model
from support.single_layers import adapt, conv1d, linear_4bit, linear_8bit, linear_dense, the_layer
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from transformers.pytorch_utils import Conv1D

from peft_sgrq import SGRQConfig

makers = pytest.mark.parametrize("make", [linear_4bit, linear_8bit, linear_dense, conv1d])


def gained(cls: type, method: str = "forward") -> type:
    """A class derived from a layer's, which computes twice what that does."""

    def doubled(self: Any, x: torch.Tensor) -> torch.Tensor:
        return getattr(cls, method)(self, x) * 2

    return type("Gained", (cls,), {method: doubled})


def refusal(layer: nn.Module) -> str:
    with pytest.raises(ValueError, match="Layer '0' cannot be adapted") as caught:
        get_peft_model(nn.Sequential(layer), SGRQConfig(target_modules=["0"]))
    return str(caught.value)


@makers
@pytest.mark.parametrize("method", ["forward", "__call__", "_call_impl"])
def test_a_class_with_a_forward_pass_of_its_own_is_refused(make, method):
    layer = make(8, 64)
    layer.__class__ = gained(type(layer), method)
    assert "has a forward pass of its own" in refusal(layer)


@makers
def test_a_class_that_adds_none_is_adapted(make):
    layer = make(8, 64)
    layer.__class__ = type("Plain", (type(layer),), {"extra": 1})
    x = torch.randn(3, 64)
    expected = layer.train()(x)
    assert torch.equal(adapt(layer, ratio=1.0).merge_and_unload()[0](x) * 0, expected * 0)


@makers
def test_a_class_whose_forward_pass_somebody_replaced_is_refused(make, monkeypatch):
    layer = make(8, 64)
    own = type(layer).forward
    monkeypatch.setattr(type(layer), "forward", lambda self, x: own(self, x) * 2)
    assert "was replaced by one of" in refusal(layer)


def test_other_linear_classes_of_bitsandbytes_are_refused():
    layer = bnb.nn.OutlierAwareLinear(64, 8)
    assert "OutlierAwareLinear has a forward pass of its own" in refusal(layer)


@makers
@pytest.mark.parametrize("offloaded", [False, True])
def test_a_forward_function_on_the_module_is_refused_and_accelerates_is_not(make, offloaded):
    layer = make(8, 64)
    if offloaded:
        add_hook_to_module(layer, ModelHook())
        adapt(layer)
        layer = make(8, 64)
    own = layer.forward
    layer.forward = lambda x: own(x) * 2
    if offloaded:
        add_hook_to_module(layer, ModelHook())
    assert "a forward function was put onto it" in refusal(layer)


class Twice(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 2


def parametrized(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Twice())
    return layer


@pytest.mark.parametrize(
    "change", [parametrized, parametrizations.weight_norm, lambda layer: prune.l1_unstructured(layer, "weight", 0.5)]
)
def test_a_weight_that_is_computed_at_each_forward_pass_is_refused(change):
    assert "its weight is no parameter" in refusal(change(nn.Linear(64, 8)))


def test_all_layers_of_a_dense_model_are_those_that_compute_as_their_class_does():
    model = nn.Sequential(nn.Linear(64, 64), gained(nn.Linear)(64, 64), Conv1D(8, 64))
    with pytest.warns(UserWarning, match="'1'.*forward pass of its own"):
        adapted = get_peft_model(model, SGRQConfig())
    assert set(adapted.peft_config["default"].target_modules) == {"0", "2"}


HOOKS = {
    "forward": lambda layer: layer.register_forward_hook(lambda module, args, y: y + 1),
    "forward with keywords": lambda layer: layer.register_forward_hook(
        lambda module, args, kwargs, y: y * 2, with_kwargs=True
    ),
    "input": lambda layer: layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "input with keywords": lambda layer: layer.register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True
    ),
    "backward": lambda layer: layer.register_full_backward_hook(lambda module, dx, dy: (dx[0] * 3,)),
    "before backward": lambda layer: layer.register_full_backward_pre_hook(lambda module, dy: (dy[0] * 3,)),
    "every module": lambda layer: nn.modules.module.register_module_forward_hook(
        lambda module, args, y: y * 2 if module is layer else None
    ),
    "accelerate": lambda layer: add_hook_to_module(layer, _Doubling()),
}


class _Doubling(ModelHook):
    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (args[0] * 2, *args[1:]), kwargs


@makers
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_of_the_base_layer_are_called_with_an_adapter_as_without(make, kind):
    model = adapt(make(8, 128))
    plain = outcome(model)
    handle = HOOKS[kind](the_layer(model).base_layer)
    try:
        found = outcome(model)
        assert not all(torch.equal(a, b) for a, b in zip(found, plain, strict=True)), "the hook does nothing"
        model.merge_adapter()
        merged = outcome(model)
        model.unmerge_adapter()
        assert torch.equal(found[0], merged[0])
        assert torch.allclose(found[1], merged[1], rtol=1e-4, atol=1e-3 * float(merged[1].abs().max()))
    finally:
        if hasattr(handle, "remove"):
            handle.remove()


def outcome(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = model(x)
    y.square().sum().backward()
    return y.detach(), x.grad


@makers
def test_decoding_sees_hooks_that_come_and_go(make):
    model = adapt(make(8, 128)).eval()
    x = torch.randn(2, 1, 128)
    with torch.no_grad():
        plain = [model(x) for _ in range(3)][-1]
        handle = the_layer(model).base_layer.register_forward_hook(lambda module, args, y: y * 2)
        assert torch.equal(model(x), plain * 2) and torch.equal(model(x), plain * 2)
        handle.remove()
        assert torch.equal(model(x), plain) and torch.equal(model(x), plain)


@makers
@pytest.mark.parametrize("merged", [False, True])
def test_arguments_besides_the_input_are_refused_as_by_the_layer_itself(make, merged):
    layer = the_layer(adapt(make(8, 128)).eval())
    x = torch.randn(2, 1, 128)
    if merged:
        layer.merge()
    with torch.no_grad():
        for _ in range(2):  # the second time decoding has what it needs
            layer(x)
            with pytest.raises(TypeError, match="more arguments than its input"):
                layer(x, 2)
            with pytest.raises(TypeError, match="'scale'"):
                layer(x, scale=2)


def test_a_forward_function_that_is_put_onto_an_adapted_layer_is_noticed():
    model = adapt(linear_dense(8, 64))
    the_layer(model).base_layer.forward = lambda x: x
    with pytest.raises(RuntimeError, match="a forward function was put onto it"):
        model(torch.randn(3, 64))
