"""Adapters on layers: several at once, their sums, what the model reports about them, and what is refused."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from support.bases import DENSE, INT8, NF4, NF4_NESTED, Base, adapted, logits, train_steps
from support.single_layers import adapt, delta_of, linear_4bit, linear_8bit, linear_dense, the_layer
from torch import nn

from peft_sgrq import SGRQConfig, SGRQLinear

KINDS = [NF4, NF4_NESTED, INT8, DENSE]
kinds = pytest.mark.parametrize("base", KINDS, ids=lambda base: base.name)
makers = pytest.mark.parametrize("make", [linear_4bit, linear_8bit, linear_dense])


def two_adapters(base: Base, directory: Any, **config: Any) -> PeftModel:
    """A model with random adapters `default`, active, and `b`; each has layers and groups the other has not."""
    model = adapted(base, directory, target_modules=["q_proj", "k_proj", "down_proj"], **config)
    settings = {"target_modules": ["q_proj", "v_proj", "down_proj"], "ratio": 0.9, "init_weights": False, **config}
    model.add_adapter("b", SGRQConfig(**settings))
    return model


def adapter_of(model: PeftModel, name: str) -> dict[str, torch.Tensor]:
    """Copies of the deltas of one adapter, by the names PEFT gives them in a file."""
    state = get_peft_model_state_dict(model, adapter_name=name)
    return {key: value.clone() for key, value in state.items() if value.is_floating_point()}


def layers(model: nn.Module) -> list[SGRQLinear]:
    return [module for module in model.modules() if isinstance(module, SGRQLinear)]


# several adapters


@kinds
def test_setting_an_adapter_chooses_whose_output_it_is(base, llama_dir, ids):
    model = two_adapters(base, llama_dir)
    first = logits(model, ids)
    model.set_adapter("b")
    second = logits(model, ids)
    model.base_model.set_adapter(["default", "b"])
    both = logits(model, ids)
    assert not any(torch.equal(one, other) for one, other in [(first, second), (first, both), (second, both)])
    model.set_adapter("default")
    assert torch.equal(logits(model, ids), first)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), logits(base.load(llama_dir), ids))


@kinds
def test_only_the_active_adapter_is_trained(base, llama_dir, ids):
    model = two_adapters(base, llama_dir)
    for active, other in [("default", "b"), ("b", "default")]:
        model.set_adapter(active)
        before = {name: adapter_of(model, name) for name in (active, other)}
        train_steps(model, ids, steps=1)
        after = {name: adapter_of(model, name) for name in (active, other)}
        assert all(torch.equal(value, before[other][key]) for key, value in after[other].items())
        assert not any(torch.equal(value, before[active][key]) for key, value in after[active].items())


@kinds
def test_deleting_an_adapter_leaves_the_others(base, llama_dir, ids):
    model = two_adapters(base, llama_dir)
    first = logits(model, ids)
    model.base_model.set_adapter(["default", "b"])
    model.delete_adapter("b")
    assert torch.equal(logits(model, ids), first)
    assert list(model.peft_config) == ["default"]
    assert not [name for name in model.state_dict() if ".b." in name]
    with pytest.raises(ValueError, match="b"):
        model.set_adapter("b")


@makers
def test_an_adapter_with_another_group_size_is_refused_only_where_groups_would_not_match(make):
    model = adapt(make(8, 192))
    other = SGRQConfig(target_modules=["0"], group_size=32)
    if make is linear_dense:
        with pytest.raises(ValueError, match=r"`group_size` is 32 for layer '0', but .* use 64"):
            model.add_adapter("b", other)
    else:  # a quantized layer has its own group size, whatever the config says
        model.add_adapter("b", other)
        assert sorted(the_layer(model).sgrq_delta) == ["b", "default"]


# sums of adapters


@kinds
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_weighted_adapter_is_exactly_the_weighted_sum(base, llama_dir, ids, dtype):
    model = two_adapters(base, llama_dir, adapter_dtype=dtype)
    model.base_model.set_adapter(["default", "b"])
    both = logits(model, ids)
    model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "sum")
    model.add_weighted_adapter(["default"], [1.0], "copy")
    model.add_weighted_adapter(["sum", "b"], [1.0, -1.0], "difference")
    model.add_weighted_adapter(["default", "b"], [0.0, 0.0], "nothing")
    assert torch.equal(logits(model, ids), both), "adding an adapter must not change the output"
    model.set_adapter("sum")
    assert torch.equal(logits(model, ids), both)
    model.set_adapter("default")
    first = logits(model, ids)
    model.set_adapter("copy")
    assert torch.equal(logits(model, ids), first)
    model.set_adapter("difference")
    assert torch.allclose(logits(model, ids), first, atol=1e-4)
    model.set_adapter("nothing")
    assert torch.equal(logits(model, ids), logits(base.load(llama_dir), ids))


def test_a_weighted_adapter_is_saved_and_loaded_like_any_other(llama_dir, ids, tmp_path):
    model = two_adapters(NF4, llama_dir)
    model.add_weighted_adapter(["default", "b"], [0.25, -2.0], "sum")
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(NF4.load(llama_dir), tmp_path / "sum").eval()
    assert torch.equal(logits(loaded, ids), logits(model, ids))


@pytest.mark.parametrize(
    ("adapters", "weights", "name", "message"),
    [
        (["default", "c"], [1.0, 1.0], "new", r"\['c'\] do not exist.*\['b', 'default'\]"),
        ([], [], "new", r"no adapters to add up, expected some of \[.b., .default.\]"),
        (["default", "b"], [1.0], "new", "2 adapters and 1 weights"),
        (["default", "b"], [1.0, 1.0], "b", "'b' exists already"),
    ],
)
def test_a_wrong_weighted_adapter_is_refused_and_nothing_added(llama_dir, adapters, weights, name, message):
    model = two_adapters(NF4, llama_dir)
    names = set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(adapters, weights, name)
    assert sorted(model.peft_config) == ["b", "default"] and set(model.state_dict()) == names


def test_a_weighted_adapter_does_not_lose_trained_modules_silently(llama_dir, ids):
    # A copy with the head of the untrained base would be another model; LoRA refuses such sums by name.
    model = adapted(NF4, llama_dir, modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    expected = logits(model, ids)
    try:
        model.add_weighted_adapter(["default"], [1.0], "copy")
    except ValueError as error:
        assert "modules_to_save" in str(error)
    else:
        model.set_adapter("copy")
        assert torch.equal(logits(model, ids), expected)


@makers
def test_the_delta_weight_is_the_change_of_the_weight(make):
    model = adapt(make(8, 192))
    layer = the_layer(model)

    def weight() -> torch.Tensor:
        base = layer.base_layer
        if make is linear_4bit:
            return bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state)
        if make is linear_8bit:
            return bnb.functional.int8_vectorwise_dequant(base.weight.data, layer.scaled_weight.scales().flatten())
        return base.weight.detach().clone()

    before = weight()
    unmerged = layer.get_delta_weight("default")
    model.merge_adapter()
    assert torch.allclose(before + unmerged, weight(), rtol=1e-6, atol=1e-7)
    assert unmerged.abs().max() > 0
    assert torch.equal(layer.get_delta_weight("default"), unmerged)


# what the model reports


@kinds
def test_status_and_repr_tell_what_the_layers_are(base, llama_dir):
    model = two_adapters(base, llama_dir)
    status = model.get_model_status()
    assert status.base_model_type == "LlamaForCausalLM" and status.adapter_model_type == "SGRQModel"
    assert status.peft_types == {"default": "SGRQ", "b": "SGRQ"}
    assert status.num_adapter_layers == len(layers(model)) == 8
    assert status.requires_grad == {"default": True, "b": False}
    assert status.trainable_params == sum(delta.numel() for delta in adapter_of(model, "default").values())
    assert status.enabled and status.active_adapters == ["default"] and status.merged_adapters == []
    model.merge_adapter()
    model.base_model.disable_adapter_layers()
    status = model.get_model_status()
    assert status.merged_adapters == ["default"] and not status.enabled
    found = {layer.name: layer for layer in model.get_layer_status()}
    assert found["model.model.layers.0.self_attn.q_proj"].available_adapters == ["b", "default"]
    assert found["model.model.layers.1.self_attn.v_proj"].available_adapters == ["b"]
    text = repr(layers(model)[0])
    assert "SGRQLinear" in text and layers(model)[0].scaled_weight.name in text


@kinds
def test_deltas_made_on_the_meta_device_are_loaded_into(base, llama_dir, ids):
    model = adapted(base, llama_dir)
    config = model.peft_config["default"]
    empty = get_peft_model(base.load(llama_dir), config, low_cpu_mem_usage=True).eval()
    deltas = [delta for layer in layers(empty) for delta in layer.sgrq_delta.parameters()]
    assert len(deltas) == 14 and all(delta.is_meta for delta in deltas)
    set_peft_model_state_dict(empty, get_peft_model_state_dict(model), low_cpu_mem_usage=True)
    assert torch.equal(logits(empty, ids), logits(model, ids))
    train_steps(empty, ids, steps=1)


# what is refused


@kinds
@pytest.mark.parametrize(("value", "unload"), [(float("nan"), False), (float("inf"), True)], ids=["merge", "unload"])
def test_safe_merge_refuses_a_broken_adapter_and_merges_nothing(base, llama_dir, ids, value, unload):
    model = two_adapters(base, llama_dir)
    model.base_model.set_adapter(["default", "b"])
    state = {key: value.clone() for key, value in base.load(llama_dir).state_dict().items()}
    with torch.no_grad():
        layers(model)[-1].sgrq_delta["b"].weight[-1, -1] = value
    with pytest.raises(ValueError, match=r"NaNs detected.*b seems to be broken.*Nothing was merged"):
        model.merge_and_unload(safe_merge=True) if unload else model.merge_adapter(safe_merge=True)
    assert model.get_model_status().merged_adapters == []
    model.delete_adapter("b")
    model.merge_adapter(safe_merge=True)
    model.unmerge_adapter()
    unloaded = model.unload().state_dict()
    assert unloaded.keys() == state.keys() and all(torch.equal(unloaded[key], state[key]) for key in state)


BAD_LAYERS = {
    "straddling-blocks": (lambda: linear_4bit(64, 96), r"in_features=96.*block size 64"),
    "embedding": (lambda: nn.Embedding(10, 64), r"Embedding, expected one of"),
    "unquantized-4bit": (lambda: bnb.nn.Linear4bit(64, 64), r"not quantized yet"),
    "unquantized-8bit": (lambda: bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False), r"not quantized yet"),
    "16-bit-weights": (lambda: bnb.nn.Linear8bitLt(64, 64), r"has_fp16_weights"),
}


@pytest.mark.parametrize("kind", BAD_LAYERS)
def test_a_layer_that_cannot_be_tuned_is_refused_by_name_before_anything_changes(kind):
    make, message = BAD_LAYERS[kind]
    model = nn.ModuleDict({"good": linear_4bit(64, 64), "block": nn.ModuleDict({"bad": make()})})

    def snapshot() -> Any:
        attributes = {name: set(vars(module)) for name, module in model.named_modules()}
        types = {name: type(module) for name, module in model.named_modules()}
        return attributes, types, {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}

    before, state = snapshot(), {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"'block\.bad' cannot be adapted: .*{message}.*The model was not changed"):
        get_peft_model(model, SGRQConfig(target_modules=["good", "bad"]))
    assert snapshot() == before
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_the_first_delta_of_a_replaced_layer_is_not_kept():
    model = adapt(linear_4bit(8, 192))
    before = delta_of(model)
    model.delete_adapter("default")
    model.add_adapter("default", SGRQConfig(target_modules=["0"]))
    assert delta_of(model) is not before and not delta_of(model).any()
