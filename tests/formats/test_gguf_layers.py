"""What always holds, on single layers of every GGUF type."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import get_peft_model
from support.ggml import ALL_TYPES, dequantize, random_blocks, some_blocks
from support.oracle import relative_error
from support.single_layers import delta_of, kept_tensors, the_layer
from torch import nn

from peft_sgrq import SGRQConfig, keep_dense
from peft_sgrq.formats.gguf.block_scales import BlockScales
from peft_sgrq.formats.gguf.blocks import BY_NAME
from peft_sgrq.formats.gguf.layers import GGUFEmbedding, GGUFHead, GGUFLinear, GGUFTiedHead
from peft_sgrq.formats.gguf.sub_block_scales import SubBlockScales
from peft_sgrq.formats.registry import is_quantized, resolve_weight

ROWS, COLUMNS = 48, 1024


def packed_layer(kind, seed=0, bias=False, rows=ROWS, columns=COLUMNS, cls=GGUFLinear, **settings):
    """A layer that ggml quantized, with random weights; with random codes where quantizing takes long."""
    weight = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32) / columns**0.5
    bias = nn.Parameter(torch.linspace(-1, 1, rows), requires_grad=False) if bias else None
    layer = cls(columns, rows, kind.id, bias=bias, **settings)
    layer.packed.data = torch.from_numpy(some_blocks(kind, weight, seed))
    return layer


def adapted(layer, **config):
    settings = {"target_modules": ["0"], "ratio": 0.5, "init_weights": False, **config}
    return get_peft_model(nn.Sequential(layer), SGRQConfig(**settings)).eval()


def weight_of(layer):
    return torch.from_numpy(dequantize(layer.kind, layer.packed.numpy()))


@ALL_TYPES
def test_zero_deltas_give_the_bits_of_the_base_and_a_merge_those_of_the_unmerged_layer(kind):
    layer, x = packed_layer(kind, bias=True), torch.randn(5, COLUMNS)
    assert is_quantized(layer)
    base = layer(x)
    assert torch.equal(base, nn.functional.linear(x, weight_of(layer), layer.bias))
    model = adapted(layer, target_modules=None, init_weights=True, ratio=1.0)
    assert torch.equal(model(x), base)
    for ratio in (1.0, 0.5):
        model = adapted(packed_layer(kind, bias=True), ratio=ratio)
        sgrq = the_layer(model)
        with torch.no_grad():
            unmerged = model(x)
        assert torch.equal(model.train()(x).detach(), unmerged) and not torch.equal(unmerged, base)
        before, stored = sgrq.base_layer.packed, sgrq.base_layer.packed.clone()
        model.eval().merge_adapter(safe_merge=True)
        assert torch.equal(model(x), unmerged)
        assert torch.equal(nn.functional.linear(x, weight_of(sgrq.base_layer), layer.bias), unmerged)
        assert sgrq.scaled_weight.fingerprint().split(":")[1] == resolve_weight(layer, 64).fingerprint().split(":")[1]
        model.unmerge_adapter()
        assert sgrq.base_layer.packed is before and torch.equal(before, stored)


@ALL_TYPES
@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_gradients_equal_float64_references(kind, ratio, monkeypatch):
    monkeypatch.setattr("peft_sgrq.layer.gradients._TEMPORARY_BYTES", 20_000)  # in several parts
    layer = packed_layer(kind, bias=True)
    base = weight_of(layer).double()
    model = adapted(layer, ratio=ratio).train()
    x = torch.randn(7, COLUMNS, requires_grad=True)
    dy = torch.randn(7, ROWS)
    model(x).backward(dy)
    sgrq = the_layer(model)
    delta = sgrq.sgrq_delta["default"]
    sums = (base * (dy.double().T @ x.detach().double())).view(ROWS, -1, sgrq.scaled_weight.group_size).sum(-1)
    sgrq.merge()
    assert relative_error(x.grad, dy.double() @ weight_of(sgrq.base_layer).double()) < 2e-6
    assert relative_error(delta.weight.grad, sums.index_select(1, delta.units)) < 2e-5


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q4_K"])
@pytest.mark.parametrize("needs_dx", [True, False])
def test_gradients_are_right_where_a_changed_scale_is_zero(name, needs_dx):
    # The codes do not follow from such a weight.
    layer = packed_layer(BY_NAME[name])
    base = weight_of(layer).double()
    model = adapted(layer, ratio=1.0).train()
    sgrq, delta = the_layer(model), delta_of(model)
    with torch.no_grad():
        delta[3, 2] = -1
        delta[5] = -1
    assert (sgrq.effective_scales(("default",))[5] == 0).all()
    x, dy = torch.randn(7, COLUMNS, requires_grad=needs_dx), torch.randn(7, ROWS)
    model(x).backward(dy)
    sums = (base * (dy.double().T @ x.detach().double())).view(*delta.shape, -1).sum(-1)
    assert relative_error(delta.grad, sums) < 2e-5 and relative_error(delta.grad[5], sums[5]) < 2e-5


@pytest.mark.parametrize(("name", "ratio"), [("Q4_1", 0), ("Q4_1", 1.0), ("Q4_K", 0), ("Q4_K", 0.5), ("Q6_K", 1.0)])
def test_a_backward_pass_takes_the_scales_that_the_forward_pass_rounded(name, ratio, monkeypatch):
    kind, x = BY_NAME[name], torch.randn(7, COLUMNS, requires_grad=True)
    model = adapted(packed_layer(kind), ratio=ratio, zero_points=kind.offset_at is not None).train()
    y = model(x)
    groups = the_layer(model).scaled_weight.scales().numel()
    (prepared,) = (tensor for tensor in kept_tensors(y) if tensor.dim() == 3)
    assert prepared.nbytes <= groups * (4 if kind.sub is None or kind.offset_at is None else 8)
    for what in ("round", "changed_offsets"):
        monkeypatch.delattr(BlockScales, what)
        monkeypatch.delattr(SubBlockScales, what)
    y.sum().backward()
    assert x.grad.abs().max() > 0


@ALL_TYPES
def test_unselected_scales_and_all_codes_stay_in_a_merge(kind):
    model = adapted(packed_layer(kind))
    sgrq = the_layer(model)
    before = sgrq.base_layer.packed.clone()
    weight = weight_of(sgrq.base_layer)
    sgrq.merge()
    after = sgrq.base_layer.packed
    size = sgrq.scaled_weight.group_size
    unselected = torch.ones(COLUMNS // size, dtype=torch.bool)
    unselected[sgrq.sgrq_delta["default"].units] = False
    same = (weight_of(sgrq.base_layer) == weight).view(ROWS, -1, size).all(-1)
    assert same[:, unselected].all() and not same[:, ~unselected].all()
    differs = (before != after).view(-1, kind.nbytes).any(0).nonzero().flatten()
    assert set(differs.tolist()) <= set(sgrq.base_layer.scales().scale_bytes)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q4_K", "Q6_K", "IQ3_S"])
def test_layers_compute_in_bfloat16_decode_and_can_be_copied(name):
    kind = BY_NAME[name]
    model = adapted(packed_layer(kind, bias=True))
    x = torch.randn(2, 3, COLUMNS, dtype=torch.bfloat16)
    with torch.no_grad():
        full = model(x)
        assert full.dtype == torch.bfloat16
        one = model(x[:, :1]), model(x[:, :1])  # the second by what the first prepared
        twin = copy.deepcopy(model)
        model.merge_adapter()
        assert torch.equal(model(x), full) and all(torch.equal(model(x[:, :1]), y) for y in one)
        assert torch.equal(twin(x), full)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(model(x.float()), full) and torch.equal(twin(x.float()), full)


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K"])
def test_blocks_alone_can_be_given_scales(name):
    model = adapted(packed_layer(BY_NAME[name], sub_blocks=False), ratio=1.0)
    sgrq = the_layer(model)
    assert sgrq.scaled_weight.name == f"gguf-{name}-256" and tuple(delta_of(model).shape) == (ROWS, COLUMNS // 256)
    x = torch.randn(5, COLUMNS)
    unmerged = model(x)
    sgrq.merge()
    assert torch.equal(model(x), unmerged)
    kind = sgrq.base_layer.kind
    assert sgrq.base_layer.scales().scale_bytes == kind.scale_bytes


def test_products_in_parts_are_the_product(monkeypatch):
    kind = BY_NAME["Q4_K"]
    model, x = adapted(packed_layer(kind, bias=True)), torch.randn(2, 3, COLUMNS, requires_grad=True)
    layer = packed_layer(kind, bias=True)
    whole = layer(x)
    (expected,) = torch.autograd.grad(whole.sum(), x)
    monkeypatch.setattr("peft_sgrq.formats.gguf.product._PART_BYTES", 7 * 4 * COLUMNS)  # seven rows
    parts = layer(x)
    (found,) = torch.autograd.grad(parts.sum(), x)
    assert torch.allclose(parts, whole, atol=1e-5) and torch.allclose(found, expected, atol=1e-5)
    unmerged = model(x)
    model.merge_adapter()
    assert torch.equal(model(x), unmerged)


@torch.no_grad()
def test_weights_kept_dense_give_the_bits_of_a_dense_layer_and_see_changes():
    kind = BY_NAME["Q4_K"]
    model, x = adapted(packed_layer(kind, bias=True)), torch.randn(2, 1, COLUMNS)
    sgrq = the_layer(model)
    expected = model(x)
    bare = packed_layer(kind)
    with keep_dense(model), keep_dense(bare):
        assert torch.equal(model(x), expected) and torch.equal(model(x), expected)
        kept = sgrq.base_layer.dense._weight
        assert torch.equal(kept, sgrq.scaled_weight.dequantize(sgrq.effective_scales(("default",)), torch.float32))
        delta_of(model).mul_(2)
        changed = model(x)
        model.merge_adapter()
        assert torch.equal(model(x), changed) and not torch.equal(changed, expected)
        model.unmerge_adapter()
        with model.disable_adapter():
            assert torch.equal(model(x), nn.functional.linear(x, weight_of(sgrq.base_layer), sgrq.base_layer.bias))
        assert torch.equal(bare(x), bare(x)) and bare.dense._weight is not None
        assert copy.deepcopy(bare).dense._weight is None
    assert sgrq.base_layer.dense._weight is None and bare.dense._weight is None and not bare.dense.kept
    assert torch.equal(model(x), changed)


def test_frozen_layers_pass_the_gradient_of_their_input_and_keep_no_weight():
    kind = BY_NAME["Q5_1"]
    layer = packed_layer(kind, bias=True)
    x = torch.randn(3, COLUMNS, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        y = layer(x)
    assert not saved
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad, torch.ones(3, ROWS) @ weight_of(layer))


@ALL_TYPES
def test_embeddings_unpack_the_rows_they_are_asked_for(kind):
    packed = torch.from_numpy(random_blocks(kind, 11, 512, 0))
    layer = GGUFEmbedding(11, 512, kind.id, dtype=torch.float32)
    layer.packed.data = packed
    ids = torch.tensor([[3, 0], [10, 3]])
    assert torch.equal(layer(ids), torch.from_numpy(dequantize(kind, packed.numpy()))[ids])


def test_heads_show_their_weight_and_a_tied_one_is_not_a_target():
    kind = BY_NAME["Q8_0"]
    head = packed_layer(kind, cls=GGUFHead, dtype=torch.float32)
    assert is_quantized(head) and torch.equal(head.weight, weight_of(head)) and list(head.state_dict()) == ["blocks"]
    x = torch.randn(3, COLUMNS)
    model = adapted(head)
    unmerged = model(x)
    model.merge_adapter()
    assert torch.equal(model(x), unmerged) and torch.equal(head.weight, weight_of(head))

    embedding = GGUFEmbedding(ROWS, COLUMNS, kind.id, dtype=torch.float32)
    embedding.packed = head.packed
    both = copy.deepcopy(nn.ModuleList([embedding, GGUFTiedHead(embedding)]))
    both[0].packed.data.zero_()
    assert not both[1](x).any() and torch.equal(GGUFTiedHead(embedding)(x), head(x))
    assert not is_quantized(both[1])
    with pytest.raises(ValueError, match="GGUFTiedHead"):
        adapted(both[1])
