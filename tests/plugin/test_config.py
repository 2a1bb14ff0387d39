"""Every field is checked, saved as JSON and read back; fields choose what they say they choose."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, TaskType, get_peft_model
from support.bases import DENSE, INT8, NF4, NF4_NESTED, Base, adapted, train_steps

from peft_sgrq import SGRQConfig, SGRQLinear

BLOCKS = ["model.layers.0", "model.layers.1"]
LAYERS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
ALL = {f"{block}.{layer}" for block in BLOCKS for layer in LAYERS}


# values


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("ratio", 0, ValueError),
        ("ratio", -0.1, ValueError),
        ("ratio", 1.1, ValueError),
        ("ratio", float("nan"), ValueError),
        ("ratio", float("inf"), ValueError),
        ("ratio", "a", ValueError),
        ("ratio", [0.4], TypeError),
        ("ratio", True, TypeError),
        ("ratio", None, TypeError),
        ("group_size", 0, ValueError),
        ("group_size", -64, ValueError),
        ("group_size", 64.0, TypeError),
        ("group_size", True, TypeError),
        ("group_size", "64", TypeError),
        ("ratio_pattern", None, TypeError),
        ("ratio_pattern", [0.4], TypeError),
        ("ratio_pattern", {1: 0.4}, TypeError),
        ("ratio_pattern", {"q_proj": 1.5}, ValueError),
        ("ratio_pattern", {"q_proj": None}, TypeError),
        ("ratio_pattern", {"q_proj": "global"}, ValueError),
        ("budget", 0, ValueError),
        ("budget", 0.0, ValueError),
        ("budget", 1.1, ValueError),
        ("budget", float("nan"), ValueError),
        ("budget", "much", ValueError),
        ("budget", True, TypeError),
        ("budget", None, TypeError),
        ("criterion", "salience", ValueError),
        ("criterion", 1, TypeError),
        ("adapter_dtype", "float16", ValueError),
        ("adapter_dtype", torch.float16, ValueError),
        ("adapter_dtype", 16, ValueError),
        ("init_weights", 0.5, TypeError),
        ("init_weights", 1, TypeError),
        ("init_weights", None, TypeError),
        ("selection", "ff", TypeError),
        ("selection", ["ff"], TypeError),
        ("selection", {"layer": 255}, TypeError),
        ("selection", {"layer": "zz"}, ValueError),
        ("selection", {"layer": "abc"}, ValueError),
        ("base_fingerprint", "bnb-nf4-64", TypeError),
        ("base_fingerprint", {"layer": 1}, TypeError),
    ],
)
def test_a_wrong_value_is_refused_by_name(field, value, error):
    with pytest.raises(error, match=rf"`{field}.*expected") as caught:
        SGRQConfig(**{field: value})
    if field not in ("selection", "base_fingerprint", "ratio_pattern"):
        assert str(value).removeprefix("torch.") in str(caught.value)


@pytest.mark.parametrize("field", ["layers_to_transform", "layers_pattern"])
def test_an_expression_excludes_layer_indices(field):
    value = {"layers_to_transform": [0], "layers_pattern": "layers"}
    chosen = {"layers_to_transform": [0], field: value[field]}
    with pytest.raises(ValueError, match="`layers_to_transform` cannot be used when `target_modules` is a str"):
        SGRQConfig(target_modules=".*q_proj", **chosen)
    with pytest.raises(ValueError, match="`target_modules` is a str"):
        SGRQConfig(target_modules="all-linear", **{field: value[field]})


def test_a_pattern_needs_layer_indices():
    with pytest.raises(ValueError, match="`layers_to_transform` must also be specified"):
        SGRQConfig(layers_pattern="layers")


def test_every_scale_is_trained_unless_told(llama_dir: Path):
    model = get_peft_model(NF4.load(llama_dir), SGRQConfig())
    layers = [module for module in model.modules() if isinstance(module, SGRQLinear)]
    scales = sum(math.prod(module.scaled_weight.scales_shape) for module in layers)
    assert model.get_nb_trainable_parameters()[0] == scales > 0


def test_a_torch_dtype_means_its_name():
    for dtype in (torch.float32, torch.bfloat16, "float32", "bfloat16", "torch.bfloat16"):
        assert SGRQConfig(adapter_dtype=dtype).adapter_dtype == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("ratio", [1, 1.0, 1e-6])
def test_any_share_above_zero_is_a_ratio(ratio):
    assert SGRQConfig(ratio=ratio).ratio == ratio


# files

FULL = {
    "zero_points": True,
    "check_learning_rate": False,
    "task_type": TaskType.CAUSAL_LM,
    "target_modules": ["q_proj", "v_proj"],
    "exclude_modules": ["o_proj"],
    "ratio": "global",
    "ratio_pattern": {"q_proj": 1.0, r"layers\.0\..*": "knee"},
    "budget": "20MB",
    "criterion": "fisher",
    "group_size": 32,
    "adapter_dtype": torch.bfloat16,
    "init_weights": False,
    "layers_to_transform": [0, 1],
    "layers_pattern": ["layers"],
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [1, 2],
    "selection": {"model.layers.0.self_attn.q_proj": "80"},
    "base_fingerprint": {"model.layers.0.self_attn.q_proj": "bnb-nf4-64:0011:2233"},
    "base_quantization": {"quant_method": "bitsandbytes", "load_in_4bit": True},
}


def test_every_field_survives_saving(tmp_path: Path):
    assert set(FULL) >= {field.name for field in fields(SGRQConfig)} - {
        *(field.name for field in fields(PeftConfig)),
        "sgrq_version",
    }
    config = SGRQConfig(**FULL)
    config.save_pretrained(str(tmp_path))
    for load in (SGRQConfig.from_pretrained, PeftConfig.from_pretrained):
        loaded = load(str(tmp_path))
        assert type(loaded) is SGRQConfig and loaded == config
        loaded.save_pretrained(str(tmp_path / "again"))
        assert SGRQConfig.from_pretrained(str(tmp_path / "again")) == config
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "SGRQ" and saved["sgrq_version"] == 1 and saved["adapter_dtype"] == "bfloat16"
    assert {key: saved[key] for key in FULL if key not in ("target_modules", "exclude_modules", "adapter_dtype")} == {
        key: value for key, value in FULL.items() if key not in ("target_modules", "exclude_modules", "adapter_dtype")
    }


@pytest.mark.parametrize("tested", [NF4_NESTED, INT8, DENSE], ids=lambda base: base.name)
def test_a_completed_config_survives_saving(tested: Base, llama_dir: Path, tmp_path: Path):
    config = adapted(tested, llama_dir).peft_config["default"]
    assert set(config.selection) == set(config.base_fingerprint) == ALL
    assert bool(config.base_quantization) == (tested is not DENSE)
    config.save_pretrained(str(tmp_path))
    assert SGRQConfig.from_pretrained(str(tmp_path)) == config


@pytest.mark.parametrize("version", [2, 0, "2", 1.5, None])
def test_an_unknown_format_version_is_refused(version, tmp_path: Path):
    SGRQConfig().save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sgrq_version": version}))
    for load in (SGRQConfig.from_pretrained, PeftConfig.from_pretrained):
        with pytest.raises(ValueError, match=r"`sgrq_version`.*install a newer peft-sgrq"):
            load(str(tmp_path))


def test_a_wrong_field_in_a_file_is_refused(tmp_path: Path):
    SGRQConfig().save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "ratio": 7}))
    with pytest.raises(ValueError, match="`ratio` is 7"):
        PeftConfig.from_pretrained(str(tmp_path))


# one config, several models


def test_the_given_config_is_not_modified_and_serves_two_models(llama_dir: Path, ids):
    config = SGRQConfig(ratio=0.5, task_type="CAUSAL_LM", init_weights=False)
    given = copy.deepcopy(config)
    models = [get_peft_model(base.load(llama_dir), config) for base in (NF4, INT8)]
    given.base_model_name_or_path = config.base_model_name_or_path  # PEFT writes the name of the base
    assert config == given and config.base_model_name_or_path == str(llama_dir)
    first, second = (model.peft_config["default"] for model in models)
    assert first is not config and second is not config
    assert first.selection != second.selection and first.base_fingerprint != second.base_fingerprint
    assert all(train_steps(model, ids, steps=1) for model in models)
    for name in ("selection", "base_fingerprint", "base_quantization"):
        assert getattr(config, name) is None


def test_a_second_adapter_made_of_the_completed_config_is_independent(llama_dir: Path):
    model = adapted(NF4, llama_dir)
    config = model.peft_config["default"]
    before = copy.deepcopy(config)
    model.add_adapter("other", config)
    other = model.peft_config["other"]
    assert other is not config and other.selection is not config.selection and other.selection == config.selection
    other.selection.clear()
    assert config == before
