"""Trained rows (`trainable_token_indices`) compute as the layers they are rows of, or are refused before anything."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tr
from peft import get_peft_model
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from support.small_models import SEQ2SEQ, TEXT, TIED
from torch import nn

from peft_sgrq import SGRQConfig

IDS = torch.tensor([[3, 5, 7, 11]])
BERT = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}


def bert(cls: str = "Bert", tied: bool = True) -> Any:
    torch.manual_seed(0)
    model = getattr(tr, f"{cls}ForMaskedLM")(getattr(tr, f"{cls}Config")(**BERT, tie_word_embeddings=tied))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter)  # biases of zero would hide that one is lost
    return model


def refusal(model: Any, **config: Any) -> str:
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match="The model was not changed") as caught:
        get_peft_model(model, SGRQConfig(**config))
    assert {name: type(module) for name, module in model.named_modules()} == before
    return str(caught.value)


HEADS = {"Bert": "predictions.decoder", "Roberta": "lm_head.decoder", "Electra": "generator_lm_head"}


@pytest.mark.parametrize("cls", HEADS)
def test_rows_of_a_head_with_a_bias_are_refused(cls):
    for rows in ([5], {"word_embeddings": [5]}, {HEADS[cls]: [5]}):
        assert "it has a bias, which PEFT leaves out" in refusal(bert(cls), trainable_token_indices=rows)


def test_peft_still_leaves_a_bias_out():
    head = nn.Linear(8, 16)
    rows, x = TrainableTokensLayer(head, "default"), torch.randn(2, 8)
    rows.update_layer("default", token_indices=[3])
    assert torch.equal(rows(x), x @ head.weight.T) and not torch.equal(rows(x), head(x))


@pytest.mark.parametrize("whole", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_rows_of_what_is_trained_whole_are_refused(whole):
    assert "`modules_to_save` trains it whole" in refusal(
        TIED["llama"](), trainable_token_indices=[5], modules_to_save=whole
    )


def test_rows_of_an_adapted_or_another_layer_are_refused():
    model = TIED["llama"]()
    assert "its scales are trained" in refusal(model, trainable_token_indices=[5], target_modules=["lm_head"])
    assert "it is a LlamaRMSNorm" in refusal(model, trainable_token_indices={"model.norm": [5]})

    class Normed(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return nn.functional.normalize(super().forward(ids), dim=-1)

    model.set_input_embeddings(Normed(128, 64))
    assert "its class Normed computes otherwise" in refusal(model, trainable_token_indices=[5])


HOOKS = {
    "output": lambda layer: layer.register_forward_hook(lambda module, args, y: y * 2),
    "input": lambda layer: layer.register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0] * 0,), kwargs), with_kwargs=True
    ),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_rows_of_a_layer_whose_hooks_change_it_are_refused_and_it_may_be_trained_whole(kind):
    for tied in (True, False):  # of the head that is tied to the rows, too
        model = TIED["llama"]()
        HOOKS[kind](model.get_output_embeddings() if tied else model.get_input_embeddings())
        assert "it has hooks that change what it computes" in refusal(model, trainable_token_indices=[5])
    model = get_peft_model(model, SGRQConfig(modules_to_save=["embed_tokens"], init_weights=False)).eval()
    with torch.no_grad():
        trained = model(input_ids=IDS).logits
        assert torch.equal(model.merge_and_unload()(input_ids=IDS).logits, trained)


def test_hooks_that_change_nothing_do_not_keep_rows_from_being_trained():
    model = TIED["llama"]()
    model.enable_input_require_grads()  # as Trainer does for checkpointing
    get_peft_model(model, SGRQConfig(trainable_token_indices=[5]))


def gemma() -> Any:
    return tr.Gemma3ForCausalLM(tr.Gemma3TextConfig(**TEXT, head_dim=16))


MODELS: dict[str, Any] = {
    "bert without the tie": lambda: bert(tied=False),
    "gemma scales its embedding": gemma,
    "bart scales its embedding": lambda: tr.BartForConditionalGeneration(
        tr.BartConfig(**SEQ2SEQ, scale_embedding=True)
    ),
    "llama": TIED["llama"],
}


@pytest.mark.parametrize("name", MODELS)
def test_other_rows_compute_as_their_layers(name):
    torch.manual_seed(0)
    base = MODELS[name]().eval()
    config = SGRQConfig(trainable_token_indices=[5], init_weights=True)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, base(input_ids=IDS).logits)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 10)
        trained = model(input_ids=IDS).logits
        assert torch.equal(model.merge_and_unload()(input_ids=IDS).logits, trained)


def test_a_second_adapter_may_have_rows_of_its_own():
    model = get_peft_model(TIED["llama"](), SGRQConfig(trainable_token_indices=[5]))
    model.add_adapter("other", SGRQConfig(trainable_token_indices=[7]))
