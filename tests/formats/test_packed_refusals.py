"""GPTQ, AWQ and AutoRound layers that are refused, each with a sentence that says what to do."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from support.packed_layers import packed_layer, require
from torch import nn

from peft_sgrq import SGRQConfig


def refused(layer: nn.Module) -> str:
    with pytest.raises(ValueError) as error:
        get_peft_model(nn.Sequential(layer), SGRQConfig(target_modules=["0"]))
    assert "Layer '0' cannot be adapted" in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "kernel",
    ["torch_fused.TorchFusedLinear", "torch_aten_kernel.TorchAtenLinear", "torch_cpu_avx512.TorchCpuAvx512Linear"],
)
def test_gptq_kernels_without_gradients_are_refused_with_the_argument_that_loads_the_right_one(kernel):
    require("gptq")
    file, name = kernel.split(".")
    made = _kernel(file, name)
    message = refused(made)
    assert name in message and 'GPTQConfig(bits=..., backend="torch")' in message


@pytest.mark.parametrize(
    "kernel",
    [
        "torch_fused_awq.TorchFusedAwqLinear",
        "torch_aten_kernel_awq.TorchAtenAwqLinear",
        "torch_cpu_avx512_awq.TorchCpuAvx512AwqLinear",
    ],
)
def test_awq_kernels_without_gradients_are_refused_with_the_argument_that_loads_the_right_one(kernel):
    require("awq")
    file, name = kernel.split(".")
    message = refused(_kernel(file, name))
    assert name in message and 'AwqConfig(bits=..., backend="torch_awq")' in message


def _kernel(file: str, name: str) -> nn.Module:
    """A layer of the class, without its constructor: some need an instruction set of the CPU, the refusal does not."""
    from importlib import import_module

    layer = packed_layer("awq" if file.endswith("_awq") else "gptq").layer
    layer.__class__ = getattr(import_module(f"gptqmodel.nn_modules.qlinear.{file}"), name)
    return layer


def test_an_autoround_kernel_of_another_package_is_refused_with_the_argument_that_loads_the_right_one():
    require("autoround")
    made = packed_layer("autoround").layer
    other = type("QuantLinearGPTQ", (type(made),), {"__module__": "auto_round_kernel.qlinear"})
    made.__class__ = other
    message = refused(made)
    assert "QuantLinearGPTQ" in message and 'AutoRoundConfig(backend="torch")' in message


def test_bit_planes_are_refused():
    require("gptq")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    layer = TorchLinear(bits=5, group_size=32, sym=False, desc_act=False, in_features=128, out_features=64)
    assert "5-bit codes are packed as bit planes" in refused(layer)


@pytest.mark.parametrize(
    ("index", "said"),
    [(torch.zeros(128), "puts 128 columns into one group"), (torch.full((128,), 9), "names groups 9 to 9")],
)
def test_an_index_that_is_no_map_of_groups_is_refused(index, said):
    made = packed_layer("gptq")
    made.layer.g_idx.copy_(index)
    assert said in refused(made.layer)


def test_scales_of_another_shape_are_refused():
    made = packed_layer("gptq")
    made.layer.scales = made.layer.scales[:2]
    assert "its scales have shape (2, 64), expected (groups, out_features) = (4, 64)" in refused(made.layer)


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_a_layer_with_an_adapter_of_gptqmodels_own_is_refused(kind):
    require(kind)
    layer = packed_layer(kind).layer
    layer.adapter = object()
    assert "it carries an adapter of GPTQModel's own" in refused(layer)
