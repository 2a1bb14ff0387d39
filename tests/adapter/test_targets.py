"""Which layers are adapted, and what else is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.bases import INT8, NF4, Base, adapted, logits, train_steps

from peft_sgrq import SGRQConfig, SGRQLinear

BLOCKS = ["model.layers.0", "model.layers.1"]
LAYERS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
ALL = {f"{block}.{layer}" for block in BLOCKS for layer in LAYERS}


def wrapped(model: torch.nn.Module) -> set[str]:
    found = (name for name, module in model.named_modules() if isinstance(module, SGRQLinear))
    return {name.removeprefix("base_model.model.") for name in found}


def trainable(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# which layers


FIRST, SECOND = ({name for name in ALL if name.startswith(block)} for block in BLOCKS)
QUERIES = {f"{block}.self_attn.q_proj" for block in BLOCKS}
UPS = {f"{block}.mlp.up_proj" for block in BLOCKS}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, ALL),
        ({"target_modules": "all-linear"}, ALL),
        ({"target_modules": ["q_proj"]}, QUERIES),
        ({"target_modules": ["layers.1.mlp.up_proj"]}, UPS & SECOND),
        ({"target_modules": r".*\.1\..*_proj"}, SECOND),
        ({"exclude_modules": ["up_proj", "layers.0.self_attn.q_proj"]}, ALL - UPS - (QUERIES & FIRST)),
        ({"exclude_modules": r".*\.0\..*"}, SECOND),
        ({"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}, (QUERIES | UPS) & SECOND),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0}, QUERIES & FIRST),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"}, QUERIES & FIRST),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["layers"]}, QUERIES & FIRST),
        ({"layers_to_transform": [1]}, SECOND),
        ({"layers_to_transform": [1], "exclude_modules": ["up_proj"]}, SECOND - UPS),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_the_named_layers_are_adapted(config, expected, llama_dir: Path):
    model = adapted(NF4, llama_dir, **config)
    assert wrapped(model) == expected == set(model.peft_config["default"].selection)
    assert trainable(model) == {f"base_model.model.{name}.sgrq_delta.default.weight" for name in expected}


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["nowhere"]},
        {"target_modules": ".*nowhere"},
        {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [7]},
    ],
    ids=str,
)
def test_a_target_that_matches_nothing_is_refused(config, llama_dir: Path):
    model = NF4.load(llama_dir)
    with pytest.raises(ValueError, match=r"[Tt]arget.*modules"):
        get_peft_model(model, SGRQConfig(**config))
    assert not wrapped(model)


def test_a_target_without_scales_is_refused_and_the_model_unchanged(llama_dir: Path):
    model = NF4.load(llama_dir)
    with pytest.raises(ValueError, match=r"Layer 'model\.embed_tokens' cannot be adapted: it is a .*Embedding"):
        get_peft_model(model, SGRQConfig(target_modules=["q_proj", "embed_tokens"]))
    assert not wrapped(model)


def test_the_head_is_adapted_when_it_is_named(llama_dir: Path):
    model = adapted(NF4, llama_dir, target_modules=["lm_head", "q_proj"])
    assert "lm_head" in wrapped(model) and type(model.get_output_embeddings()) is SGRQLinear
    assert model.peft_config["default"].base_quantization["load_in_4bit"] is True


def test_a_selection_of_a_layer_that_is_not_adapted_is_refused(llama_dir: Path):
    with pytest.raises(ValueError, match=r"model\.layers\.9\.mlp\.up_proj"):
        get_peft_model(NF4.load(llama_dir), SGRQConfig(selection={"model.layers.9.mlp.up_proj": "80"}))


# what else is trained


def test_modules_to_save_are_trained_whole_saved_and_loaded(llama_dir: Path, tmp_path: Path, ids):
    model = adapted(NF4, llama_dir, modules_to_save=["lm_head", "norm"])
    head = model.base_model.model.lm_head
    before = head.original_module.weight.clone()
    train_steps(model, ids, steps=2)
    assert torch.equal(head.original_module.weight, before)
    assert not torch.equal(head.modules_to_save["default"].weight, before)
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(NF4.load(llama_dir), tmp_path)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert loaded.peft_config["default"].modules_to_save == ["lm_head", "norm"]


def test_trainable_tokens_are_trained_saved_and_loaded(llama_dir: Path, tmp_path: Path, ids):
    tokens = ids[0, :2].tolist()
    model = adapted(NF4, llama_dir, trainable_token_indices=tokens)
    assert any("trainable_tokens_delta" in name for name in trainable(model))
    before = model.base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta["default"].clone()
    train_steps(model, ids, steps=2)
    after = model.base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta["default"]
    assert after.shape == (2, 64) and not torch.equal(after, before)
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(NF4.load(llama_dir), tmp_path), ids), logits(model, ids))


@pytest.mark.parametrize("tested", [NF4, INT8], ids=lambda base: base.name)
@pytest.mark.parametrize("name", ["down_proj", "mlp"])
def test_a_quantized_module_cannot_be_saved_whole(tested: Base, name, llama_dir: Path):
    model = tested.load(llama_dir)
    with pytest.raises(ValueError, match=rf"`modules_to_save` names 'model.*{name}', which is quantized"):
        get_peft_model(model, SGRQConfig(modules_to_save=[name], target_modules=["q_proj"]))
    assert not wrapped(model)
