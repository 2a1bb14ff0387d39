"""Inference computes scales once, and never with scales that are not those of now."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import DENSE, INT8, NF4, NF4_NESTED, adapted, logits
from layers import adapt, add_adapter, linear_4bit, linear_8bit, linear_dense
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from peft_sgrq import SGRQConfig, SGRQLinear

kinds = pytest.mark.parametrize("base", [NF4, NF4_NESTED, INT8, DENSE], ids=lambda base: base.name)


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
            layer.backend.prepare = counted(layer.backend.prepare)
    return calls


def deltas(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if "sgrq_delta" in name]


def computed_anew(model: PeftModel, ids: torch.Tensor) -> torch.Tensor:
    """The logits by another way, which uses no cache: written into the scales of the base."""
    active = model.active_adapters
    model.merge_adapter(active)
    expected = logits(model, ids)
    model.unmerge_adapter()
    return expected


def frozen(model: PeftModel) -> PeftModel:
    """The model as it is when it is loaded for inference."""
    return model.requires_grad_(False)


@kinds
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_scales_are_prepared_once_for_all_tokens_of_a_generation(base, llama_dir, ids, trained):
    model = adapted(base, llama_dir)
    if not trained:
        frozen(model)
    calls = count_preparations(model)
    model.generate(input_ids=ids, max_new_tokens=5)
    assert len(calls) == 14


@kinds
def test_adapters_that_share_a_batch_are_prepared_once_each(base, llama_dir, ids):
    model = adapted(base, llama_dir)
    model.add_adapter("b", SGRQConfig(init_weights=False))
    calls = count_preparations(model)
    model.generate(input_ids=ids, adapter_names=["default", "b", "__base__"], max_new_tokens=5)
    assert len(calls) == 28


@kinds
def test_nothing_is_kept_while_training(base, llama_dir, ids):
    model = adapted(base, llama_dir).train()
    calls = count_preparations(model)
    for _ in range(2):
        logits(model, ids)
    assert len(calls) == 28


def by_optimizer(model: PeftModel, directory: Path) -> None:
    optimizer = torch.optim.AdamW(deltas(model), lr=0.1)
    for delta in deltas(model):
        delta.grad = torch.randn_like(delta)
    optimizer.step()  # in eval mode, no forward pass with gradients


def by_fused_optimizer(model: PeftModel, directory: Path) -> None:
    optimizer = torch.optim.AdamW(deltas(model), lr=0.1, fused=True)  # the Trainer's default
    for delta in deltas(model):
        delta.grad = torch.randn_like(delta)
    optimizer.step()


def by_training_in_eval_mode(model: PeftModel, directory: Path) -> None:
    ids = torch.randint(3, 256, (2, 9))
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.AdamW(deltas(model), lr=0.1, fused=True).step()


def by_in_place_change(model: PeftModel, directory: Path) -> None:
    with torch.no_grad():
        for delta in deltas(model):
            delta.neg_()


def by_averaging(model: PeftModel, directory: Path) -> None:
    for delta in deltas(model):
        delta.data.mul_(0.4).add_(torch.ones_like(delta) / 10)  # as TRL's SyncRefModelCallback, on a frozen reference


def by_new_data(model: PeftModel, directory: Path) -> None:
    for delta in deltas(model):
        delta.data = torch.randn_like(delta) / 10


def by_load_state_dict(model: PeftModel, directory: Path) -> None:
    model.load_state_dict(
        {key: -value if "weight" in key else value for key, value in only_deltas(model)}, strict=False
    )


def by_assigned_state_dict(model: PeftModel, directory: Path) -> None:
    state = {key: -value if "weight" in key else value for key, value in only_deltas(model)}
    model.load_state_dict(state, strict=False, assign=True)


def only_deltas(model: PeftModel) -> list[tuple[str, torch.Tensor]]:
    return [(key, value) for key, value in model.state_dict().items() if "sgrq_delta" in key]


def by_peft_state_dict(model: PeftModel, directory: Path) -> None:
    state = get_peft_model_state_dict(model)
    set_peft_model_state_dict(model, {key: -value if "weight" in key else value for key, value in state.items()})


def by_another_adapter(model: PeftModel, directory: Path) -> None:
    model.add_adapter("b", SGRQConfig(init_weights=False))
    model.set_adapter("b")


def by_a_second_adapter(model: PeftModel, directory: Path) -> None:
    model.add_adapter("b", SGRQConfig(init_weights=False))
    model.base_model.set_adapter(["default", "b"])


def by_an_adapter_of_the_same_name(model: PeftModel, directory: Path) -> None:
    config = model.peft_config["default"]
    model.delete_adapter("default")
    model.add_adapter("default", config)
    model.set_adapter("default")


def by_moving(model: PeftModel, directory: Path) -> None:
    by_new_data(model, directory)
    model.to("cpu", torch.bfloat16)


def by_training(model: PeftModel, directory: Path) -> None:
    model.train()
    for delta in deltas(model):
        delta.data.mul_(-1)
    model.eval()


OPTIMIZERS = [by_optimizer, by_fused_optimizer, by_training_in_eval_mode]
OTHERS = [value for name, value in list(globals().items()) if name.startswith("by_") and value not in OPTIMIZERS]


@kinds
@pytest.mark.parametrize(
    ("change", "trained"),
    [(change, True) for change in OPTIMIZERS] + [(change, trained) for change in OTHERS for trained in (True, False)],
    ids=lambda value: value.__name__ if callable(value) else ("frozen", "trained")[value],
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


def by_merging(model: PeftModel, directory: Path) -> None:
    model.merge_adapter()
    for module in model.modules():
        if isinstance(module, SGRQLinear):
            module.merged_adapters = []  # as if the merged scales were those of the base, under the same adapter
            module._unmerged_scales = ()


DECODING = [change for change in (*OPTIMIZERS, *OTHERS) if change not in (by_averaging, by_fused_optimizer)] + [
    by_merging
]


@kinds
@pytest.mark.parametrize("change", DECODING, ids=lambda change: change.__name__)
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
def test_scales_prepared_in_inference_mode_serve_training_too(base, llama_dir, ids):
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


def test_deltas_made_and_changed_in_inference_mode_are_seen():
    with torch.inference_mode():
        model, x = adapt(linear_4bit(16, 128)).eval(), torch.randn(1, 128)
        before = model(x)
        assert torch.equal(model(x), before)
        for delta in deltas(model):
            delta.mul_(3)
        assert not torch.equal(model(x), before)
