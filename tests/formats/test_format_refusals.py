"""Layers of the optional formats that cannot be tuned are refused with the reason, and loading code is true."""

from __future__ import annotations

import ast
import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from peft import get_peft_model
from support.library_formats import FORMATS, LAYER_FORMATS, Format
from torch import nn

from peft_sgrq import SGRQConfig
from peft_sgrq.formats.loading import quantization_code, spoken
from peft_sgrq.formats.registry import resolve_weight

BY_NAME = {format.name: format for format in FORMATS}


def refused(layer: nn.Module, match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        get_peft_model(nn.Sequential(layer.requires_grad_(False)), SGRQConfig())
    assert "'0'" in str(caught.value) and "The model was not changed" in str(caught.value)


def torchao_layer(config: Any, dense: nn.Linear | None = None) -> nn.Module:
    from torchao.quantization import quantize_

    model = nn.Sequential(dense or nn.Linear(256, 128, bias=False))
    quantize_(model, config)
    return model[0]


def test_mx_formats_are_refused_because_their_scales_are_powers_of_two():
    pytest.importorskip("torchao")
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    layer = nn.Linear(256, 128, bias=False)
    weight = MXTensor.to_mx(layer.weight.detach().bfloat16(), torch.float8_e4m3fn, 32)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    refused(layer, "powers of two")


def test_a_torchao_tensor_without_tunable_scales_is_refused_by_its_name():
    pytest.importorskip("torchao")
    from torchao.utils import TorchAOBaseTensor

    class Codebook(TorchAOBaseTensor):
        tensor_data_names = ["qdata"]
        tensor_attribute_names: list[str] = []

        def __new__(cls, qdata):
            return torch.Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=torch.float32)

        def __init__(self, qdata):
            self.qdata = qdata

    layer = nn.Linear(256, 128, bias=False)
    layer.weight = nn.Parameter(Codebook(torch.zeros(128, 256)), requires_grad=False)
    refused(layer, "its weight is torchao's Codebook, expected Int8Tensor")


def test_torchao_weights_with_an_activation_scale_are_refused():
    pytest.importorskip("torchao")
    layer = BY_NAME["torchao-int8-row"].layer(nn.Linear(256, 128, bias=False))
    layer.weight.act_pre_scale = torch.ones(256)
    refused(layer, "pre-scale")


@pytest.mark.parametrize(("axis", "shape"), [(0, (96, 256)), (1, (128, 96))])
def test_hqq_groups_that_straddle_are_refused(axis, shape):
    pytest.importorskip("hqq")
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=64, axis=axis)
    layer = HQQLinear(nn.Linear(shape[1], shape[0]), config, compute_dtype=torch.float32, device="cpu")
    refused(layer, ("out_features=96", "in_features=96")[axis] + ".*straddle")


def test_hqq_with_one_scale_for_all_is_refused():
    pytest.importorskip("hqq")
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    config["weight_quant_params"]["channel_wise"] = False
    layer = HQQLinear(nn.Linear(256, 128), config, compute_dtype=torch.float32, device="cpu")
    refused(layer, "channel_wise=True")


def test_quanto_layers_are_refused_until_they_are_frozen_and_with_quantized_activations():
    pytest.importorskip("optimum.quanto")
    from optimum.quanto import freeze, qint8, quantize

    model = nn.Sequential(nn.Linear(256, 128))
    quantize(model, weights=qint8)
    refused(model[0], r"freeze\(model\)")
    model = nn.Sequential(nn.Linear(256, 128))
    quantize(model, weights=qint8, activations=qint8)
    freeze(model)
    refused(model[0], "activations are quantized to qint8")


def test_nvfp4_scales_stay_on_their_grid_and_in_their_range():
    format = BY_NAME["torchao-nvfp4"]
    format.require()
    scaled_weight = resolve_weight(format.layer(nn.Linear(256, 128, bias=False)), 64)
    scales = scaled_weight.scales()
    assert torch.equal(scaled_weight.round_to_storage(scales), scales)
    wild = scales * torch.tensor([1e6, -1.0]).repeat(scaled_weight.scales_shape[1] // 2)
    found = scaled_weight.round_to_storage(wild)
    assert torch.isfinite(found).all() and (found >= 0).all()
    assert torch.equal(scaled_weight.round_to_storage(found), found)


def test_torchaos_plain_int4_layout_is_read_and_written_right():
    """Its kernel (mslk) is for GPUs; codes, scales, offsets and the undo need none."""
    pytest.importorskip("torchao")
    from torchao.quantization import Int4Tensor

    rows, columns, size = 8, 64, 32
    codes = torch.randint(-8, 8, (rows, columns), dtype=torch.int8)
    packed = (codes[:, ::2] & 15) | (codes[:, 1::2] << 4)
    scale, zero = torch.rand(2, columns // size, rows).add(0.1).bfloat16().unbind()
    layer = nn.Linear(columns, rows, bias=False)
    weight = Int4Tensor(packed, scale, zero, [1, size], torch.Size((rows, columns)))
    layer.weight = nn.Parameter(weight, requires_grad=False)

    def dequantized(weight: Any) -> torch.Tensor:
        spread = [part.float().t().repeat_interleave(size, 1) for part in (weight.scale, weight.zero_point)]
        return codes * spread[0] + spread[1]

    scale, zero = layer.weight.scale, layer.weight.zero_point
    before, scaled_weight = dequantized(layer.weight), resolve_weight(layer, 64)
    assert torch.equal(scaled_weight.dequantize(scaled_weight.scales(), torch.float32), before)
    product = scaled_weight.codes(None, torch.float32) * scaled_weight.scales().repeat_interleave(size, 1)
    assert torch.allclose(product, before, atol=1e-5)
    scales = scaled_weight.round_to_storage(scaled_weight.scales() * 1.5)
    expected = scaled_weight.dequantize(scales, torch.float32)
    stored = scaled_weight.write_scales(scales)
    assert torch.equal(dequantized(layer.weight), expected)
    assert torch.allclose(expected, before * 1.5, rtol=2e-2, atol=2e-2)
    scaled_weight.restore_scales(stored)
    assert layer.weight.scale is scale and layer.weight.zero_point is zero


@pytest.mark.parametrize("name", ["torchao-int8-dynamic", "torchao-intx4-dynamic"])
def test_training_around_a_layer_that_loses_the_gradient_is_refused(name):
    format = BY_NAME[name]
    format.require()
    layers = [format.layer(nn.Linear(256, 256)).requires_grad_(False) for _ in range(3)]
    with pytest.raises(ValueError, match="Layer '1' quantizes its activations and is not targeted"):
        get_peft_model(nn.Sequential(*layers), SGRQConfig(target_modules=["0", "2"]))
    assert all(type(layer) is nn.Linear for layer in layers)
    get_peft_model(nn.Sequential(*layers), SGRQConfig(target_modules=["0", "2"], inference_mode=True))
    model = get_peft_model(nn.Sequential(*layers), SGRQConfig(target_modules=["0", "1", "2"])).train()
    model(torch.randn(4, 256)).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("format", LAYER_FORMATS, ids=lambda format: format.name)
def test_quantizing_code_is_python_and_makes_the_same_format(format: Format):
    format.require()
    dtype = torch.bfloat16 if format.name in ("torchao-int4-cpu", "quanto-int4-tinygemm") else torch.float32
    dense = nn.Linear(256, 128, bias=False, dtype=dtype)
    scaled_weight = resolve_weight(format.layer(copy.deepcopy(dense)), 64)
    assert spoken(scaled_weight.name).startswith("quantized with ")
    code = quantization_code(scaled_weight.quantization())
    names: dict[str, Any] = {"base": nn.Sequential(dense)}
    for library, imported in code.names.items():
        exec(f"from {library} import {', '.join(imported)}", names)
    if format.library == "hqq":  # which quantizes models of transformers alone
        assert all(ast.parse(statement) for statement in code.statements)
    elif format.name != "torchao-intx1":  # whose mapping cannot be told from the layer
        exec("\n".join(code.statements), names)
        again = resolve_weight(names["base"][0], 64)
        assert (again.name, type(again.module.weight)) == (scaled_weight.name, type(scaled_weight.module.weight))


_NOTHING_IMPORTED = """
import sys
from torch import nn
from peft_sgrq.formats.registry import is_quantized
before = set(sys.modules)
assert not is_quantized(nn.Linear(4, 4))
found = {name.partition(".")[0] for name in set(sys.modules) - before}
assert not found & {"torchao", "hqq", "optimum"}, found
"""


@pytest.mark.slow
def test_looking_for_layers_imports_no_optional_library():
    subprocess.run([sys.executable, "-c", _NOTHING_IMPORTED], check=True, capture_output=True)
