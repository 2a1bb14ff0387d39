"""Calibration leaves the model as it was, bit for bit, also when it is interrupted."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from support.bases import DENSE, INT8, NF4, NF4_NESTED, Base, logits
from support.calibration import check_same, padded_batches, run_on, snapshot
from torch import nn
from torch.utils.data import DataLoader

from peft_sgrq import SGRQConfig, SGRQLinear
from peft_sgrq.passes.untouched import untouched

CRITERIA = ["obs", "diag", "fisher", "gradient", "magnitude", "random"]


def prepared(base: Base, directory: Path, training: bool) -> Any:
    """A model whose state is anything but fresh: mixed modes, gradients, hooks, a forward of its own, a used cache."""
    model = base.load(directory).train(training)
    model.model.layers[0].mlp.eval()
    model.model.layers[1].self_attn.train()
    model.model.norm.weight.requires_grad_(True).grad = torch.ones_like(model.model.norm.weight)
    model.model.layers[1].register_forward_hook(lambda *args: None)
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda *args: None)
    forward = model.model.layers[1].forward
    model.model.layers[1].forward = lambda *args, **kwargs: forward(*args, **kwargs)
    model.config.use_cache = True
    if base is INT8:  # bitsandbytes moves the scales of int8 layers at the first forward pass
        logits(model, torch.tensor([[5, 6]]))
    return model


# Each criterion in both modes on one base, on the others the criteria that run the model in ways of their own.
@pytest.mark.parametrize(
    ("base", "criterion", "training"),
    [
        *((NF4_NESTED, criterion, training) for criterion in CRITERIA for training in (True, False)),
        *((base, criterion, True) for base in (INT8, DENSE) for criterion in ("obs", "fisher", "gradient", "random")),
    ],
    ids=lambda value: (
        {True: "train", False: "eval"}[value] if isinstance(value, bool) else getattr(value, "name", None)
    ),
)
def test_the_model_is_as_it_was(base: Base, criterion, training, llama_dir: Path, ids):
    model = prepared(base, llama_dir, training)
    before = snapshot(model)
    loader = DataLoader(padded_batches(), batch_size=None, shuffle=True)
    run_on(model, loader, criterion)
    check_same(before, snapshot(model))
    fresh = base.load(llama_dir)
    assert torch.equal(logits(model.eval(), ids), logits(fresh, ids))


def interrupting(error: type[BaseException], after: int) -> Any:
    calls = []

    def criterion(layer: Any) -> torch.Tensor:
        calls.append(layer.name)
        if len(calls) > after:
            raise error("stop")
        return layer.weight.square()

    return criterion


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("after", [0, 8])
def test_the_model_is_as_it_was_when_interrupted_between_blocks(error, after, llama_dir: Path):
    model = prepared(NF4, llama_dir, True)
    before = snapshot(model)
    config = SGRQConfig(task_type="CAUSAL_LM")
    with pytest.raises(error):
        run_on(model, padded_batches(), interrupting(error, after), config)
    check_same(before, snapshot(model))
    assert config == SGRQConfig(task_type="CAUSAL_LM")


@pytest.mark.parametrize("criterion", ["obs", "diag", "fisher"])
@pytest.mark.parametrize("call", [1, 3])
def test_the_model_is_as_it_was_when_interrupted_in_a_forward_pass(criterion, call, llama_dir: Path):
    model = prepared(NF4, llama_dir, True)
    calls = []

    def interrupt(*args: Any) -> None:
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt

    model.model.layers[1].mlp.register_forward_pre_hook(interrupt)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        run_on(model, padded_batches(), criterion)
    check_same(before, snapshot(model))


def test_the_model_is_as_it_was_when_interrupted_while_data_is_read(llama_dir: Path):
    def batches() -> Any:
        yield padded_batches()[0]
        torch.rand(3), random.random(), np.random.rand()
        raise KeyboardInterrupt

    model = prepared(DENSE, llama_dir, True)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        run_on(model, batches())
    check_same(before, snapshot(model))


def test_calibration_comes_to_the_same_in_train_and_eval_mode_and_twice(llama_dir: Path):
    model = NF4.load(llama_dir)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    scores = [run_on(model.train(mode), padded_batches()).scores for mode in (True, False, True)]
    for name in scores[0]:
        assert torch.equal(scores[0][name], scores[1][name]) and torch.equal(scores[0][name], scores[2][name])


def test_buffers_that_a_forward_pass_replaces_are_put_back_with_what_it_remembers_of_them():
    class Growing(nn.Module):  # as rotary embeddings do on long sequences
        def __init__(self) -> None:
            super().__init__()
            self.longest = 4
            self.register_buffer("table", torch.zeros(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) > self.longest:
                self.longest, self.table, self.seen = len(x), torch.ones(len(x)), x
            return x

    model = Growing().train()
    table = model.table
    with pytest.raises(KeyboardInterrupt), untouched(model):
        assert not model.training
        model(torch.zeros(9))
        raise KeyboardInterrupt
    assert model.table is table and model.longest == 4 and model.training and not hasattr(model, "seen")


def test_what_is_trained_inside_keeps_what_it_has(llama_dir: Path):
    model = get_peft_model(NF4.load(llama_dir), SGRQConfig(task_type="CAUSAL_LM"))
    layer = next(module for module in model.modules() if isinstance(module, SGRQLinear))
    layer.train()
    with untouched(model):
        layer.kept = layer.delta("default").kept = True
    assert layer.kept and layer.delta("default").kept and layer.training


def test_parts_that_are_taken_out_come_back_where_they_were():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    x = torch.ones(1, 2)
    before = model(x)
    with untouched(model):
        first = model._modules.pop("0")
        model.add_module("further", nn.ReLU())
        model.add_module("0", first)
    assert list(model._modules) == ["0", "1", "2"] and torch.equal(model(x), before)
