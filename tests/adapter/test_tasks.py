"""Models with heads, wrappers and layers of other kinds: what is adapted, trained whole, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model
from support.bases import DENSE, NF4_NESTED, VOCABULARY, Base, adapted, logits
from support.single_layers import linear_4bit, linear_8bit, linear_dense
from torch import nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)

from peft_sgrq import SGRQConfig

HEADED = {
    "SEQ_CLS": (BertForSequenceClassification, "classifier"),
    "TOKEN_CLS": (BertForTokenClassification, "classifier"),
    "QUESTION_ANS": (BertForQuestionAnswering, "qa_outputs"),
}


def bert(cls: type) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.2,
    )
    return cls(config).eval()


@torch.no_grad()
def outputs(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids=ids)[0]


@pytest.mark.parametrize("task", HEADED)
@pytest.mark.parametrize("targets", [None, ["query", "dense"]])
def test_heads_are_trained_whole_saved_and_loaded(task, targets, ids, tmp_path: Path):
    cls, head = HEADED[task]
    config = SGRQConfig(task_type=task, target_modules=targets, init_weights=False)
    model = get_peft_model(bert(cls), config)
    assert not any(head in name for name in model.peft_config["default"].selection)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any(f"{head}.modules_to_save.default.weight" in name for name in trained)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if head in name and parameter.requires_grad:
                parameter.mul_(-2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bert(cls), tmp_path)
    assert torch.equal(outputs(loaded, ids), outputs(model, ids))


def test_a_second_adapter_sees_the_model_as_the_first_did(llama_dir: Path):
    settings = {"trainable_token_indices": [1, 2], "task_type": "CAUSAL_LM"}
    model = adapted(DENSE, llama_dir, **settings)
    model.add_adapter("b", SGRQConfig(**settings))
    first, second = (model.peft_config[name].selection for name in ("default", "b"))
    assert set(first) == set(second)


def test_attention_whose_projection_is_never_called_is_left_alone():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(64, 2)
            self.lin = nn.Linear(64, 64)

    assert set(get_peft_model(Model(), SGRQConfig()).peft_config["default"].selection) == {"lin"}
    with pytest.raises(ValueError, match=r"'attention\.out_proj' cannot be adapted"):
        get_peft_model(Model(), SGRQConfig(target_modules=["out_proj"]))


def test_another_group_size_is_refused_before_anything_changes():
    model = get_peft_model(nn.Sequential(nn.Linear(128, 8), nn.Linear(8, 8)), SGRQConfig(target_modules=["1"]))
    before = repr(model)
    with pytest.raises(ValueError, match=r"`group_size` is 4 for layer '1'.*use 8"):
        model.add_adapter("b", SGRQConfig(group_size=4))
    assert repr(model) == before


def test_an_offloaded_layer_is_refused_by_name():
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 8))
    cpu_offload(model[0], execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"Layer '0' cannot be adapted: it is offloaded by accelerate"):
        get_peft_model(model, SGRQConfig())


@pytest.mark.parametrize("make", [linear_4bit, linear_8bit, linear_dense])
def test_a_bias_that_is_trained_gets_its_gradient(make):
    model = get_peft_model(nn.Sequential(make(8, 128)), SGRQConfig(init_weights=False))
    layer = model.base_model.model[0]
    layer.base_layer.bias.requires_grad_(True)
    x, dy = torch.randn(5, 128), torch.randn(5, 8)
    y = model(x)
    y.backward(dy)
    assert torch.allclose(layer.base_layer.bias.grad, dy.sum(0))
    layer.base_layer.bias.requires_grad_(False)
    assert torch.equal(model(x), y)


def test_a_base_layer_put_in_place_of_another_is_the_one_that_computes():
    model = get_peft_model(nn.Sequential(nn.Linear(64, 8)), SGRQConfig(init_weights=False))
    layer, x = model.base_model.model[0], torch.randn(3, 64)
    expected = -(model(x) - layer.base_layer.bias)
    replacement = nn.Linear(64, 8)
    replacement.weight.data, replacement.bias.data = -layer.base_layer.weight.data, torch.zeros(8)
    layer.base_layer = replacement
    assert torch.allclose(model(x), expected, atol=1e-6)


def test_bases_that_differ_in_the_second_level_of_scales_alone_are_told_apart():
    fingerprints = []
    for factor in (1, 2):
        torch.manual_seed(0)
        layer = linear_4bit(8, 128, nested=True, factor=factor)
        model = get_peft_model(nn.Sequential(layer), SGRQConfig())
        fingerprints.append(model.peft_config["default"].base_fingerprint["0"].split(":"))
    assert fingerprints[0][1] == fingerprints[1][1]
    assert fingerprints[0][2] != fingerprints[1][2]


@pytest.mark.parametrize("base", [NF4_NESTED, DENSE], ids=lambda base: base.name)
def test_a_merge_that_fails_leaves_the_layer_as_it_was(base: Base, llama_dir: Path, ids, monkeypatch):
    model = adapted(base, llama_dir)
    model.add_adapter("b", SGRQConfig(ratio=0.5, init_weights=False))
    model.merge_adapter(["default"])
    merged = logits(model, ids)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    monkeypatch.setattr(layer.scaled_weight, "prepare", lambda scales: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        layer.merge(adapter_names=["b"])
    assert layer.merged_adapters == ["default"]
    assert torch.equal(logits(model, ids), merged)


def test_one_layer_without_weights_does_not_switch_the_check_off(llama_dir: Path, tmp_path: Path):
    adapted(DENSE, llama_dir).save_pretrained(tmp_path)
    other = adapted(DENSE, llama_dir).merge_and_unload()
    other.model.layers[0].mlp.up_proj.to("meta")
    with pytest.raises(ValueError, match="does not fit this base"):
        PeftModel.from_pretrained(other, tmp_path)


def test_a_weighted_adapter_adapts_the_layers_of_its_parts_only():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(64, 8)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.block = nn.Linear(64, 8), Block()

    model = get_peft_model(Model(), SGRQConfig(target_modules="lin", init_weights=False))
    model.add_weighted_adapter(["default"], [1.0], "copy")
    assert set(model.peft_config["copy"].selection) == {"lin"}
