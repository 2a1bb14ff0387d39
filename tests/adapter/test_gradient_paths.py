"""Training around a layer without an adapter that loses the gradient of its input is refused, whatever it is."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from support.library_formats import FORMATS
from support.single_layers import linear_dense
from torch import nn

from peft_sgrq import SGRQConfig
from peft_sgrq.adapter.gradient_paths import lost_gradient


class Rounded(nn.Linear):
    """Rounds its input without a gradient, as quantized activations are in libraries for inference."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = x.detach().abs().amax() / 127
        return super().forward((x / scale).round() * scale)


class Unrecorded(nn.Linear):
    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


@pytest.mark.parametrize("cls", [Rounded, Unrecorded])
def test_training_around_any_layer_that_loses_the_gradient_is_refused(cls):
    model = nn.Sequential(linear_dense(64, 64), cls(64, 64), linear_dense(64, 64))
    with pytest.raises(ValueError, match="Layer '1' loses the gradient of its input"):
        get_peft_model(model, SGRQConfig(target_modules=["0", "2"]))
    get_peft_model(model, SGRQConfig(target_modules=["0", "2"], inference_mode=True))


def test_a_refused_format_that_loses_the_gradient_is_not_harmless():
    torchao = next(format for format in FORMATS if format.name == "torchao-int8-dynamic")
    torchao.require()
    layer = torchao.layer(nn.Linear(256, 128, bias=False))
    layer.weight.act_pre_scale = torch.ones(256)  # refused, and its activations are quantized
    assert "loses the gradient of its input" in str(lost_gradient("1", layer, 64))
    weights_alone = next(format for format in FORMATS if format.name == "torchao-int8-row").layer(nn.Linear(256, 128))
    weights_alone.weight.act_pre_scale = torch.ones(256)  # refused, too, but the gradient passes
    assert lost_gradient("1", weights_alone, 64) is None


def test_a_layer_that_only_looks_otherwise_may_be_left_out():
    class Gain(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).relu() * 2

    model = nn.Sequential(linear_dense(64, 64), Gain(64, 64), linear_dense(64, 64))
    model = get_peft_model(model, SGRQConfig(target_modules=["0", "2"])).train()
    model(torch.randn(4, 64)).square().sum().backward()
