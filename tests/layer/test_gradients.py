"""Gradients of deltas and inputs against float64 references."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.bases import DENSE, INT8, NF4, NF4_NESTED, adapted, train_steps
from support.oracle import expected_of, relative_error
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

TOLERANCE = 1e-5  # of float32 arithmetic against float64
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
quick = settings(max_examples=40, deadline=None, derandomize=True)


def check_gradients(model: Any, *shape: int, tolerance: float = TOLERANCE) -> None:
    """Compares the output and every gradient of a model of one layer with the reference, on random `x` and `dy`."""
    layer = the_layer(model)
    x = torch.randn(*shape, layer.in_features, requires_grad=True)
    dy = torch.randn(*shape, layer.out_features)
    y = model(x)
    (y * dy).sum().backward()
    expected, dx, ddeltas = expected_of(model, x, dy)
    assert relative_error(y.detach(), expected) < tolerance
    assert x.grad.dtype == x.dtype
    assert relative_error(x.grad, dx) < tolerance
    for name, ddelta in ddeltas.items():
        gradient = delta_of(model, name).grad
        assert gradient.dtype == torch.float32
        assert relative_error(gradient, ddelta) < tolerance


@pytest.mark.usefixtures("eager")  # bitsandbytes compiles blocks of 2048 and more on CPUs with AVX512, for 10 s
@pytest.mark.parametrize(  # every block size of both codes and of both kinds of scales, and the other two pairs
    ("quant_type", "nested", "block"),
    [
        *(("nf4", False, block) for block in BLOCK_SIZES),
        *(("fp4", True, block) for block in BLOCK_SIZES),
        ("nf4", True, 64),
        ("fp4", False, 64),
    ],
    ids=lambda value: {False: "plain", True: "nested"}[value] if isinstance(value, bool) else None,
)
def test_gradients_of_4bit_layers_equal_the_reference(quant_type, nested, block):
    layer = linear_4bit(16, block * (4 if block <= 256 else 2), quant_type, block, nested)
    weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    model = adapt(layer)
    scaled_weight = the_layer(model).scaled_weight
    product = scaled_weight.codes(None, torch.float32).view(16, -1, block) * scaled_weight.scales().unsqueeze(-1)
    assert torch.equal(product.flatten(1), weight), "codes and scales are not those bitsandbytes computes with"
    check_gradients(model, 5)


@pytest.mark.parametrize("shape", [(7,), (2, 3)], ids=["2d", "3d"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("kind", ["nf4", "int8", "dense", "ragged"])
def test_gradients_equal_the_reference(kind, bias, shape):
    layer = {
        "nf4": lambda: linear_4bit(12, 256, bias=bias),
        "int8": lambda: linear_8bit(12, 50, bias=bias),
        "dense": lambda: linear_dense(12, 256, bias=bias),
        "ragged": lambda: linear_dense(12, 150, bias=bias),  # groups of 64, 64 and 22 columns
    }[kind]()
    check_gradients(adapt(layer), *shape)


@pytest.mark.parametrize("shape", [(7,), (2, 3)], ids=["2d", "3d"])
@pytest.mark.parametrize("groups", [[0], [2], [0, 2], [0, 1, 2]], ids=str)
def test_gradients_of_conv1d_equal_the_reference(groups, shape):
    check_gradients(adapt(conv1d(12, 150), groups), *shape)


@pytest.mark.parametrize("groups", [[0], [2], [1, 2], [0, 1, 2]], ids=str)
def test_gradients_of_a_ragged_last_group_equal_the_reference(groups):
    check_gradients(adapt(linear_dense(8, 150), groups), 6)


@pytest.mark.parametrize("kind", ["nf4", "nf4-nested", "int8", "dense"])
def test_gradients_of_overlapping_adapters_equal_the_reference(kind):
    layer = linear_8bit(8, 40) if kind == "int8" else linear_dense(8, 256)
    if kind.startswith("nf4"):
        layer = linear_4bit(8, 256, nested=kind.endswith("nested"))
    model = adapt(layer, [0, 1])
    add_adapter(model, "b", [1, 3])
    add_adapter(model, "c", [3])
    check_gradients(model, 6)


@quick
@given(st.data())
def test_gradients_equal_the_reference_whatever_the_shape(data):
    kind = data.draw(st.sampled_from(["nf4", "fp4", "int8", "dense", "conv1d"]))
    rows, tokens = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 9))
    bias, ratio = data.draw(st.booleans()), data.draw(st.floats(0.01, 1.0))
    config: dict[str, Any] = {"ratio": ratio}
    torch.manual_seed(data.draw(st.integers(0, 99)))
    if kind in ("nf4", "fp4"):
        block = data.draw(st.sampled_from([32, 64, 128]))
        layer = linear_4bit(
            rows, block * data.draw(st.integers(1, 5)), kind, block, nested=data.draw(st.booleans()), bias=bias
        )
    else:
        columns = data.draw(st.integers(1, 100))
        config["group_size"] = data.draw(st.integers(1, 120))
        layer = {"int8": linear_8bit, "dense": linear_dense}.get(kind, lambda *size, bias: conv1d(*size))(
            rows, columns, bias=bias
        )
    # With a few products a sum may cancel by chance, so the bound is that of the other tests times ten.
    check_gradients(adapt(layer, **config), tokens, tolerance=10 * TOLERANCE)


@pytest.mark.parametrize("kind", ["dense", "nf4", "int8"])
def test_gradients_are_finite_differences(kind):
    # The loss is affine in a delta, so a large power of two as the step has no truncation error.
    layer = {
        "dense": lambda: linear_dense(4, 48, dtype=torch.float64),
        "nf4": lambda: linear_4bit(4, 192),
        "int8": lambda: linear_8bit(4, 48),
    }[kind]()
    model = adapt(layer, group_size=16)
    delta, dtype = delta_of(model), torch.float64 if kind == "dense" else torch.float32
    with torch.no_grad():
        delta.copy_((delta * 1024).round() / 1024)
    x, dy = torch.randn(3, the_layer(model).in_features, dtype=dtype), torch.randn(3, 4, dtype=dtype)
    (model(x) * dy).sum().backward()
    differences = torch.zeros_like(delta, dtype=torch.float64)
    with torch.no_grad():
        for index in range(delta.numel()):
            losses = []
            for step in (0.5, -1.0):
                delta.view(-1)[index] += step
                losses.append((model(x).double() * dy.double()).sum())
            delta.view(-1)[index] += 0.5
            differences.view(-1)[index] = losses[0] - losses[1]
    assert relative_error(delta.grad, differences) < (1e-6 if kind == "dense" else TOLERANCE)


@pytest.mark.parametrize("base", [NF4, INT8, DENSE], ids=lambda base: base.name)
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing_changes_nothing(llama_dir, ids, base, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = adapted(base, llama_dir).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0] and all(gradient.abs().max() > 0 for gradient in gradients[0].values())
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


KINDS = ["nf4", "nf4-nested", "int8", "int8-no-bias", "dense", "ragged", "conv1d"]


@pytest.mark.parametrize(  # every kind in parts of every size, and every selection where parts are cut otherwise
    ("kind", "groups", "temporary"),
    [
        *((kind, [0, 2], temporary) for kind in KINDS for temporary in (1, 1000, 5000)),
        *((kind, groups, 1000) for kind in ("nf4", "int8", "ragged") for groups in ([0], [2], [0, 1, 2])),
    ],
    ids=str,
)
def test_gradients_made_in_parts_equal_the_reference(monkeypatch, kind, groups, temporary):
    layer = {
        "nf4": lambda: linear_4bit(12, 192),
        "nf4-nested": lambda: linear_4bit(12, 192, nested=True),
        "int8": lambda: linear_8bit(12, 50),
        "int8-no-bias": lambda: linear_8bit(12, 50, bias=False),
        "dense": lambda: linear_dense(12, 192),
        "ragged": lambda: linear_dense(12, 150),
        "conv1d": lambda: conv1d(12, 150),
    }[kind]()
    monkeypatch.setattr("peft_sgrq.layer.gradients._TEMPORARY_BYTES", temporary)
    check_gradients(adapt(layer, groups), 7)


@pytest.mark.parametrize("make", [linear_4bit, linear_8bit, linear_dense])
def test_frozen_adapters_get_no_gradient(make):
    model = adapt(make(8, 192), [0, 1])
    add_adapter(model, "b", [1, 2])
    x = torch.randn(5, 192)
    model(x).square().sum().backward()
    expected = delta_of(model, "b").grad.clone()
    model.zero_grad()
    model.set_requires_grad("default", False)
    model(x).square().sum().backward()
    assert delta_of(model).grad is None
    assert torch.equal(delta_of(model, "b").grad, expected)
    model.zero_grad()
    model.set_adapter("default")
    model(x).square().sum().backward()
    assert delta_of(model, "b").grad is None and delta_of(model).grad.abs().max() > 0


@pytest.mark.parametrize("make", [linear_4bit, linear_8bit, linear_dense])
def test_the_input_gets_its_gradient_from_a_frozen_adapter_too(make):
    model = adapt(make(8, 192))
    x = torch.randn(5, 192, requires_grad=True)
    model(x).sum().backward()
    expected, x.grad = x.grad, None
    model.requires_grad_(False)
    model(x).sum().backward()
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("make", [linear_4bit, linear_8bit, linear_dense, conv1d])
def test_autocast_bfloat16_gives_float32_gradients_near_the_reference(make):
    model = adapt(make(8, 192))
    layer = the_layer(model)
    x, dy = torch.randn(40, 192, requires_grad=True), torch.randn(40, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        assert y.dtype == layer.base_layer(x).dtype
        (y * dy).sum().backward()
    _, dx, ddeltas = expected_of(model, x, dy)
    assert x.grad.dtype == delta_of(model).grad.dtype == torch.float32
    assert relative_error(x.grad, dx) < 0.02  # bfloat16 has 8 bits
    assert relative_error(delta_of(model).grad, ddeltas["default"]) < 0.02


@pytest.mark.parametrize("base", [NF4_NESTED, INT8, DENSE], ids=lambda base: base.name)
def test_training_under_autocast_lowers_the_loss(llama_dir, ids, base):
    model = adapted(base, llama_dir, random=False)
    with torch.autocast("cpu", torch.bfloat16):
        losses = train_steps(model, ids, steps=5)
    assert losses[-1] < losses[0] - 0.01
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("make", [linear_4bit, linear_8bit, linear_dense])
def test_bfloat16_deltas_are_rounded_in_the_forward_pass_and_straight_through_in_the_backward_pass(make):
    layer, x = make(8, 192), torch.randn(5, 192)
    model, rounded = adapt(layer, adapter_dtype="bfloat16"), adapt(layer)
    weight = delta_of(model).detach().clone()
    assert not torch.equal(weight, weight.bfloat16().float())
    y = model(x)
    y.square().sum().backward()
    with torch.no_grad():
        delta_of(rounded).copy_(weight.bfloat16())
    expected = rounded(x)
    expected.square().sum().backward()
    assert torch.equal(y, expected)
    assert torch.equal(delta_of(model), weight), "training must keep the float32 values"
    assert delta_of(model).grad.dtype == torch.float32
    assert torch.equal(delta_of(model).grad, delta_of(rounded).grad)


def test_a_large_bias_costs_int8_rows_no_accuracy():
    # Some models have biases of a hundred (the keys of Qwen2); the output is then mostly bias.
    errors = {}
    for size in (0.0, 100.0):
        torch.manual_seed(0)
        model = adapt(linear_8bit(16, 64))
        nn.init.constant_(the_layer(model).base_layer.bias, size)
        x, dy = torch.randn(64, 64).bfloat16(), torch.randn(64, 16).bfloat16()
        (model(x) * dy).sum().backward()
        errors[size] = relative_error(delta_of(model).grad, expected_of(model, x, dy)[2]["default"])
    assert errors[0.0] < 0.02
    assert errors[100.0] < 2 * errors[0.0]
