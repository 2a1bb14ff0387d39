"""Each delta that takes part in training gets a gradient in the first backward pass, or an error names its layer."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from support.single_layers import linear_4bit, linear_dense
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_sgrq import SGRQConfig


class Net(nn.Module):
    """A layer, two branches and a layer; what happens to the branches is `way`'s."""

    def __init__(self, way: Any) -> None:
        super().__init__()
        self.first, self.left, self.right, self.last = (linear_4bit(64, 64) for _ in range(4))
        self.way = way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.last(x + self.way(self, x))


def not_recorded(net: Net, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return net.left(x)


def reentrant(part: Any) -> Any:
    return lambda net, x: checkpoint(lambda z: part(net, z), x, use_reentrant=True)


def recomputed(part: Any) -> Any:
    return lambda net, x: checkpoint(lambda z: part(net, z), x, use_reentrant=False)


def both(net: Net, x: torch.Tensor) -> torch.Tensor:
    return net.left(x) + net.right(x)


def one_lost(net: Net, x: torch.Tensor) -> torch.Tensor:
    return net.left(x).detach() + net.right(x)


def adapted(way: Any) -> Any:
    return get_peft_model(Net(way), SGRQConfig(ratio=0.5)).train()


def injected(way: Any) -> Any:
    """As transformers' `add_adapter` does it: layers in a model that PEFT does not wrap."""
    return inject_adapter_in_model(SGRQConfig(ratio=0.5), Net(way)).train()


def steps(model: Any, count: int = 2) -> None:
    for _ in range(count):
        model(torch.randn(3, 64, requires_grad=True)).square().sum().backward()


@pytest.mark.parametrize("way", [one_lost, reentrant(one_lost), recomputed(one_lost), not_recorded])
def test_a_delta_without_a_gradient_is_an_error_that_names_its_layer(way):
    with pytest.raises(RuntimeError, match=r"No gradient reached the deltas of 1 layers .*'left'"):
        steps(adapted(way))


@pytest.mark.parametrize("made", [adapted, injected])
@pytest.mark.parametrize("way", [one_lost, reentrant(one_lost), recomputed(one_lost)])
def test_it_is_found_in_the_first_backward_pass(way, made):
    with pytest.raises(RuntimeError, match="'left'"):
        steps(made(way), count=1)


@pytest.mark.parametrize("made", [adapted, injected])
@pytest.mark.parametrize("way", [both, reentrant(both), recomputed(both)])
def test_training_that_reaches_every_delta_goes_on(way, made):
    model = made(way)
    steps(model, count=3)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters() if p.requires_grad), "hooks are left"


def test_an_expert_without_tokens_may_have_no_gradient_until_it_gets_some():
    used = [True, False]
    model = adapted(
        lambda net, x: sum(layer(x) for layer, use in zip((net.left, net.right), used, strict=True) if use)
    )
    steps(model)
    used[1] = True
    steps(model)
    model = adapted(lambda net, x: net.left(x) + (net.right(x).detach() if used[1] else 0))
    used[1] = False
    steps(model)
    used[1] = True
    with pytest.raises(RuntimeError, match="'right'"):
        steps(model)


def test_frozen_deltas_and_adapters_that_are_not_active_are_not_watched():
    model = adapted(one_lost)
    model.base_model.model.left.sgrq_delta["default"].weight.requires_grad_(False)
    steps(model)
    model = adapted(both)
    model.add_adapter("other", SGRQConfig())
    steps(model)


def test_gradients_of_inputs_and_passes_without_a_backward_pass_are_no_training():
    model = adapted(both)
    x = torch.randn(3, 64, requires_grad=True)
    torch.autograd.grad(model(x).sum(), x)
    torch.autograd.grad(model(x).sum(), model.base_model.model.last.sgrq_delta["default"].weight)
    model(x)
    with torch.no_grad():
        model(x)
    steps(model)


def test_adapters_that_are_injected_one_after_another_are_watched_alike():
    model = inject_adapter_in_model(SGRQConfig(target_modules=["left"]), Net(one_lost))
    model = inject_adapter_in_model(SGRQConfig(target_modules=["first", "last"]), model, adapter_name="other").train()
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.dtype == torch.float32 and parameter.dim() == 2:
            parameter.requires_grad_(True)
    for layer in (model.first, model.left, model.last):
        layer.set_adapter(["default", "other"])
    with pytest.raises(RuntimeError, match=r"1 layers .*'left'"):
        steps(copy.deepcopy(model), count=1)


@pytest.mark.parametrize("made", [adapted, injected])
@pytest.mark.parametrize("some", [["first"], ["last"], ["left", "last"]])
def test_a_backward_pass_to_some_deltas_says_nothing_of_the_others(made, some):
    model = made(both)
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    inputs = [parameter for name, parameter in named.items() if any(f"{part}." in name for part in some)]
    for _ in range(3):
        model(torch.randn(3, 64)).square().sum().backward(inputs=inputs)
    assert sum(parameter.grad is not None for parameter in named.values()) == len(some)
    steps(model, count=3)
    assert all(parameter.grad is not None for parameter in named.values())
    model = made(one_lost)
    inputs = [parameter for name, parameter in model.named_parameters() if "last.sgrq" in name]
    model(torch.randn(3, 64)).square().sum().backward(inputs=inputs)
    with pytest.raises(RuntimeError, match="'left'"):
        steps(model, count=1)


def test_several_forward_passes_before_their_backward_passes_are_told_apart():
    used = [False]
    model = adapted(lambda net, x: net.left(x) + (net.right(x) if used[0] else 0))
    x = torch.randn(3, 64)
    one = model(x).sum()
    used[0] = True
    other = model(x).sum()
    one.backward()
    other.backward()
    (model(x).sum() + model(x).sum()).backward()


def test_two_backward_passes_of_one_forward_pass_may_reach_half_of_the_deltas_each():
    model = adapted(lambda net, x: net.left(x))
    middle: list[torch.Tensor] = []
    model.base_model.model.last.register_forward_pre_hook(lambda module, args: middle.append(args[0]))
    y = model(torch.randn(3, 64))
    middle[0].sum().backward(retain_graph=True)
    y.sum().backward()
    steps(model)
    assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad and "right" not in n)


def test_an_output_that_is_held_and_never_used_is_an_error_in_the_next_step():
    held = []
    model = adapted(lambda net, x: held.append(net.right(x)) or net.left(x))
    steps(model, count=1)
    held.clear()
    with pytest.raises(RuntimeError, match="'right'"):
        steps(model, count=1)


def test_layers_of_a_forward_pass_without_a_backward_pass_are_not_waited_for():
    used = [True]
    model = adapted(lambda net, x: net.left(x) + (net.right(x) if used[0] else 0))
    model(torch.randn(3, 64))
    used[0] = False
    steps(model)


def test_experts_that_are_called_without_tokens_have_no_gradient():
    def some(net: Net, x: torch.Tensor) -> torch.Tensor:
        net.right(x[:0])
        return net.left(x)

    steps(adapted(some))


def test_the_names_in_the_error_are_what_exclude_modules_takes():
    class Tower(nn.Module):
        """Gives the output of the block before the last, as vision towers do."""

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(*(linear_dense(64, 64) for _ in range(7))) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            states = [x]
            for block in self.blocks:
                states.append(block(states[-1]))
            return states[-2]

    with pytest.raises(RuntimeError) as caught:
        steps(get_peft_model(Tower(), SGRQConfig()).train())
    names = re.findall(r"'(blocks[^']*)'", str(caught.value))
    assert names == [f"blocks.2.{index}" for index in range(7)]
    steps(get_peft_model(Tower(), SGRQConfig(exclude_modules=names)).train())


def test_a_copy_in_the_middle_of_a_step_is_watched_on_its_own():
    model = adapted(one_lost)
    model(torch.randn(3, 64))
    other = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="'left'"):
        steps(other, count=1)


# layers that a model passes by


class Reader(nn.Module):
    """Computes with the weight of a layer itself, in training or in inference."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = linear_dense(64, 64), linear_dense(64, 64)
        self.itself = [True, False]  # whether it reads, by `self.training`

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.last(self.first(x).to(self.last.weight.dtype))  # which models look at, too
        return nn.functional.linear(x, self.first.weight) if self.itself[self.training] else x


@pytest.mark.parametrize("by_peft", [True, False])
def test_a_model_that_computes_with_a_weight_past_its_adapter_is_told_by_name(by_peft, recwarn):
    class Other(Reader):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.last(x), self.first.weight)

    config = SGRQConfig(init_weights=False)
    made = get_peft_model if by_peft else lambda model, config: inject_adapter_in_model(config, model)
    model = made(Other(), config)
    with pytest.raises(RuntimeError, match=r"read the weight of 1 layers .*\('first'\), expected a call"):
        steps(model.train(), count=1)
    with torch.no_grad(), pytest.warns(UserWarning, match=r"\('first'\), expected a call"):
        model.eval()(torch.randn(3, 64))
    made(Other(), SGRQConfig(exclude_modules=["first"])).train()(torch.randn(3, 64)).sum().backward()
    recwarn.clear()
    model = made(Reader(), config)
    steps(model.train())
    model.eval()(torch.randn(3, 64))
    assert not [warning for warning in recwarn if "read the weight" in str(warning.message)]
