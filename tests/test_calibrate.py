"""Calibration finds what float64 torch finds, in every format, block by block or not; a config takes it along."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import DENSE, INT8, NF4, NF4_NESTED, TRAINING, Base, byte_tokenizer
from calibration import TEXTS, inputs_of, layers_of, padded_batches, reference, summed, weight_of
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration
from trl import SFTConfig, SFTTrainer

from peft_sgrq import Saliency, SGRQConfig, calibrate
from peft_sgrq.selection import decode_mask, encode_mask, select_top
from peft_sgrq.selection.criteria import LayerStatistics

BF16 = Base("dense", False, torch.bfloat16)
TESTED = [NF4, NF4_NESTED, INT8, DENSE, BF16, Base("nf4", True, torch.bfloat16)]
BASE_IDS = [base.name for base in TESTED]


def run(
    model: Any, criterion: Any = None, data: Any = None, config: SGRQConfig | None = None, **kwargs: Any
) -> Saliency:
    config = config or SGRQConfig(group_size=16, task_type="CAUSAL_LM")
    return calibrate(
        model, config, padded_batches() if data is None else data, criterion=criterion, progress=False, **kwargs
    )


def projections() -> SGRQConfig:
    return SGRQConfig(target_modules=r".*_proj", group_size=16)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert float((found.double() - expected).abs().max()) <= tolerance * float(expected.abs().max())


# criteria


@pytest.mark.parametrize("base", TESTED, ids=BASE_IDS)
@pytest.mark.parametrize("criterion", ["obs", "billm", "diag", "error"])
def test_criteria_of_inputs_equal_float64_references(criterion, base: Base, llama_dir: Path):
    model = base.load(llama_dir)
    original = AutoModelForCausalLM.from_pretrained(llama_dir)
    if base.quant == "dense":  # what is not quantized must have another original
        for parameter in original.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)
    found = run(model, criterion, original=original if criterion == "error" else None)
    inputs = inputs_of(model, padded_batches())
    before = {name: weight_of(backend) for name, backend in layers_of(original).items()}
    assert list(found.scores) == list(inputs) and len(inputs) == 14
    assert found.tokens == len(inputs["model.layers.0.self_attn.q_proj"])
    for name, backend in layers_of(model).items():
        scores = reference(criterion, weight_of(backend), inputs[name], before[name])
        close(found.scores[name], summed(scores, backend), 1e-3 if criterion == "billm" else 2e-4)
        assert found.layers[name].group_size == backend.group_size
        assert found.layers[name].fingerprint == backend.fingerprint()


@pytest.mark.parametrize("criterion", ["obs", "diag"])
def test_layers_of_other_classes_are_scored_alike(criterion, gpt2_dir: Path):
    model = DENSE.load(gpt2_dir)  # transformers' Conv1D, and one block
    found = run(model, criterion)
    inputs = inputs_of(model, padded_batches())
    assert len(inputs) == 4
    for name, backend in layers_of(model).items():
        close(found.scores[name], reference(criterion, weight_of(backend), inputs[name]).sum(0), 2e-4)


def dense_copy(model: Any, directory: Path) -> Any:
    """The model with the weights its layers compute with, in float64, trainable."""
    dense = AutoModelForCausalLM.from_pretrained(directory).double().eval()
    for name, backend in layers_of(model).items():
        dense.get_submodule(name).weight.data = weight_of(backend)
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
    for name, backend in layers.items():
        products = [weight_of(backend) * gradient[name] for gradient in gradients]  # (N, K)
        if criterion == "fisher":
            expected = sum(product.square().sum(0) for product in products) / found.tokens
            close(found.scores[name], expected, 1e-3)
        else:
            size = backend.group_size
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
        close(found.group_scores(name), total.sum(1 if base is INT8 else 0) / found.tokens, tolerance)


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
    for name, backend in layers_of(model).items():
        close(found.scores[name], summed(weight_of(backend).square(), backend))
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
    for name, backend in layers_of(model).items():
        h = 2 / len(inputs[name]) * inputs[name].T @ inputs[name]
        close(found.scores[name], (weight_of(backend).square() * h.square().sum(0)).sum(dim))
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
        for name, backend in layers_of(model).items():
            close(found.scores[name], summed(reference(criterion, weight_of(backend), inputs[name]), backend), 1e-3)


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
        assert layer.sgrq_delta["default"].groups.tolist() == rows.tolist()


# models


def same_scores(first: Saliency, second: Saliency, tolerance: float = 1e-4) -> None:
    assert list(first.scores) == list(second.scores) and first.tokens == second.tokens
    for name in first.scores:
        close(first.scores[name], second.scores[name].double(), tolerance)


class Scaled(nn.Module):
    """A Llama whose decoder scales hidden states between its blocks."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model = model
        for layer in list(model.model.layers)[1:]:
            layer.register_forward_pre_hook(lambda module, args: (args[0] * factor, *args[1:]))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)


def test_models_that_are_no_chain_of_blocks_are_passed_through_whole(llama_dir: Path, caplog):
    plain = run(DENSE.load(llama_dir))
    assert "cannot be run one by one" not in caplog.text
    found = run(Scaled(DENSE.load(llama_dir), 1.0), config=projections())
    assert "cannot be run one by one (block 1 does not get the output of the block before it)" in caplog.text
    assert [name.removeprefix("model.") for name in found.scores] == list(plain.scores)
    for name, scores in plain.scores.items():
        close(found.scores["model." + name], scores.double())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return self.linear(x + shift).tanh() + x


class Shifted(nn.Module):
    """Each block is also given a number made of the output of the one before it, or is left out, or called twice."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.kind = kind

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        order = {"left out": [0, 2], "twice": [0, 1, 2, 1], "backwards": [2, 1, 0]}.get(self.kind, [0, 1, 2])
        for index in order:
            shift = x.mean() if self.kind == "shifted" else torch.ones(())
            x = self.blocks[index](x, shift=shift)
        return x


@pytest.mark.parametrize("kind", ["chain", "shifted", "left out", "twice", "backwards"])
def test_a_stack_that_only_looks_like_a_chain_is_noticed(kind, caplog):
    torch.manual_seed(0)
    model = Shifted(kind)
    data = [{"input_ids": torch.randint(0, 32, (3, 7))} for _ in range(3)]
    found = run(model, "obs", data, SGRQConfig(target_modules=["linear"], group_size=8))
    assert ("cannot be run one by one" in caplog.text) == (kind != "chain")
    inputs: dict[str, list[torch.Tensor]] = {f"blocks.{index}.linear": [] for index in range(3)}
    for name, parts in inputs.items():
        hook = lambda module, args, parts=parts: parts.append(args[0].detach().flatten(0, 1).double())  # noqa: E731
        model.get_submodule(name).register_forward_pre_hook(hook)
    for batch in data:
        model(**batch)
    for name, parts in inputs.items():
        if parts:
            weight = model.get_submodule(name).weight.detach().double()
            close(found.scores[name], reference("obs", weight, torch.cat(parts)).sum(0), 2e-4)
        else:
            assert found.scores[name].eq(0).all()


@pytest.mark.parametrize("limit", [None, 4 * 128**2, "70KB", "1GB"])
def test_a_memory_limit_splits_passes_and_changes_no_score(limit, llama_dir: Path, monkeypatch):
    from peft_sgrq.selection import collect

    plans = []
    passes = collect._Collection.passes
    monkeypatch.setattr(collect._Collection, "passes", lambda self, plan: (plans.append(plan), passes(self, plan))[1])
    found = run(Scaled(DENSE.load(llama_dir), 0.7), config=projections(), memory_limit=limit)
    expected = run(Scaled(DENSE.load(llama_dir), 0.7), config=projections())
    same_scores(found, expected, 1e-6)
    (plan, _) = plans
    assert sorted(name for names in plan for name in names) == sorted(found.scores)
    if limit in (None, "1GB"):
        assert len(plan) == 1
    else:  # of each block the Hessians of three inputs of 64 columns (q, k and v share one, gate and up another)
        assert len(plan) == 4
        assert all(len(names) == 1 for names in plan if "down_proj" in names[0])
    with pytest.raises(ValueError, match=r"`memory_limit` is '60KB', expected at least 65536 bytes.*down_proj"):
        run(Scaled(DENSE.load(llama_dir), 0.7), config=projections(), memory_limit="60KB")


def test_an_encoder_and_a_decoder_count_their_own_padding():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
    )
    model = T5ForConditionalGeneration(config).eval()
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    ids = torch.randint(3, 64, (2, 9)) * mask
    decoder_ids = torch.randint(3, 64, (2, 7))
    batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": decoder_ids}
    config = SGRQConfig(group_size=16, target_modules=["q", "k", "v", "o", "wi", "wo"], task_type="SEQ_2_SEQ_LM")
    found = run(model, "obs", [batch], config)
    other = {**batch, "input_ids": torch.where(mask.bool(), ids, 5)}
    same_scores(run(model, "obs", [other], config), found)
    assert len(found.scores) == 2 * 6 + 2 * 10 and found.tokens == 13


def test_layers_that_no_token_reaches_score_nothing(llama_dir: Path, caplog):
    model = DENSE.load(llama_dir)
    model.unused = nn.Linear(64, 8)
    found = run(model, "obs", config=SGRQConfig(target_modules=["unused", "q_proj"], group_size=16))
    assert found.scores["unused"].eq(0).all() and found.scores["model.layers.1.self_attn.q_proj"].gt(0).all()
    assert "No calibration token came to layer unused" in caplog.text


def test_layers_that_share_an_input_only_sometimes_are_told_apart(caplog):
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(32, 16)
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = self.embedding(input_ids)
            return self.a(x) + self.b(x if int(input_ids[0, 0]) else x * 3)

    torch.manual_seed(0)
    model = Fickle()
    ids = torch.randint(1, 32, (4, 5))
    data = [{"input_ids": ids}, {"input_ids": torch.zeros_like(ids)}]
    found = run(model, "diag", data, SGRQConfig(target_modules=["a", "b"], group_size=8))
    assert "do not share their inputs" in caplog.text
    x = torch.cat([model.embedding(ids).flatten(0, 1), model.embedding(torch.zeros_like(ids)).flatten(0, 1)]).double()
    close(found.scores["a"], reference("diag", model.a.weight.double(), x).sum(0).detach())
    x[20:] *= 3
    close(found.scores["b"], reference("diag", model.b.weight.double(), x).sum(0).detach())


@pytest.mark.parametrize("criterion", ["obs", "diag", "gradient"])
def test_only_targeted_layers_are_scored(criterion, llama_dir: Path):
    model = DENSE.load(llama_dir)
    whole = run(model, criterion)
    config = SGRQConfig(group_size=16, target_modules=["q_proj", "down_proj"], layers_to_transform=[0])
    found = run(model, criterion, config=config)
    assert list(found.scores) == ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
    for name, scores in found.scores.items():
        close(scores, whole.scores[name].double(), 1e-6)


# the config


@pytest.mark.parametrize("base", [NF4_NESTED, INT8, DENSE], ids=lambda base: base.name)
@pytest.mark.parametrize("ratio", [0.3, "knee", "global"])
def test_a_calibrated_config_goes_through_a_trainer_unchanged(base: Base, ratio, llama_dir: Path, tmp_path: Path):
    config = SGRQConfig(ratio=ratio, group_size=16, budget=0.9, ratio_pattern={"o_proj": 1.0}, task_type="CAUSAL_LM")
    tokenizer = byte_tokenizer()
    model = base.load(llama_dir)
    saliency = calibrate(model, config, TEXTS, tokenizer, progress=False)
    expected = saliency.select(ratio, {"o_proj": 1.0}, 0.9)
    assert config.selection == expected and config.criterion == "obs" and config.ratio == ratio
    given = copy.deepcopy(config)
    trainer = SFTTrainer(
        model,
        args=SFTConfig(**TRAINING, output_dir=str(tmp_path), max_steps=2, max_length=32),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer,
        peft_config=config,
    )
    trainer.train()
    assert replace(config, base_model_name_or_path=None) == given  # PEFT writes that
    trainer.model.save_pretrained(tmp_path / "adapter")
    saved = PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    assert saved.selection == expected and saved.ratio == ratio and saved.criterion == "obs"
    loaded = PeftModel.from_pretrained(base.load(llama_dir), tmp_path / "adapter")
    for name, mask in expected.items():
        layer = loaded.get_submodule(f"base_model.model.{name}")
        assert layer.sgrq_delta["default"].groups.tolist() == decode_mask(mask, layer.backend.selectable).tolist()


def test_another_ratio_costs_nothing(llama_dir: Path, tmp_path: Path):
    config = SGRQConfig(ratio=0.2, group_size=16, task_type="CAUSAL_LM")
    model = DENSE.load(llama_dir)
    saliency = run(model, config=config)
    saliency.save(tmp_path / "saliency.safetensors")
    loaded = Saliency.load(tmp_path / "saliency.safetensors")
    other = SGRQConfig(group_size=16, task_type="CAUSAL_LM")
    assert loaded.configure(other, ratio=0.75) is other and other.ratio == 0.75
    for name, scores in saliency.scores.items():
        count = round(0.75 * len(scores) / 16)
        groups = select_top(scores.view(-1, 16).sum(1), count)
        assert other.selection[name] == encode_mask(groups, len(scores) // 16)
    peft_model = get_peft_model(model, other)
    assert peft_model.peft_config["default"].selection == other.selection


def test_a_config_of_fewer_layers_takes_those_of_the_saliency(llama_dir: Path):
    model = DENSE.load(llama_dir)
    saliency = run(model)
    config = saliency.configure(SGRQConfig(target_modules=["q_proj"], group_size=16))
    assert list(config.selection) == [f"model.layers.{index}.self_attn.q_proj" for index in range(2)]
    get_peft_model(model, config)
    with pytest.raises(ValueError, match=r"targets none of the 14 layers"):
        saliency.configure(SGRQConfig(target_modules=["c_attn"]))


@pytest.mark.parametrize("ratio", ["knee", "global", 0.3])
def test_named_ratios_work_on_magnitudes_without_calibration(ratio, llama_dir: Path):
    model = DENSE.load(llama_dir)
    saliency = calibrate(model, SGRQConfig(group_size=16), criterion="magnitude", progress=False)
    config = SGRQConfig(ratio=ratio, group_size=16, budget=0.6, ratio_pattern={"v_proj": 1.0})
    selection = get_peft_model(model, config).peft_config["default"].selection
    assert selection == saliency.select(ratio, {"v_proj": 1.0}, 0.6)
    assert config.selection is None  # the caller's config stays as it is
