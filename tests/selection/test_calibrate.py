"""Calibration finds what plain float64 torch finds, by every criterion and in every format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from support.bases import DENSE, INT8, NF4, NF4_NESTED, Base
from support.calibration import close, inputs_of, layers_of, padded_batches, reference, run, summed, weight_of
from torch import nn
from transformers import (
    AutoModelForCausalLM,
)

from peft_sgrq import SGRQConfig, calibrate
from peft_sgrq.selection.criteria import LayerStatistics

BF16 = Base("dense", False, torch.bfloat16)
TESTED = [NF4, NF4_NESTED, INT8, DENSE, BF16, Base("nf4", True, torch.bfloat16)]
BASE_IDS = [base.name for base in TESTED]


@pytest.mark.parametrize(  # a criterion sees a weight and inputs, whatever the format
    ("criterion", "base"),
    [
        *((criterion, base) for criterion in ("obs", "error") for base in TESTED),
        *((criterion, base) for criterion in ("billm", "diag") for base in (NF4_NESTED, INT8)),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_criteria_of_inputs_equal_float64_references(criterion, base: Base, llama_dir: Path):
    model = base.load(llama_dir)
    original = AutoModelForCausalLM.from_pretrained(llama_dir)
    if base.quant == "dense":  # what is not quantized must have another original
        for parameter in original.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)
    found = run(model, criterion, original=original if criterion == "error" else None)
    inputs = inputs_of(model, padded_batches())
    before = {name: weight_of(scaled_weight) for name, scaled_weight in layers_of(original).items()}
    assert list(found.scores) == list(inputs) and len(inputs) == 14
    assert found.tokens == len(inputs["model.layers.0.self_attn.q_proj"])
    for name, scaled_weight in layers_of(model).items():
        scores = reference(criterion, weight_of(scaled_weight), inputs[name], before[name])
        close(found.scores[name], summed(scores, scaled_weight), 1e-3 if criterion == "billm" else 2e-4)
        assert found.layers[name].group_size == scaled_weight.group_size
        assert found.layers[name].fingerprint == scaled_weight.fingerprint()


@pytest.mark.parametrize("criterion", ["obs", "diag"])
def test_layers_of_other_classes_are_scored_alike(criterion, gpt2_dir: Path):
    model = DENSE.load(gpt2_dir)  # transformers' Conv1D, and one block
    found = run(model, criterion)
    inputs = inputs_of(model, padded_batches())
    assert len(inputs) == 4
    for name, scaled_weight in layers_of(model).items():
        close(found.scores[name], reference(criterion, weight_of(scaled_weight), inputs[name]).sum(0), 2e-4)


def dense_copy(model: Any, directory: Path) -> Any:
    """The model with the weights its layers compute with, in float64, trainable."""
    dense = AutoModelForCausalLM.from_pretrained(directory).double().eval()
    for name, scaled_weight in layers_of(model).items():
        dense.get_submodule(name).weight.data = weight_of(scaled_weight)
    return dense


def sequence_gradients(model: Any, batches: list[dict[str, torch.Tensor]], names: list[str]) -> list[dict]:
    """Gradients of the summed loss of each sequence, without its padding, in the weights of some layers."""
    found = []
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            row = ids[mask.bool()].unsqueeze(0)
            logits = model(input_ids=row, use_cache=False).logits[0, :-1]
            loss = nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum")
            weights = [model.get_submodule(name).weight for name in names]
            found.append(dict(zip(names, torch.autograd.grad(loss, weights), strict=True)))
    return found


@pytest.mark.parametrize("base", [NF4, NF4_NESTED, DENSE], ids=lambda base: base.name)
@pytest.mark.parametrize("criterion", ["fisher", "gradient"])
def test_criteria_of_gradients_equal_float64_references(criterion, base: Base, llama_dir: Path):
    model = base.load(llama_dir)
    found = run(model, criterion)
    layers = layers_of(model)
    gradients = sequence_gradients(dense_copy(model, llama_dir), padded_batches(), list(layers))
    for name, scaled_weight in layers.items():
        products = [weight_of(scaled_weight) * gradient[name] for gradient in gradients]  # (N, K)
        if criterion == "fisher":
            expected = sum(product.square().sum(0) for product in products) / found.tokens
            close(found.scores[name], expected, 1e-3)
        else:
            size = scaled_weight.group_size
            sums = [product.unflatten(1, (-1, size)).sum(2).square().sum(0) for product in products]  # (G,)
            expected = sum(sums) / found.tokens
            close(found.group_scores(name), expected, 1e-3)
            close(found.scores[name], expected.repeat_interleave(size) / size, 1e-3)


@pytest.mark.parametrize("base", TESTED, ids=BASE_IDS)
def test_the_gradient_criterion_is_that_of_the_deltas_in_training(base: Base, llama_dir: Path):
    model = base.load(llama_dir)
    found = run(model, "gradient", padded_batches(1))
    peft_model = get_peft_model(model, SGRQConfig(ratio=1.0, group_size=16, task_type="CAUSAL_LM")).eval()
    totals: dict[str, torch.Tensor] = {}
    (batch,) = padded_batches(1)
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        row = ids[mask.bool()].unsqueeze(0)
        peft_model.zero_grad()
        (peft_model(input_ids=row, labels=row).loss * (row.shape[1] - 1)).backward()
        for name, parameter in peft_model.named_parameters():
            if parameter.requires_grad:
                layer = name.removeprefix("base_model.model.").partition(".sgrq_delta")[0]
                totals[layer] = totals.get(layer, 0) + parameter.grad.double().square()
    tolerance = {"dense-bfloat16": 0.1, "nf4-nested-bfloat16": 0.1, "int8-float32": 0.1}.get(base.name, 1e-3)
    for name, total in totals.items():
        close(found.layers[name].group_scores(), total.sum(1 if base is INT8 else 0) / found.tokens, tolerance)


def test_it_does_not_matter_how_sequences_are_batched(llama_dir: Path):
    model = DENSE.load(llama_dir)
    whole = padded_batches(1, rows=6)[0]
    single = [{key: value[row : row + 1] for key, value in whole.items()} for row in range(6)]
    trimmed = [{key: value[:, : int(row["attention_mask"].sum())] for key, value in row.items()} for row in single]
    for criterion in ("obs", "diag", "fisher", "gradient"):
        one, many = run(model, criterion, [whole]), run(model, criterion, trimmed)
        assert one.tokens == many.tokens
        for name in one.scores:
            close(one.scores[name], many.scores[name].double(), 1e-3)


@pytest.mark.parametrize("criterion", ["obs", "diag", "fisher", "gradient"])
def test_what_stands_in_the_padding_changes_nothing(criterion, llama_dir: Path):
    model = DENSE.load(llama_dir)
    batches = padded_batches()
    other = [
        {**batch, "input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 77)}
        for batch in batches
    ]
    first, second = run(model, criterion, batches), run(model, criterion, other)
    for name in first.scores:
        close(first.scores[name], second.scores[name].double(), 1e-4)


@pytest.mark.parametrize("base", [NF4, INT8, DENSE], ids=lambda base: base.name)
def test_magnitude_and_random_need_no_data(base: Base, llama_dir: Path):
    model = base.load(llama_dir)
    config = SGRQConfig(ratio=0.5, group_size=16, task_type="CAUSAL_LM")
    found = calibrate(model, config, criterion="magnitude", progress=False)
    for name, scaled_weight in layers_of(model).items():
        close(found.scores[name], summed(weight_of(scaled_weight).square(), scaled_weight))
    without = get_peft_model(base.load(llama_dir), SGRQConfig(ratio=0.5, group_size=16, task_type="CAUSAL_LM"))
    assert without.peft_config["default"].selection == config.selection
    seeds = [calibrate(model, config, criterion="random", seed=seed, progress=False).scores for seed in (0, 0, 1)]
    names = list(found.scores)
    assert all(torch.equal(seeds[0][name], seeds[1][name]) for name in names)
    assert not any(torch.equal(seeds[0][name], seeds[2][name]) for name in names)
    assert not torch.equal(seeds[0][names[0]], seeds[0][names[3]])


@pytest.mark.parametrize("summed_up", [False, True], ids=["by-weight", "by-column"])
@pytest.mark.parametrize("base", [NF4, INT8], ids=lambda base: base.name)
def test_a_function_of_the_user_is_a_criterion(base: Base, summed_up, llama_dir: Path):
    dim = 1 if base is INT8 else 0

    def hessian_norm(layer: LayerStatistics) -> torch.Tensor:
        scores = layer.weight.square() * layer.inputs.hessian.square().sum(0).float()
        return scores.sum(dim) if summed_up else scores

    model = base.load(llama_dir)
    config = SGRQConfig(ratio=0.5, task_type="CAUSAL_LM")
    found = run(model, hessian_norm, config=config)
    inputs = inputs_of(model, padded_batches())
    for name, scaled_weight in layers_of(model).items():
        h = 2 / len(inputs[name]) * inputs[name].T @ inputs[name]
        close(found.scores[name], (weight_of(scaled_weight).square() * h.square().sum(0)).sum(dim))
    assert found.criterion == config.criterion == "custom:hessian_norm"
    get_peft_model(model, config)


@pytest.mark.parametrize("tokens", [1, 3])
def test_fewer_tokens_than_columns_will_do(tokens, llama_dir: Path):
    model = DENSE.load(llama_dir)
    data = [{"input_ids": torch.full((1, tokens), 9)}]
    for criterion in ("obs", "billm", "diag"):
        found = run(model, criterion, data)
        inputs = inputs_of(model, data)
        assert found.tokens == tokens
        for name, scaled_weight in layers_of(model).items():
            close(
                found.scores[name],
                summed(reference(criterion, weight_of(scaled_weight), inputs[name]), scaled_weight),
                1e-3,
            )


def test_columns_without_input_score_nothing(llama_dir: Path):
    model = DENSE.load(llama_dir)
    dead = torch.tensor([0, 5, 63])
    model.model.layers[1].input_layernorm.weight.data[dead] = 0
    for criterion in ("obs", "billm", "diag"):
        found = run(model, criterion)
        scores = found.scores["model.layers.1.self_attn.k_proj"]
        assert scores[dead].eq(0).all() and scores.gt(0).sum() == 61
        assert not found.scores["model.layers.1.mlp.up_proj"].eq(0).any()


def test_int8_rows_are_selected_by_their_scores(llama_dir: Path):
    model = INT8.load(llama_dir)
    config = SGRQConfig(ratio=0.25, task_type="CAUSAL_LM")
    found = run(model, "obs", config=config)
    peft_model = get_peft_model(model, config)
    for name, scores in found.scores.items():
        rows = scores.argsort(descending=True)[: len(scores) // 4].sort().values
        layer = peft_model.get_submodule(f"base_model.model.{name}")
        assert layer.sgrq_delta["default"].units.tolist() == rows.tolist()
