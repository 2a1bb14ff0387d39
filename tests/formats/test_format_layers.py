"""What must hold in every quantized format, on single layers.

The formats are those of `library_formats.py`; one whose library is not installed is skipped by its name.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.library_formats import LAYER_FORMATS, SCALE_FORMATS, Format
from support.oracle import expected, relative_error
from support.single_layers import delta_of, the_layer
from torch import nn

from peft_sgrq import SGRQConfig
from peft_sgrq.formats.registry import is_quantized
from peft_sgrq.layer.functional import effective_scales

ROWS, COLUMNS = 128, 256
by_name = functools.partial(pytest.mark.parametrize, "format", ids=lambda format: format.name)


def quantized(format: Format, bias: bool = False) -> nn.Module:
    """A quantized layer with random weights, in float32 where the format allows it."""
    format.require()
    torch.manual_seed(0)
    dense = nn.Linear(COLUMNS, ROWS, bias=bias, dtype=layer_dtype(format)).requires_grad_(False)
    # Weights grow to the right and downwards, or the units selected might be the first ones, whatever their indices.
    dense.weight *= torch.linspace(0.5, 1.5, COLUMNS) * torch.linspace(0.5, 1.5, ROWS).unsqueeze(1)
    return format.layer(dense).requires_grad_(False)


def layer_dtype(format: Format) -> torch.dtype:
    return torch.bfloat16 if format.name in ("torchao-int4-cpu", "quanto-int4-tinygemm") else torch.float32


def adapted(layer: nn.Module, **config: Any) -> PeftModel:
    settings = {"target_modules": ["0"], "ratio": 0.5, "init_weights": False, **config}
    return get_peft_model(nn.Sequential(layer), SGRQConfig(**settings)).eval()


@by_name(LAYER_FORMATS)
def test_layers_are_found_and_keep_their_bits_at_zero_change(format):
    layer, x = quantized(format, bias=True), torch.randn(5, COLUMNS, dtype=layer_dtype(format))
    assert is_quantized(layer)
    expected = layer(x)
    model = adapted(layer, target_modules=None, init_weights=True)
    assert torch.equal(model(x), expected)
    assert torch.equal(model(x[:1]), layer(x[:1]))


@by_name(LAYER_FORMATS)
def test_a_merged_layer_gives_the_bits_of_the_unmerged_one(format):
    model, x = adapted(quantized(format, bias=True)), torch.randn(5, COLUMNS, dtype=layer_dtype(format))
    base = the_layer(model).base_layer(x)
    unmerged, trained = model(x), model.train()(x).detach()
    assert torch.equal(unmerged, trained) and not torch.equal(unmerged, base)
    model.merge_adapter()
    assert torch.equal(model(x), unmerged)
    model.unmerge_adapter()
    assert torch.equal(the_layer(model).base_layer(x), base)


# Row formats have a backward pass of their own without a bias; all groups are selected by none. Each format has both
# of either; all four pairs stand in the tests of gradients of bitsandbytes and dense layers.
@by_name(LAYER_FORMATS)
@pytest.mark.parametrize(("ratio", "bias"), [(0.5, False), (1.0, True)], ids=["some-no-bias", "all-bias"])
def test_gradients_equal_those_of_the_librarys_own_weight(format, ratio, bias):
    layer, dtype = quantized(format, bias), layer_dtype(format)
    weight = format.weight(layer)
    model = adapted(layer, ratio=ratio).train()
    x = torch.randn(7, COLUMNS, dtype=dtype, requires_grad=True)
    y = model(x)
    dy = torch.randn_like(y)
    (y * dy).sum().backward()

    sgrq = the_layer(model)
    sgrq.merge()
    merged = format.weight(sgrq.base_layer)  # W' is what the library makes of the merged layer
    computed = x.detach() if format.rounded_input is None else format.rounded_input(layer, x.detach())
    reference = expected(computed, dy, weight, merged, *format.maps(ROWS, COLUMNS), layer.bias)
    delta, dim = sgrq.sgrq_delta["default"], sgrq.scaled_weight.unit.dim

    tolerance = 2e-5 if dtype == torch.float32 else 2e-2  # of bfloat16: 2^-8, and sums of such terms
    assert relative_error(y.detach(), reference.y) < tolerance
    assert relative_error(x.grad, reference.dx) < tolerance
    assert relative_error(delta.weight.grad, reference.changes.index_select(dim, delta.units)) < tolerance


def gradients(model: PeftModel, x: torch.Tensor, activation: Callable[[torch.Tensor], torch.Tensor]) -> list[Any]:
    x = x.clone().requires_grad_()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(activation(model(x)).float().square().sum(), [*trained, x]))


@by_name(LAYER_FORMATS)
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_an_output_may_be_written_to_as_that_of_the_base(format, bias):
    model = adapted(quantized(format, bias), ratio=1.0).train()
    x = torch.randn(5, COLUMNS, dtype=layer_dtype(format))
    for pair in zip(gradients(model, x, torch.relu_), gradients(model, x, torch.relu), strict=True):
        assert torch.equal(*pair)


@by_name(SCALE_FORMATS)
def test_a_merge_changes_the_selected_scales_alone_and_unmerging_puts_the_tensors_back(format):
    layer = quantized(format)
    weight = format.weight(layer)
    model = adapted(layer)
    sgrq = the_layer(model)
    before = sgrq.scaled_weight.sources()
    values = [tensor.clone() for tensor in before]
    sgrq.merge()
    assert not any(torch.equal(*pair) for pair in zip(sgrq.scaled_weight.sources()[:1], values[:1], strict=True))
    rows, groups = format.maps(ROWS, COLUMNS)
    selected = torch.zeros(sgrq.scaled_weight.selectable, dtype=torch.bool)
    selected[sgrq.sgrq_delta["default"].units] = True
    untouched = ~(selected[rows].unsqueeze(1) if sgrq.scaled_weight.unit == "row" else selected[groups])
    untouched = untouched.expand(ROWS, COLUMNS)
    assert torch.equal(format.weight(layer)[untouched], weight[untouched])
    sgrq.unmerge()
    after = sgrq.scaled_weight.sources()
    assert all(old is new for old, new in zip(before, after, strict=True)) or format.name == "bnb-nf4"
    assert all(torch.equal(old, new) for old, new in zip(values, after, strict=True))
    assert torch.equal(format.weight(layer), weight)


@by_name(SCALE_FORMATS)
@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_scales_in_effect_are_ones_that_the_format_can_store(format, ratio):
    layer = the_layer(adapted(quantized(format), ratio=ratio))
    delta = layer.sgrq_delta["default"]
    groups = None if ratio == 1 else delta.units
    scales = effective_scales(layer.scaled_weight, delta.weight.detach(), groups)
    assert not torch.equal(scales, layer.scaled_weight.scales())
    assert torch.equal(layer.scaled_weight.round_to_storage(scales), scales)


@by_name(SCALE_FORMATS)
def test_rounding_is_in_the_forward_pass_and_not_in_the_gradient(format):
    layer = quantized(format)
    model = adapted(layer, init_weights=True, ratio=1.0).train()
    scaled_weight, delta = the_layer(model).scaled_weight, delta_of(model)
    if scaled_weight.storage_dtype == torch.float32:
        scales = scaled_weight.scales() * 1.2345
        assert torch.equal(scaled_weight.round_to_storage(scales), scales)
        return
    x = torch.randn(5, COLUMNS, dtype=layer_dtype(format))
    base = layer(x)
    with torch.no_grad():
        delta.fill_(1e-4)  # far below half a step of bfloat16 or e4m3
    y = model(x)
    y.float().square().sum().backward()
    assert torch.equal(y, base)
    assert delta.grad.abs().max() > 0


@by_name(SCALE_FORMATS)
def test_a_merged_layer_can_be_moved_copied_and_unmerged(format):
    layer, x = quantized(format, bias=True), torch.randn(5, COLUMNS, dtype=layer_dtype(format))
    base = layer(x)
    model = adapted(layer)
    unmerged = model(x)
    model.merge_adapter()
    model.to("cpu")
    # quanto's tensors cannot be copied, with or without an adapter
    for one in (model,) if format.library == "optimum" else (model, copy.deepcopy(model)):
        assert torch.equal(one(x), unmerged)
        one.unmerge_adapter()
        assert torch.equal(one(x), unmerged)
        with one.disable_adapter():
            assert torch.equal(one(x), base)


# float8 weights cannot be converted, with or without an adapter.
CONVERTIBLE = [format for format in SCALE_FORMATS if format.library == "torchao" and "float8" not in format.name]


@by_name([format for format in CONVERTIBLE if format.name != "torchao-int4-cpu"])
def test_a_merged_torchao_layer_can_be_converted_and_unmerged(format):
    x = torch.randn(5, COLUMNS, dtype=torch.bfloat16)
    plain, model = (adapted(quantized(format, bias=True)) for _ in range(2))
    delta_of(model).data.copy_(delta_of(plain).data)
    plain.to(torch.bfloat16)
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    assert torch.equal(model(x), plain(x))
