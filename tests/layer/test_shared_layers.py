"""Layers that a model has in several places, and weights that layers share: merged is unmerged, or refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from support.single_layers import adapt, linear_4bit, linear_8bit, linear_dense, the_layer
from torch import nn
from torch.nn.utils import parametrize

from peft_sgrq import SGRQConfig, SGRQLinear

makers = pytest.mark.parametrize("make", [linear_4bit, linear_8bit, linear_dense])
X = torch.randn(4, 64)


class Reusing(nn.Module):
    """One layer in a list twice, in a sequence and by a name."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([layer, layer])
        self.rest = nn.Sequential(nn.Tanh(), layer)
        self.head = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x).tanh()
        return self.head(self.rest(x).tanh())


@makers
def test_a_layer_in_several_places_is_adapted_in_all_of_them(make, tmp_path):
    torch.manual_seed(0)
    layer = make(64, 64)
    plain = Reusing(layer)
    base = copy.deepcopy(plain)
    model: Any = get_peft_model(plain, SGRQConfig(init_weights=False))
    model.train()(X).sum().backward()
    inner = model.base_model.model
    adapted = inner.head
    assert isinstance(adapted, SGRQLinear)
    assert inner.blocks[0] is inner.blocks[1] is inner.rest[1] is adapted
    model.eval()
    with torch.no_grad():
        trained = model(X)
        model.merge_adapter()
        assert torch.equal(model(X), trained)
        model.unmerge_adapter()
        assert torch.equal(model(X), trained)
        model.save_pretrained(tmp_path)
        assert all(".blocks.0." in name for name in load_file(tmp_path / "adapter_model.safetensors"))
        assert torch.equal(PeftModel.from_pretrained(base, tmp_path).eval()(X), trained)
        merged = model.merge_and_unload()
        assert merged.blocks[0] is merged.blocks[1] is merged.rest[1] is merged.head is layer
        assert torch.equal(merged(X), trained)


@makers
def test_unloading_takes_the_adapter_off_everywhere(make):
    layer = make(64, 64)
    model = get_peft_model(Reusing(layer), SGRQConfig(init_weights=False))
    model.add_adapter("other", SGRQConfig(init_weights=False))
    unloaded: Any = model.unload()
    assert not any(isinstance(module, SGRQLinear) for module in unloaded.modules())
    assert unloaded.head is unloaded.rest[1] is layer


@pytest.mark.parametrize("make", [linear_4bit, linear_8bit])
@pytest.mark.parametrize("targets", [["0", "2"], ["0"], ["2"]])
def test_quantized_layers_that_share_a_weight_are_refused(make, targets):
    first, second = make(64, 64), make(64, 64)
    second.weight = first.weight
    with pytest.raises(ValueError, match="'0' and '2' share one quantized weight"):
        get_peft_model(nn.Sequential(first, nn.Tanh(), second), SGRQConfig(target_modules=targets))


def test_dense_layers_that_share_a_weight_are_each_tuned():
    first, second = linear_dense(64, 64), linear_dense(64, 64)
    second.weight = first.weight
    model = get_peft_model(nn.Sequential(first, nn.Tanh(), second), SGRQConfig(init_weights=False)).eval()
    with torch.no_grad():
        trained = model(X)
        assert torch.equal(model.merge_and_unload()(X), trained)


def test_a_block_that_computes_with_its_layers_weights_itself_is_refused():
    def block() -> nn.Module:
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 1)

    with pytest.raises(ValueError, match=r"nn\.TransformerEncoderLayer"):
        get_peft_model(block(), SGRQConfig())
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        model = get_peft_model(block(), SGRQConfig(init_weights=False)).eval()
        x = torch.randn(2, 3, 64)
        with torch.no_grad():
            trained = model(x)
            assert torch.equal(model.merge_and_unload()(x), trained)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


# forward passes that change after the adapter was added


@makers
def test_another_class_after_the_adapter_was_added_is_noticed(make):
    model = adapt(make(64, 64)).eval()
    base = the_layer(model).base_layer
    model(X)
    own = type(base)
    base.__class__ = type("Doubled", (own,), {"forward": lambda self, x: own.forward(self, x) * 2})
    with pytest.raises(RuntimeError, match="has a forward pass of its own"):
        model(X)
    base.__class__ = type("Alike", (own,), {})
    model(X)


@makers
def test_a_class_that_is_changed_after_the_adapter_was_added_is_noticed(make, monkeypatch):
    model = adapt(make(64, 64)).eval()
    cls = type(the_layer(model).base_layer)
    own = cls.forward
    with monkeypatch.context() as patched:
        patched.setattr(cls, "forward", lambda self, x: own(self, x) * 2)
        with pytest.raises(RuntimeError, match="was replaced after the adapter was added"):
            model(X)
    assert torch.equal(copy.deepcopy(model)(X), model(X))


def test_a_parametrization_after_the_adapter_was_added_is_noticed():
    class Twice(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * 2

    model = adapt(linear_dense(64, 64)).eval()
    parametrize.register_parametrization(the_layer(model).base_layer, "weight", Twice())
    with pytest.raises(RuntimeError, match="its weight is no parameter"):
        model(X)
