"""Adapted models under copying, pickling and torch.compile."""

from __future__ import annotations

import copy
import io
import os
import shutil
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.bases import DENSE, INT8, NF4, NF4_NESTED, adapted, logits, train_steps
from support.oracle import expected_of
from support.single_layers import adapt, add_adapter, delta_of, linear_4bit, linear_8bit, linear_dense, the_layer

kinds = pytest.mark.parametrize("base", [NF4, NF4_NESTED, INT8, DENSE], ids=lambda base: base.name)
makers = pytest.mark.parametrize("make", [linear_4bit, linear_8bit, linear_dense])


def pickled(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@kinds
@pytest.mark.parametrize(
    ("duplicate", "merged"),
    [(copy.deepcopy, False), (copy.deepcopy, True), (pickled, True)],
    ids=["copy", "copy-merged", "pickle-merged"],
)
def test_a_copy_gives_the_same_bits_and_is_independent(base, llama_dir, ids, duplicate, merged):
    model = adapted(base, llama_dir)
    expected = logits(model, ids)
    if merged:
        model.merge_adapter()
    other = duplicate(model)
    assert torch.equal(logits(other, ids), expected)
    if merged:
        other.unmerge_adapter()
    train_steps(other, ids, steps=1, lr=0.1)
    assert torch.equal(logits(model, ids), expected)
    changed = logits(other.eval(), ids)
    assert not torch.equal(changed, expected)
    other.merge_adapter()
    assert torch.equal(logits(other, ids), changed)
    assert torch.equal(logits(model, ids), expected)
    if merged:
        model.unmerge_adapter()
        assert torch.equal(logits(model, ids), expected)
    storages = [{p.untyped_storage().data_ptr() for p in each.parameters()} for each in (model, other)]
    assert not storages[0] & storages[1]


def test_a_pickle_holds_no_prepared_scales(llama_dir, ids):
    sizes = []
    model = adapted(DENSE, llama_dir)  # where these are whole weights
    for _ in range(2):
        file = io.BytesIO()
        torch.save(model, file)
        sizes.append(file.tell())
        logits(model, ids)
    assert abs(sizes[1] - sizes[0]) < 1000


# torch.compile: fullgraph=True raises at a graph break.


def compiled(model: PeftModel, backend: str = "aot_eager") -> Any:
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend=backend)


def gradients(model: PeftModel, call: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The output of `call`, and the gradients of the input and of both adapters of a model of one layer."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = call(x)
    y.square().sum().backward()
    return y.detach(), x.grad, delta_of(model, "default").grad, delta_of(model, "b").grad


@pytest.mark.slow
@makers
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_training_has_no_graph_breaks_and_the_same_bits(make, dtype, monkeypatch):
    model = adapt(make(16, 256), adapter_dtype=dtype)
    add_adapter(model, "b", ratio=0.9)
    x = torch.randn(5, 256)
    eager = gradients(model, model, x)
    found = gradients(model, compiled(model), x)
    # Whether one dequantization is enough depends on values, which a graph cannot ask for; it sums in another order.
    monkeypatch.setattr("peft_sgrq.layer.functional.dequantizes_once", lambda *args: False)
    expected = gradients(model, model, x)
    assert all(gradient.abs().max() > 0 for gradient in expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert torch.equal(eager[0], found[0]) and torch.equal(eager[1], found[1])
    for one, other in zip(eager[2:], found[2:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * float(other.abs().max()))


@pytest.mark.slow
@makers
def test_compiled_inference_has_no_graph_breaks_and_sees_changed_deltas(make):
    model = adapt(make(16, 256)).eval()
    add_adapter(model, "b", ratio=0.9)
    call, x = compiled(model), torch.randn(5, 256)
    with torch.no_grad():
        before = model(x)
        assert torch.equal(call(x), before)
        delta_of(model, "b").neg_()
        assert not torch.equal(call(x), before)
        assert torch.equal(call(x), model(x))
        with model.disable_adapter():
            assert torch.equal(call(x), model(x))
        model.set_adapter("b")
        assert torch.equal(call(x), model(x))
        model.merge_adapter()
        assert torch.equal(call(x), model(x))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="inductor needs a C++ compiler")
def test_inductor_compiles_training():
    """The compiler adds up in an order of its own: each sum is as near to float64 as its number of terms allows."""
    model = adapt(linear_4bit(16, 256, nested=True))
    add_adapter(model, "b", ratio=0.9)
    layer, x = the_layer(model), torch.randn(5, 256)
    deltas = {name: delta_of(model, name).detach().double() for name in layer.active_adapters}
    scales = layer.scaled_weight.scales().double()  # (N, G)
    codes = layer.scaled_weight.codes(None, torch.float32).double()  # (N, K)
    bias = layer.scaled_weight.bias.double()
    weight = (expected_of(model, torch.eye(256), torch.zeros(256, 16))[0] - bias).T  # (N, K)
    for call in (model, compiled(model, "inductor")):
        y, dx, *ddeltas = gradients(model, call, x)
        dy = 2 * y.double()  # what the loss has handed back
        check_sum(y, x.double(), weight.T, bias)
        check_sum(dx, dy, weight)
        for ddelta, name in zip(ddeltas, deltas, strict=True):
            groups = layer.sgrq_delta[name].units
            for group, column in zip(groups.tolist(), ddelta.T, strict=True):
                part = slice(group * 64, group * 64 + 64)
                terms = dy.T.unsqueeze(2) * x.double()[:, part] * codes[:, part].unsqueeze(1)  # (N, T, g)
                factor = scales[:, group, None]
                check_sum(column, terms.flatten(1) * factor, torch.ones(5 * 64, dtype=torch.float64))


def check_sum(found: torch.Tensor, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | float = 0.0) -> None:
    """Asserts that float32 holds `a @ b + bias` to within the rounding of its terms, in whatever order they are added.

    A sum of n products is wrong by at most n + 6 times half an ulp of the sum of their magnitudes: one for each
    addition, and six for the product and the factors that were rounded before.
    """
    magnitude = a.abs() @ b.abs() + abs(bias)
    bound = (a.shape[-1] + 6) * torch.finfo(torch.float32).eps / 2 * magnitude
    error = (found.double() - (a @ b + bias)).abs()
    assert bool((error <= bound).all()), f"off by up to {float((error / bound).max())} times the rounding"


@pytest.mark.slow
def test_a_whole_model_compiles_without_graph_breaks(llama_dir, ids):
    model = adapted(NF4, llama_dir).train()
    losses = []
    for each in (model.base_model.model, compiled(model.base_model.model)):
        loss = each(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append((loss.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]))
        model.zero_grad()
    torch.testing.assert_close(losses[0], losses[1])
    assert all(gradient.abs().max() > 0 for gradient in losses[0][1])


@pytest.mark.slow
@pytest.mark.parametrize("base", [NF4, INT8], ids=lambda base: base.name)
def test_steps_after_the_first_are_not_compiled_again(llama_dir, ids, base):
    model = adapted(base, llama_dir).train()
    step = compiled(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for stance in ("default", "fail_on_recompile", "fail_on_recompile"):
        with torch.compiler.set_stance(stance):
            loss = step()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
