"""GPTQ, AWQ and AutoRound checkpoints through real trainers, and in several files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from support.bases import TRAINING, logits
from support.packed_checkpoints import CHECKPOINTS, Checkpoint
from support.quantized_checkpoints import same_bytes, tensors_of
from transformers import AutoTokenizer, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from peft_sgrq import SGRQConfig, merge_checkpoint, verify_checkpoint

pytestmark = pytest.mark.slow

BY_NAME = {checkpoint.name: checkpoint for checkpoint in CHECKPOINTS}
AUTOROUND, AUTOROUND_AWQ = BY_NAME["autoround-4bit"], BY_NAME["autoround-4bit-asym"]
TRAINABLE = [BY_NAME["gptq-4bit"], BY_NAME["awq-4bit"]]  # transformers calls them so
SHARDED = [BY_NAME["gptq-4bit"], BY_NAME["awq-4bit"], AUTOROUND]
named = {"ids": lambda checkpoint: checkpoint.name}


@pytest.fixture(autouse=True)
def uncompiled(eager) -> None:
    """Kernels are compiled in test_packed_models.py."""


def examples(ids: torch.Tensor) -> Dataset:
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


def with_adapter(checkpoint: Checkpoint, directory: Path) -> PeftModel:
    return get_peft_model(checkpoint.load(directory), SGRQConfig(ratio=0.5, task_type="CAUSAL_LM"))


def check_trained(trainer: Any, before: torch.Tensor, ids: torch.Tensor, scratch: Path, load: Any) -> None:
    """That a run has learnt, and that merging, saving and loading keep what it has."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    trained = logits(trainer.model.eval(), ids)
    assert not torch.equal(trained, before)
    trainer.save_model(scratch / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(load(), scratch / "adapter").eval(), ids), trained)
    assert torch.equal(logits(trainer.model.merge_and_unload(), ids), trained)


@pytest.mark.parametrize("checkpoint", [AUTOROUND, AUTOROUND_AWQ], **named)
def test_transformers_still_calls_autoround_untrainable(checkpoint, packed_checkpoints):
    checkpoint.require()
    assert not checkpoint.load(packed_checkpoints[checkpoint.name]).hf_quantizer.is_trainable


@pytest.mark.parametrize("checkpoint", [AUTOROUND, AUTOROUND_AWQ], **named)
def test_a_trainer_trains_an_adapter_on_autoround(checkpoint, packed_checkpoints, ids, tmp_path):
    checkpoint.require()
    directory = packed_checkpoints[checkpoint.name]
    model = with_adapter(checkpoint, directory)
    before = logits(model.eval(), ids)
    trainer = Trainer(model, TrainingArguments(tmp_path, max_steps=3, **TRAINING), train_dataset=examples(ids))
    trainer.train()
    check_trained(trainer, before, ids, tmp_path, lambda: checkpoint.load(directory))


@pytest.mark.parametrize("checkpoint", [AUTOROUND, AUTOROUND_AWQ], **named)
def test_sfttrainer_makes_the_adapter_on_autoround(checkpoint, packed_checkpoints, ids, tmp_path):
    checkpoint.require()
    directory = packed_checkpoints[checkpoint.name]
    model = checkpoint.load(directory)
    before = logits(model, ids)
    # Not the model that has run: GPTQModel rounds AWQ's scales when it does (see base/workarounds/awq_scale_dtype.py).
    model = checkpoint.load(directory)
    trainer = _sft_trainer(model, directory, tmp_path)
    trainer.train()
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters() if p.requires_grad)
    check_trained(trainer, before, ids, tmp_path, lambda: checkpoint.load(directory))


@pytest.mark.parametrize("checkpoint", TRAINABLE, **named)
def test_sfttrainer_trains_an_adapter_on_gptq_and_awq_as_it_is(checkpoint, packed_checkpoints, ids, tmp_path):
    checkpoint.require()
    directory = packed_checkpoints[checkpoint.name]
    before = logits(checkpoint.load(directory), ids)
    trainer = _sft_trainer(checkpoint.load(directory), directory, tmp_path)
    trainer.train()
    check_trained(trainer, before, ids, tmp_path, lambda: checkpoint.load(directory))


def _sft_trainer(model: Any, directory: Path, scratch: Path) -> SFTTrainer:
    return SFTTrainer(
        model,
        # torch does not mix autocast to bfloat16 with a float16 model on CPUs, adapter or not.
        args=SFTConfig(scratch, max_steps=4, max_length=32, bf16=model.dtype == torch.bfloat16, **TRAINING),
        train_dataset=Dataset.from_dict({"text": ["one two three four"] * 8}),
        processing_class=AutoTokenizer.from_pretrained(directory),
        peft_config=SGRQConfig(ratio=0.5, task_type="CAUSAL_LM"),
    )


# several files


@pytest.mark.parametrize("checkpoint", SHARDED, **named)
def test_a_checkpoint_of_several_files_is_merged_file_by_file(checkpoint, packed_checkpoints, ids, tmp_path):
    checkpoint.require()
    # A real one in shards: what transformers saves of a base that an adapter was taken off again.
    base = tmp_path / "base"
    plain = with_adapter(checkpoint, packed_checkpoints[checkpoint.name]).unload()
    plain.save_pretrained(base, max_shard_size="100KB")
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(shards) > 2 and (base / "model.safetensors.index.json").is_file()
    config = SGRQConfig(ratio=0.5, task_type="CAUSAL_LM", init_weights=False)
    model = get_peft_model(checkpoint.load(base), config).eval()
    unmerged = logits(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "files")
    model.merge_and_unload().save_pretrained(tmp_path / "memory", max_shard_size="100KB")

    assert sorted(path.name for path in (tmp_path / "files").glob("*.safetensors")) == shards
    index = "model.safetensors.index.json"
    assert (tmp_path / "files" / index).read_bytes() == (base / index).read_bytes()
    before, on_files, in_memory = (tensors_of(tmp_path / name) for name in ("base", "files", "memory"))
    assert before.keys() == on_files.keys() == in_memory.keys()
    assert [name for name in on_files if not same_bytes(on_files[name], in_memory[name])] == []
    changed = {name for name in before if not same_bytes(before[name], on_files[name])}
    assert changed == {name for name in before if name.endswith(".scales")}
    for merged in ("files", "memory"):
        assert verify_checkpoint(base, tmp_path / "adapter", tmp_path / merged).errors == []
        assert torch.equal(logits(checkpoint.load(tmp_path / merged), ids), unmerged)
