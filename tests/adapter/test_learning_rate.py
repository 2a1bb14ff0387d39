"""A learning rate of LoRA is warned of, once, where an adapter is trained; nothing else is."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from support.bases import NF4, TRAINING
from transformers import Trainer, TrainingArguments

from peft_sgrq import SGRQConfig
from peft_sgrq.adapter import learning_rate


@pytest.fixture(autouse=True)
def nothing_watched() -> Iterator[None]:
    yield
    while learning_rate._handles:
        learning_rate._handles.pop().remove()


def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """What three steps warn of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            model(input_ids=torch.arange(3, 20)[None], labels=torch.arange(3, 20)[None]).loss.backward()
            optimizer.step()
    return [str(warning.message) for warning in caught if "learning rate" in str(warning.message)]


def trained(llama_dir: Path, config: object) -> tuple[torch.nn.Module, list[torch.nn.Parameter]]:
    model = get_peft_model(NF4.load(llama_dir), config)
    return model, [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize(
    ("rate", "optimizer", "config", "count"),
    [
        (2e-4, torch.optim.AdamW, {}, 1),
        (2e-5, torch.optim.Adam, {}, 1),
        (1e-3, torch.optim.AdamW, {}, 0),
        (2e-2, torch.optim.AdamW, {}, 0),
        (2e-4, torch.optim.AdamW, {"check_learning_rate": False}, 0),
        (2e-4, torch.optim.SGD, {}, 0),
    ],
)
def test_low_rates_of_adam_are_warned_of_once(rate, optimizer, config, count, llama_dir: Path):
    model, parameters = trained(llama_dir, SGRQConfig(task_type="CAUSAL_LM", **config))
    said = steps(model, optimizer(parameters, lr=rate))
    assert len(said) == count
    assert all(f"{rate:g}, expected about 0.006" in text and "check_learning_rate=False" in text for text in said)


def test_lora_is_not_looked_at(llama_dir: Path):
    get_peft_model(NF4.load(llama_dir), SGRQConfig(task_type="CAUSAL_LM"))
    model, parameters = trained(llama_dir, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    assert not steps(model, torch.optim.AdamW(parameters, lr=2e-4))


@pytest.mark.parametrize("rate", [2e-2, 2e-4])
def test_a_trainer_s_schedule_is_judged_by_its_peak(rate, llama_dir: Path, tmp_path: Path):
    model, _ = trained(llama_dir, SGRQConfig(task_type="CAUSAL_LM"))
    rows = [{"input_ids": list(range(3, 20)), "labels": list(range(3, 20))}] * 4
    settings = {**TRAINING, "learning_rate": rate, "warmup_steps": 2, "max_steps": 2}
    trainer = Trainer(model, TrainingArguments(tmp_path, **settings), train_dataset=Dataset.from_list(rows))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert sum("expected about 0.006" in str(warning.message) for warning in caught) == (rate < 1e-3)
