"""Inference computes scales for a prompt and a first token, and never with scales that are not those of now."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.bases import DENSE, INT8, NF4, NF4_NESTED, adapted, logits
from support.delta_changes import (
    OPTIMIZERS,
    OTHERS,
    by_another_adapter,
    by_in_place_change,
    by_moving,
    by_new_data,
    computed_anew,
    deltas,
    frozen,
    kinds,
    only_deltas,
)
from support.single_layers import adapt, add_adapter, linear_4bit, linear_8bit, linear_dense
from torch import nn

from peft_sgrq import SGRQConfig, SGRQLinear


def count_preparations(model: nn.Module) -> list[int]:
    """A list that grows by one whenever a layer of the model prepares scales for its kernel."""
    calls: list[int] = []

    def counted(prepare: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            calls.append(1)
            return prepare(*args)

        return wrapper

    for layer in model.modules():
        if isinstance(layer, SGRQLinear):
            layer.scaled_weight.prepare = counted(layer.scaled_weight.prepare)
    return calls


@kinds
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_scales_are_prepared_for_the_prompt_and_the_first_token_of_a_generation(base, llama_dir, ids, trained):
    model = adapted(base, llama_dir)
    if not trained:
        frozen(model)
    calls = count_preparations(model)
    model.generate(input_ids=ids, max_new_tokens=5)
    assert len(calls) == 28


@kinds
def test_nothing_is_kept_while_training(base, llama_dir, ids):
    model = adapted(base, llama_dir).train()
    calls = count_preparations(model)
    for _ in range(2):
        logits(model, ids)
    assert len(calls) == 28


# Deltas change in the same ways on every base: all of them on one, and on the others one of each that shows elsewhere
# (in a version, an address, the names of adapters, the dtype of the base).
@pytest.mark.parametrize(
    ("base", "change", "trained"),
    [
        *((NF4, change, True) for change in OPTIMIZERS),
        *((NF4, change, trained) for change in OTHERS for trained in (True, False)),
        *(
            (base, change, trained)
            for base in (NF4_NESTED, INT8, DENSE)
            for change, trained in (
                (by_in_place_change, True),
                (by_new_data, False),
                (by_another_adapter, False),
                (by_moving, True),
            )
        ),
    ],
    ids=lambda value: getattr(value, "name", None) or getattr(value, "__name__", ("frozen", "trained")[value is True]),
)
def test_scales_are_never_stale(base, llama_dir, ids, tmp_path, change, trained):
    model = adapted(base, llama_dir)
    if not trained:
        frozen(model)
    before = logits(model, ids)
    change(model, tmp_path)
    found = logits(model, ids)
    assert not torch.equal(found, before)
    assert torch.equal(found, computed_anew(model, ids))


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_dense_weights_are_never_stale(llama_dir, ids, trained):
    # A dense layer prepares its whole weight, so a new weight of the base must count too.
    model = adapted(DENSE, llama_dir)
    if not trained:
        frozen(model)
    before = logits(model, ids)
    state = {key: -value for key, value in model.state_dict().items() if "down_proj.base_layer" in key}
    model.load_state_dict(state, strict=False)
    found = logits(model, ids)
    assert not torch.equal(found, before)
    assert torch.equal(found, computed_anew(model, ids))


@pytest.mark.parametrize("make", [linear_4bit, linear_8bit, linear_dense])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_loaded_selection_counts_among_several_adapters(make, training):
    layer = make(8, 320)
    model, other = adapt(layer, [0, 1]), adapt(copy.deepcopy(layer), [0, 1])
    add_adapter(model, "b", [1, 2])
    add_adapter(other, "b", [3, 4])
    model.train(training)
    other.train(training)
    x = torch.randn(5, 320)
    assert not torch.equal(model(x), other(x))
    model.load_state_dict(dict(only_deltas(other)), strict=False)
    assert torch.equal(model(x), other(x))


@kinds
def test_an_adapter_loaded_in_inference_mode_works(base, llama_dir, ids, tmp_path):
    model = adapted(base, llama_dir)
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        loaded = PeftModel.from_pretrained(base.load(llama_dir), tmp_path).eval()
        assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert torch.equal(logits(loaded, ids), logits(model, ids))


@kinds
def test_scales_of_inference_mode_serve_training_too(base, llama_dir, ids):
    model = adapted(base, llama_dir)
    with torch.inference_mode():
        expected = logits(model, ids)
    assert torch.equal(logits(model, ids), expected)
    model(input_ids=ids, labels=ids).loss.backward()  # in eval mode
    assert all(delta.grad is not None for delta in deltas(model))


@kinds
def test_a_mixed_batch_leaves_nothing_for_the_next_token(base, llama_dir, ids):
    model, token = adapted(base, llama_dir), ids[:, :1]
    model.add_adapter("b", SGRQConfig(init_weights=False))
    before = logits(model, token)
    mixed = logits(model, token, adapter_names=["b"] * len(token))
    assert not torch.equal(mixed, before)
    assert torch.equal(logits(model, token), before)
    assert torch.equal(logits(model, token, adapter_names=["b"] * len(token)), mixed)


def test_deltas_made_and_changed_in_inference_mode_are_seen():
    with torch.inference_mode():
        model, x = adapt(linear_4bit(16, 128)).eval(), torch.randn(1, 128)
        before = model(x)
        assert torch.equal(model(x), before)
        for delta in deltas(model):
            delta.mul_(3)
        assert not torch.equal(model(x), before)
