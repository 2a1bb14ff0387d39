"""Decoding token by token looks nothing up, and sees every change all the same."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.bases import DENSE, INT8, NF4, NF4_NESTED, adapted, logits
from support.delta_changes import (
    OPTIMIZERS,
    OTHERS,
    by_another_adapter,
    by_averaging,
    by_fused_optimizer,
    by_in_place_change,
    by_moving,
    by_new_data,
    computed_anew,
    kinds,
)
from support.single_layers import adapt, linear_4bit, linear_8bit, linear_dense
from torch import nn

from peft_sgrq import SGRQLinear


def by_merging(model: PeftModel, directory: Path) -> None:
    model.merge_adapter()
    for module in model.modules():
        if isinstance(module, SGRQLinear):
            module.merged_adapters = []  # as if the merged scales were those of the base, under the same adapter
            module._unmerged_scales = ()


DECODING = [change for change in (*OPTIMIZERS, *OTHERS) if change not in (by_averaging, by_fused_optimizer)] + [
    by_merging
]


@pytest.mark.parametrize(  # on the other bases what shows elsewhere: see test_inference.py
    ("base", "change"),
    [
        *((NF4, change) for change in DECODING),
        *(
            (base, change)
            for base in (NF4_NESTED, INT8, DENSE)
            for change in (by_in_place_change, by_new_data, by_another_adapter, by_moving, by_merging)
        ),
    ],
    ids=lambda value: getattr(value, "name", None) or value.__name__,
)
def test_decoding_is_never_stale(base, llama_dir, ids, tmp_path, change):
    model, token = adapted(base, llama_dir), ids[:, :1]
    before = logits(model, token)
    assert torch.equal(logits(model, token), before)
    change(model, tmp_path)
    found = logits(model, token)
    assert not torch.equal(found, before)
    assert torch.equal(found, computed_anew(model, token))


@kinds
def test_decoding_sees_that_adapters_are_disabled_or_merged(base, llama_dir, ids):
    model, token = adapted(base, llama_dir), ids[:, :1]
    before = logits(model, token)
    assert torch.equal(logits(model, token), before)
    with model.disable_adapter():
        assert torch.equal(logits(model, token), logits(base.load(llama_dir), token))
    assert torch.equal(logits(model, token), before)
    model.merge_adapter()
    assert torch.equal(logits(model, token), before)
    model.unmerge_adapter()
    assert torch.equal(logits(model, token), before)


@kinds
def test_a_model_that_has_decoded_can_be_copied_and_pickled(base, llama_dir, ids):
    model, token = adapted(base, llama_dir), ids[:, :1]
    before = logits(model, token)
    assert torch.equal(logits(model, token), before)
    layer = next(module for module in model.modules() if isinstance(module, SGRQLinear))
    assert layer._decoder is not None
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin._decoder is None


@pytest.mark.parametrize("make", [linear_4bit, linear_8bit, linear_dense])
def test_decoding_sees_a_new_bias(make):
    model, x = adapt(make(16, 128)).eval(), torch.randn(1, 128)
    base = model.base_model.model[0].base_layer
    with torch.no_grad():
        before = model(x)
        assert torch.equal(model(x), before)
        base.bias = nn.Parameter(base.bias + 1, requires_grad=False)
        torch.testing.assert_close(model(x), before + 1)


def test_decoding_sees_new_second_level_scales():
    model, x = adapt(linear_4bit(64, 512, nested=True, bias=False)).eval(), torch.randn(1, 512)
    state = model.base_model.model[0].base_layer.weight.quant_state
    with torch.no_grad():
        before = model(x)
        assert torch.equal(model(x), before)
        state.offset = state.offset * 3
        assert not torch.equal(model(x), before)
