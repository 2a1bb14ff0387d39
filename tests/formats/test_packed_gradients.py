"""GPTQ, AWQ and AutoRound on single layers: gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from support.oracle import Expected, expected, relative_error
from support.packed_layers import DTYPES, LIBRARY, SCHEMES, VARIANTS, Packed, adapted, packed_layer
from support.single_layers import delta_of, the_layer

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def expected_of(made: Packed, model: PeftModel, x: torch.Tensor, dy: torch.Tensor) -> Expected:
    """What a model of one packed layer computes, by what the layer was packed from."""
    delta = the_layer(model).sgrq_delta["default"]
    scales = made.scales.T.float()  # (N, groups)
    changed = scales * torch.ones_like(scales).index_add(1, delta.units, delta.weight.detach())
    base = made.levels * scales.double()[:, made.groups]
    found = expected(
        x, dy, base, made.weight(changed, made.product_dtype(x.dtype)), torch.arange(len(scales)), made.groups
    )
    return found._replace(changes=found.changes.index_select(1, delta.units))


# Bits, packing and order of columns do not know the dtype of the input or how many groups are selected: each variant
# once, by the strictest tolerance, and the rest for one variant of each way to make the weight.
@pytest.mark.parametrize(
    ("variant", "dtype", "ratio"),
    [
        *((variant, torch.float32, 0.5) for variant in VARIANTS),
        *((variant, torch.float32, 1.0) for variant in SCHEMES),
        *((variant, dtype, 0.5) for variant in SCHEMES for dtype in DTYPES if dtype != torch.float32),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_gradients_equal_float64_references(variant, dtype, ratio):
    made = packed_layer(**VARIANTS[variant])
    model = adapted(made.layer, ratio=ratio).train()
    x = torch.randn(7, len(made.groups)).to(dtype).requires_grad_()
    y = model(x)
    dy = torch.randn_like(y)
    (y * dy).sum().backward()
    delta, tolerance = delta_of(model), TOLERANCE[made.product_dtype(dtype)]
    reference = expected_of(made, model, x, dy)
    assert relative_error(y.detach(), reference.y) < tolerance
    assert x.grad.dtype == dtype and relative_error(x.grad, reference.dx) < tolerance
    assert delta.grad.dtype == torch.float32 and relative_error(delta.grad, reference.changes) < tolerance


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_gradients_equal_references_for_any_shape(kind, data):
    size = data.draw(st.sampled_from([16, 32, 64]))
    count = data.draw(st.integers(1, 4))
    ragged = data.draw(st.integers(0, size - 1)) if kind == "gptq" else 0
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    made = packed_layer(
        kind,
        rows=8 * data.draw(st.integers(1, 6)),
        columns=count * size - min(ragged, count * size - 8),
        bits=data.draw(st.sampled_from([2, 4, 8])),
        group_size=size,
        act_order=kind == "gptq" and data.draw(st.booleans()),
    )
    dtype = torch.float32 if kind == "gptq" else torch.float16
    model = adapted(made.layer, ratio=data.draw(st.sampled_from([0.01, 0.5, 1.0]))).train()
    x = torch.randn(5, len(made.groups)).to(dtype).requires_grad_()
    dy = torch.randn(5, made.scales.shape[1]).to(dtype)
    y = model(x)
    (y * dy).sum().backward()
    # With a few products a sum may cancel by chance, so the bound is that of the other tests times ten.
    assert relative_error(delta_of(model).grad, expected_of(made, model, x, dy).changes) < 10 * TOLERANCE[dtype]
    model.eval()
    unmerged = model(x)
    model.merge_adapter()
    assert torch.equal(model(x), unmerged)


@pytest.mark.parametrize("kind", LIBRARY)
def test_rounding_is_in_the_forward_pass_and_not_in_the_gradient(kind):
    made = packed_layer(kind)
    model, x = adapted(made.layer, init_weights=True, ratio=1.0).train(), torch.randn(5, 128, dtype=torch.bfloat16)
    base = made.layer(x)
    with torch.no_grad():
        delta_of(model).fill_(1e-4)  # far below half a step of float16
    y = model(x)
    y.float().square().sum().backward()
    assert torch.equal(y, base)
    assert delta_of(model).grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_scales_of_zero_stay_zero_and_get_no_gradient(kind):
    made = packed_layer(kind, zero_scales=True)
    model, x = adapted(made.layer, ratio=1.0).train(), torch.randn(5, 128, dtype=torch.float16)
    model(x).square().sum().backward()
    zero = made.scales.T == 0
    gradient = delta_of(model).grad
    assert zero.any() and (gradient[zero] == 0).all() and (gradient[~zero] != 0).any()
    assert torch.isfinite(gradient).all()
    model.merge_adapter()
    assert torch.equal(made.layer.scales.T == 0, zero)
