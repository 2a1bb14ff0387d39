"""Preference and reinforcement trainers compare with the adapter training starts from, or with the base."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from packaging.version import Version
from peft import PeftModel
from support.bases import INT8, NF4_NESTED, TRAINING, Base, adapted, byte_tokenizer, logits
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer

from peft_sgrq import SGRQConfig

pytestmark = pytest.mark.slow

PROMPTS = [f"{i} plus {i + 1} is" for i in range(10, 22)]
SETTINGS = {**TRAINING, "max_steps": 4, "warmup_steps": 0}


def dpo(model: Any, directory: Path, config: SGRQConfig | None = None, **kwargs: Any) -> DPOTrainer:
    rows = {
        "prompt": PROMPTS,
        "chosen": [f" {2 * i + 1}." for i in range(10, 22)],
        "rejected": [" a lot, I think." for _ in PROMPTS],
    }
    arguments = DPOConfig(str(directory), max_length=48, **{**SETTINGS, **kwargs})
    data = Dataset.from_dict(rows)
    return DPOTrainer(model, args=arguments, train_dataset=data, processing_class=byte_tokenizer(), peft_config=config)


def kto(model: Any, directory: Path, config: SGRQConfig | None = None, **kwargs: Any) -> KTOTrainer:
    rows = {
        "prompt": PROMPTS,
        "completion": [f" {2 * i + 1}." for i in range(10, 22)],
        "label": [True, False] * 6,
    }
    arguments = KTOConfig(str(directory), max_length=48, **{**SETTINGS, **kwargs})
    data = Dataset.from_dict(rows)
    return KTOTrainer(model, args=arguments, train_dataset=data, processing_class=byte_tokenizer(), peft_config=config)


def few_spaces(completions: list[str], **kwargs: Any) -> list[float]:
    return [sum(character.isalpha() for character in text) / 8 for text in completions]


def grpo(model: Any, directory: Path, config: SGRQConfig | None = None, **kwargs: Any) -> GRPOTrainer:
    arguments = GRPOConfig(
        str(directory),
        **{**SETTINGS, "beta": 0.1, "num_generations": 2, "max_completion_length": 8, **kwargs},
    )
    data = Dataset.from_dict({"prompt": PROMPTS})
    return GRPOTrainer(
        model,
        few_spaces,
        args=arguments,
        train_dataset=data,
        processing_class=byte_tokenizer(),
        peft_config=config,
    )


TRAINERS = [dpo, kto, grpo]


def deltas(model: Any, adapter: str = "default") -> list[torch.Tensor]:
    marker = f".sgrq_delta.{adapter}."
    return [value.detach().clone() for name, value in model.named_parameters() if marker in name]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) > 0 and all(map(torch.equal, first, second))


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def outputs(trainer: Any, ids: torch.Tensor, adapter: str) -> torch.Tensor:
    """Logits with one adapter, without the autocast that `bf16=True` wraps around the forward of the model."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    model.set_adapter(adapter)
    result = logits(model, ids)
    model.set_adapter("default")
    return result


@pytest.mark.parametrize("tested", [NF4_NESTED, INT8], ids=lambda base: base.name)
@pytest.mark.parametrize("make", TRAINERS)
def test_the_reference_is_the_adapter_training_goes_on_from(make, tested: Base, llama_dir: Path, tmp_path: Path, ids):
    model = adapted(tested, llama_dir)
    start, expected = deltas(model), logits(model, ids)
    trainer = make(model, tmp_path)
    assert set(trainer.model.peft_config) == {"default", "ref"}
    assert same(deltas(trainer.model, "ref"), start)
    assert trainer.model.peft_config["ref"].selection == trainer.model.peft_config["default"].selection
    assert torch.equal(outputs(trainer, ids, "ref"), expected)
    trainer.train()
    assert same(deltas(trainer.model, "ref"), start) and torch.equal(outputs(trainer, ids, "ref"), expected)
    trained = deltas(trainer.model)
    assert not any(map(torch.equal, trained, start)) and not torch.equal(outputs(trainer, ids, "default"), expected)
    assert {value.dtype for value in trained} == {torch.float32}
    assert any(not torch.equal(value, value.bfloat16().float()) for value in trained)
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    states = [value for state in optimizer.state.values() for value in state.values() if value.numel() > 1]
    assert len(states) == 2 * len(trained) and {value.dtype for value in states} == {torch.float32}
    # The saved model is the trained adapter alone.
    trainer.save_model(tmp_path / "adapter")
    assert same(deltas(PeftModel.from_pretrained(tested.load(llama_dir), tmp_path / "adapter")), trained)


@pytest.mark.parametrize("make", TRAINERS)
def test_a_reference_selects_what_the_adapter_selects(make, llama_dir: Path, tmp_path: Path, ids):
    masks = dict(adapted(NF4_NESTED, llama_dir).peft_config["default"].selection)
    swapped = {name: {"80": "40", "40": "80"}[mask] if "down" in name else mask for name, mask in masks.items()}
    model = adapted(NF4_NESTED, llama_dir, selection=swapped)
    expected = logits(model, ids)
    trainer = make(model, tmp_path)
    assert trainer.model.peft_config["ref"].selection == swapped != masks
    assert torch.equal(outputs(trainer, ids, "ref"), expected)


@pytest.mark.parametrize("tested", [NF4_NESTED, INT8], ids=lambda base: base.name)
def test_dpo_starts_at_no_preference(tested: Base, llama_dir: Path, tmp_path: Path):
    for name, model, config in (
        ("new", tested.load(llama_dir), SGRQConfig(ratio=0.5, task_type="CAUSAL_LM")),
        ("trained", adapted(tested, llama_dir), None),
    ):
        trainer = dpo(model, tmp_path / name, config, max_steps=12)
        trainer.train()
        assert math.isclose(logged(trainer, "loss")[0], math.log(2), abs_tol=1e-6)
        assert logged(trainer, "rewards/margins")[0] == 0.0
        assert sum(logged(trainer, "loss")[-4:]) / 4 < math.log(2) and logged(trainer, "rewards/margins")[-1] > 0


@pytest.mark.parametrize("start", ["new", "trained"])
def test_grpo_starts_at_no_divergence(start, llama_dir: Path, tmp_path: Path):
    model = NF4_NESTED.load(llama_dir) if start == "new" else adapted(NF4_NESTED, llama_dir)
    config = SGRQConfig(ratio=0.5, task_type="CAUSAL_LM") if start == "new" else None
    trainer = grpo(model, tmp_path, config, max_steps=6)
    trainer.train()
    assert logged(trainer, "kl")[0] == 0.0 and logged(trainer, "kl")[-1] > 0.0


@pytest.mark.parametrize("make", TRAINERS)
def test_a_new_adapter_is_compared_with_the_base(make, llama_dir: Path, tmp_path: Path, ids):
    base = logits(NF4_NESTED.load(llama_dir), ids)
    trainer = make(NF4_NESTED.load(llama_dir), tmp_path, SGRQConfig(ratio=0.5, task_type="CAUSAL_LM"))
    assert set(trainer.model.peft_config) == {"default"} and trainer.ref_model is None
    assert torch.equal(outputs(trainer, ids, "default"), base)
    trainer.train()
    assert not torch.equal(outputs(trainer, ids, "default"), base)
    with trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).disable_adapter():
        assert torch.equal(outputs(trainer, ids, "default"), base)


@pytest.mark.skipif(Version(trl.__version__) < Version("1.16"), reason="TRL 1.14 resumes DPO from the base, LoRA too")
def test_a_resumed_dpo_has_the_bits_of_one_never_stopped(llama_dir: Path, tmp_path: Path):
    kwargs = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    whole = dpo(adapted(NF4_NESTED, llama_dir), tmp_path, **kwargs)
    whole.train()
    resumed = dpo(adapted(NF4_NESTED, llama_dir), tmp_path / "resumed", **kwargs)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert len(logged(whole, "loss")) == 8 and logged(resumed, "loss") == logged(whole, "loss")
    assert same(deltas(resumed.model), deltas(whole.model))
    assert same(deltas(resumed.model, "ref"), deltas(whole.model, "ref"))
    assert not same(deltas(whole.model, "ref"), deltas(whole.model))
