"""Mixtures of experts: experts that are linear layers are tuned, fused ones are left alone and named."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.bases import VOCABULARY, logits
from support.library_formats import SCALE_FORMATS
from support.oracle import expected, relative_error
from torch import nn
from transformers import (
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    MixtralConfig,
    MixtralForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from peft_sgrq import SGRQConfig, SGRQLinear


@pytest.fixture(scope="module")
def switch_dir(tmp_path_factory) -> Path:
    """A Switch Transformer with four experts a layer, each two nn.Linear."""
    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=VOCABULARY,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_sparse_encoder_layers=1,
        num_decoder_layers=2,
        num_sparse_decoder_layers=1,
        num_heads=4,
        num_experts=4,
        expert_capacity=64,
        decoder_start_token_id=2,
        router_jitter_noise=0.0,
        dropout_rate=0.0,
    )
    directory = tmp_path_factory.mktemp("switch")
    SwitchTransformersForConditionalGeneration(config).save_pretrained(directory)
    return directory


def load_switch(directory: Path) -> nn.Module:
    # Not nf4: transformers casts the input of `wo` to the dtype of its weight, which is uint8 then.
    quantization = BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForSeq2SeqLM.from_pretrained(
        directory, quantization_config=quantization, dtype=torch.float32
    ).eval()


@pytest.mark.slow
def test_experts_that_are_linear_layers_are_tuned_and_merge_exactly(switch_dir, ids, tmp_path):
    plain = load_switch(switch_dir)
    inputs = {"decoder_input_ids": ids[:, :5]}
    base = logits(plain, ids, **inputs)
    model = get_peft_model(plain, SGRQConfig(task_type="SEQ_2_SEQ_LM", ratio=1.0))
    experts = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, SGRQLinear) and ".experts." in name
    }
    assert len(experts) == 16  # 2 sparse layers x 4 experts x 2 linear layers
    before = model.train()(input_ids=ids, labels=ids).loss
    before.backward()
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    used = [layer for layer in experts.values() if layer.sgrq_delta["default"].weight.grad is not None]
    assert len(used) >= 4, "tokens must have gone through experts, encoder and decoder"
    assert all(layer.sgrq_delta["default"].weight.grad.abs().max() > 0 for layer in used)
    with torch.no_grad():
        for parameter in trained:
            parameter.sub_(parameter.grad * 0.05)
        after = model(input_ids=ids, labels=ids).loss
        expected = -0.05 * sum(parameter.grad.square().sum() for parameter in trained)
        assert torch.allclose(after - before, expected, rtol=0.1), "the loss falls as the gradient says"
        for parameter in trained:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    unmerged = logits(model.eval(), ids, **inputs)
    assert not torch.equal(unmerged, base)
    model.save_pretrained(tmp_path)
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged, ids, **inputs), unmerged)
    loaded = PeftModel.from_pretrained(load_switch(switch_dir), tmp_path).eval()
    assert torch.equal(logits(loaded, ids, **inputs), unmerged)


@pytest.mark.parametrize("format", SCALE_FORMATS, ids=lambda format: format.name)
def test_an_expert_that_gets_no_token_has_zero_gradients(format):
    format.require()
    torch.manual_seed(0)
    dtype = torch.bfloat16 if format.name in ("torchao-int4-cpu", "quanto-int4-tinygemm") else torch.float32
    layer = format.layer(nn.Linear(256, 128, dtype=dtype)).requires_grad_(False)
    model = get_peft_model(nn.Sequential(layer), SGRQConfig(target_modules=["0"], init_weights=False)).train()
    x = torch.empty(0, 256, dtype=dtype, requires_grad=True)
    y = model(x)
    assert y.shape == (0, 128)
    y.sum().backward()
    delta = model.base_model.model[0].sgrq_delta["default"].weight
    assert x.grad.shape == x.shape
    assert torch.equal(delta.grad, torch.zeros_like(delta))
    assert model.eval()(x.detach()).shape == (0, 128)


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            max_position_embeddings=64,
        )
    ).eval()


def test_fused_experts_are_left_alone_and_a_warning_names_them(ids):
    model = mixtral()
    before = {name: value.clone() for name, value in model.state_dict().items() if "experts" in name}
    assert before and all(value.dim() == 3 for value in before.values())
    with pytest.warns(UserWarning, match=r"4 parameters with fused experts .*layers\.0\.mlp\.experts\.\w+_proj"):
        model = get_peft_model(model, SGRQConfig(task_type="CAUSAL_LM", init_weights=False)).eval()
    unmerged = logits(model, ids)
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged, ids), unmerged)
    state = merged.state_dict()
    assert all(torch.equal(state[name], value) for name, value in before.items())


def test_no_warning_where_no_expert_is_fused(llama_dir):
    from support.bases import DENSE

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fused experts.*")
        get_peft_model(DENSE.load(llama_dir), SGRQConfig(task_type="CAUSAL_LM"))


def test_gradients_of_an_expert_do_not_depend_on_the_tokens_of_others():
    """A mixture of two dense experts by hand, each on its own tokens, against float64."""
    torch.manual_seed(0)
    experts = nn.ModuleDict({name: nn.Linear(128, 32, bias=False) for name in ("a", "b")}).requires_grad_(False)
    weights = {name: expert.weight.double() for name, expert in experts.items()}
    model = get_peft_model(experts, SGRQConfig(target_modules=["a", "b"], ratio=1.0)).train()
    x = torch.randn(9, 128)
    rows = {"a": torch.tensor([0, 3, 4]), "b": torch.tensor([1, 2, 5, 6, 7, 8])}
    y = torch.zeros(9, 32).index_copy(0, torch.cat(list(rows.values())), torch.cat(
        [model.base_model.model[name](x[rows[name]]) for name in rows]
    ))  # fmt: skip
    dy = torch.randn_like(y)
    (y * dy).sum().backward()
    for name, chosen in rows.items():
        maps = torch.arange(32), torch.arange(128) // 64
        changes = expected(x[chosen], dy[chosen], weights[name], weights[name], *maps).changes
        assert relative_error(model.base_model.model[name].sgrq_delta["default"].weight.grad, changes) < 1e-5
