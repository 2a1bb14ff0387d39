"""Calibration finds the same block by block or not, whatever a model does with its layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.bases import DENSE, INT8
from support.calibration import close, reference, run
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    FalconConfig,
    FalconForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_sgrq import Saliency, SGRQConfig


def projections() -> SGRQConfig:
    return SGRQConfig(target_modules=r".*_proj", group_size=16)


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


def test_kernels_that_depend_on_the_batch_do_not_hide_a_chain(llama_dir: Path, caplog):
    run(INT8.load(llama_dir))  # which columns are outliers depends on what else is in the batch
    assert "cannot be run one by one" not in caplog.text


@pytest.mark.parametrize("criterion", ["fisher", "gradient"])
def test_models_that_add_to_outputs_in_place_are_differentiated(criterion):
    torch.manual_seed(0)
    config = FalconConfig(
        vocab_size=259, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, new_decoder_architecture=False
    )
    found = run(FalconForCausalLM(config).eval(), criterion)
    assert found.scores and all(bool(scores.any()) for scores in found.scores.values())


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
    from peft_sgrq.selection import input_scores

    plans = []
    passes = input_scores._Collection.passes
    monkeypatch.setattr(
        input_scores._Collection, "passes", lambda self, plan: (plans.append(plan), passes(self, plan))[1]
    )
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


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("length", [7, 9], ids=["shorter targets", "targets of equal length"])
@pytest.mark.parametrize("criterion", ["obs", "diag"])
def test_an_encoder_and_a_decoder_count_their_own_padding(kind, criterion, length):
    torch.manual_seed(0)
    if kind == "t5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
        model = T5ForConditionalGeneration(T5Config(vocab_size=64, decoder_start_token_id=0, **sizes)).eval()
        encoder, names = "encoder.block.1.layer.0.SelfAttention.k", ["q", "k", "v", "o", "wi", "wo"]
        self_attention, cross = "decoder.block.1.layer.0.SelfAttention.k", "decoder.block.1.layer.1.EncDecAttention.k"
    else:
        heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_layers": 3, "encoder_layers": 2}
        sizes = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, **heads}
        model = BartForConditionalGeneration(BartConfig(vocab_size=64, max_position_embeddings=64, **sizes)).eval()
        encoder, names = "model.encoder.layers.1.self_attn.k_proj", ["q_proj", "k_proj", "v_proj", "fc1"]
        self_attention = "model.decoder.layers.1.self_attn.k_proj"
        cross = "model.decoder.layers.1.encoder_attn.k_proj"
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    decoder_mask = torch.tensor([[1] * 5 + [0] * (length - 5), [1] * length])
    batch = {
        "input_ids": torch.randint(3, 64, (2, 9)) * mask,
        "attention_mask": mask,
        "decoder_input_ids": torch.randint(3, 64, (2, length)) * decoder_mask,
        "decoder_attention_mask": decoder_mask,
    }
    found = run(model, criterion, [batch], SGRQConfig(group_size=16, target_modules=names))
    for name, kept in ((encoder, mask), (self_attention, decoder_mask), (cross, mask)):
        seen: list[torch.Tensor] = []
        layer = model.get_submodule(name)
        handle = layer.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].detach()))
        model(**batch)
        handle.remove()
        expected = reference(criterion, layer.weight.detach().double(), seen[0][kept.bool()].double())
        close(found.scores[name], expected.sum(0), 2e-4)


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
