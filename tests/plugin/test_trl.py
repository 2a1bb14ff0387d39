"""Trainers train scales in float32, whatever they cast; stopping, resuming and evaluating changes no bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from support.bases import INT8, NF4, NF4_NESTED, TRAINING, Base, adapted, byte_tokenizer, logits
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from peft_sgrq import SGRQConfig
from peft_sgrq.base.workarounds.bnb_cpu_packing import disable_cpu_packing

pytestmark = pytest.mark.slow

FILE = "adapter_model.safetensors"
CONFIG = SGRQConfig(ratio=0.5, task_type="CAUSAL_LM")
BF16_NESTED = Base("nf4", True, torch.bfloat16)


@pytest.fixture(scope="module")
def texts() -> Dataset:
    return Dataset.from_dict({"text": [f"The sum of {i} and {i + 3} is {2 * i + 3}." for i in range(48)]})


def arguments(directory: Path, cls: type = SFTConfig, **kwargs: Any) -> Any:
    settings: dict[str, Any] = {
        **TRAINING,
        "output_dir": str(directory),
        "max_steps": 6,
        **({"max_length": 32} if cls is SFTConfig else {}),
        **kwargs,
    }
    return cls(**settings)


def sft(model: Any, texts: Dataset, directory: Path, config: Any = CONFIG, **kwargs: Any) -> SFTTrainer:
    extra = {"optimizer_cls_and_kwargs": kwargs.pop("optimizer")} if "optimizer" in kwargs else {}
    return SFTTrainer(
        model,
        args=arguments(directory, **kwargs),
        train_dataset=texts,
        eval_dataset=texts.select(range(4)),
        processing_class=byte_tokenizer(),
        peft_config=config,
        **extra,
    )


def deltas(model: Any) -> list[torch.Tensor]:
    return [value.detach().clone() for name, value in model.named_parameters() if ".sgrq_delta." in name]


def outputs(trainer: Trainer, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the trained model without the autocast that `bf16=True` wraps around its forward."""
    return logits(trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval(), ids)


def stored(directory: Path, model: Any) -> list[torch.Tensor]:
    tensors = load_file(directory / FILE)
    names = [name for name, _ in model.named_parameters() if ".sgrq_delta." in name]
    return [tensors[name.replace(".default.", ".")] for name in names]


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def states(trainer: Trainer) -> list[torch.Tensor]:
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    values = [value for state in optimizer.state.values() for value in state.values()]
    return [value for value in values if torch.is_tensor(value) and value.numel() > 1]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) > 0 and all(map(torch.equal, first, second))


def check_float32_training(trainer: Trainer, before: list[torch.Tensor]) -> None:
    after = deltas(trainer.model)
    assert {value.dtype for value in after} == {value.dtype for value in states(trainer)} == {torch.float32}
    assert len(states(trainer)) == 2 * len(after)
    assert all(not torch.equal(new, old) for new, old in zip(after, before, strict=True))
    # A training that rounds to bfloat16 anywhere on the way has few bits.
    assert any(not torch.equal(value, value.bfloat16().float()) for value in after)


# what is trained


@pytest.mark.parametrize(  # each base, both ways to compute on one of each dtype
    ("tested", "bf16"),
    [(NF4_NESTED, True), (NF4_NESTED, False), (BF16_NESTED, True), (BF16_NESTED, False), (NF4, True), (INT8, True)],
    ids=lambda value: getattr(value, "name", None) or ("no-autocast", "autocast")[value is True],
)
def test_sft_trains_float32_deltas_with_float32_states(
    tested: Base, bf16, texts, llama_dir: Path, tmp_path: Path, ids
):
    trainer = sft(tested.load(llama_dir), texts, tmp_path, bf16=bf16, max_steps=24)
    base = {name: value.clone() for name, value in trainer.model.state_dict().items() if "sgrq" not in name}
    before = deltas(trainer.model)
    trainer.train()
    check_float32_training(trainer, before)
    assert sum(losses(trainer)[-4:]) < sum(losses(trainer)[:4])
    assert all(torch.equal(trainer.model.state_dict()[name], value) for name, value in base.items())
    trainer.save_model(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tested.load(llama_dir), tmp_path / "adapter")
    assert same(deltas(loaded), deltas(trainer.model))
    assert torch.equal(logits(loaded, ids), outputs(trainer, ids))


def test_trl_still_casts_adapters_to_bfloat16(texts, llama_dir: Path, tmp_path: Path):
    """Once this fails, `DeltaParameter` has nothing to do for TRL any more."""
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = sft(NF4.load(llama_dir), texts, tmp_path, config=lora)
    assert {value.dtype for value in trainer.model.parameters() if value.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize("tested", [NF4_NESTED, INT8], ids=lambda base: base.name)
def test_a_trained_adapter_keeps_all_bits_when_training_goes_on(tested: Base, texts, llama_dir, tmp_path, ids):
    model = adapted(tested, llama_dir)
    before, expected = deltas(model), logits(model, ids)
    trainer = sft(model, texts, tmp_path, config=None, learning_rate=0.0)
    trainer.save_model(tmp_path / "saved")
    assert same(stored(tmp_path / "saved", model), before)
    assert torch.equal(logits(trainer.model.eval(), ids), expected)
    trainer.train()
    assert same(deltas(trainer.model), before) and torch.equal(outputs(trainer, ids), expected)


def test_a_model_named_by_its_path_is_quantized_and_trained(texts, llama_dir: Path, tmp_path: Path, ids):
    init = {"quantization_config": NF4_NESTED.quantization, "dtype": torch.float32}
    trainer = sft(str(llama_dir), texts, tmp_path, model_init_kwargs=init)
    before = deltas(trainer.model)
    trainer.train()
    check_float32_training(trainer, before)
    again = sft(NF4_NESTED.load(llama_dir), texts, tmp_path)
    again.train()
    assert same(deltas(again.model), deltas(trainer.model))


def test_a_merged_model_is_the_trained_one_without_peft(texts, llama_dir: Path, tmp_path: Path, ids):
    trainer = sft(NF4_NESTED.load(llama_dir), texts, tmp_path)
    trainer.train()
    expected = outputs(trainer, ids)
    merged = trainer.model.merge_and_unload()
    assert torch.equal(logits(merged, ids), expected)
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    disable_cpu_packing(loaded)  # bitsandbytes' packed kernel rounds scales to bfloat16
    assert torch.equal(logits(loaded, ids), expected)


# nothing on the way changes a bit


@pytest.mark.parametrize("tested", [NF4_NESTED, INT8], ids=lambda base: base.name)
def test_a_resumed_training_has_the_bits_of_one_never_stopped(tested: Base, texts, llama_dir: Path, tmp_path: Path):
    kwargs = {"max_steps": 30, "save_strategy": "steps", "save_steps": 10}
    whole = sft(tested.load(llama_dir), texts, tmp_path, **kwargs)
    whole.train()
    resumed = sft(tested.load(llama_dir), texts, tmp_path / "resumed", **kwargs)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert len(losses(whole)) == 30 and losses(resumed) == losses(whole)
    assert same(deltas(resumed.model), deltas(whole.model)) and same(states(resumed), states(whole))
    assert (tmp_path / "checkpoint-30" / FILE).read_bytes() == (tmp_path / "resumed/checkpoint-30" / FILE).read_bytes()
    fresh = sft(tested.load(llama_dir), texts, tmp_path / "fresh", **kwargs | {"max_steps": 20})
    fresh.train()
    assert not same(deltas(fresh.model), deltas(whole.model))


@pytest.mark.parametrize("tested", [NF4_NESTED, INT8], ids=lambda base: base.name)
def test_evaluating_on_the_way_changes_nothing(tested: Base, texts, llama_dir: Path, tmp_path: Path):
    silent = sft(tested.load(llama_dir), texts, tmp_path, max_steps=12)
    silent.train()
    watched = sft(tested.load(llama_dir), texts, tmp_path, max_steps=12, eval_strategy="steps", eval_steps=3)
    first = watched.evaluate()["eval_loss"]
    watched.train()
    evaluated = [entry["eval_loss"] for entry in watched.state.log_history if "eval_loss" in entry][-4:]
    assert losses(watched) == losses(silent) and same(deltas(watched.model), deltas(silent.model))
    assert len({first, *evaluated}) == 5 and evaluated[-1] == silent.evaluate()["eval_loss"]


def test_the_best_model_is_loaded_at_the_end(texts, llama_dir: Path, tmp_path: Path, ids):
    trainer = sft(
        NF4_NESTED.load(llama_dir),
        texts,
        tmp_path,
        max_steps=12,
        save_strategy="steps",
        save_steps=4,
        eval_strategy="steps",
        eval_steps=4,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the losses fall, so the best by this measure is not the last
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    best = PeftModel.from_pretrained(NF4_NESTED.load(llama_dir), tmp_path / "checkpoint-4")
    last = PeftModel.from_pretrained(NF4_NESTED.load(llama_dir), tmp_path / "checkpoint-12")
    assert same(deltas(trainer.model), deltas(best)) and not same(deltas(trainer.model), deltas(last))
    assert torch.equal(outputs(trainer, ids), logits(best, ids))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant, texts, llama_dir: Path, tmp_path: Path):
    plain = sft(NF4_NESTED.load(llama_dir), texts, tmp_path, gradient_checkpointing=False)
    kwargs = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    checkpointed = sft(NF4_NESTED.load(llama_dir), texts, tmp_path, **kwargs)
    for trainer in (plain, checkpointed):
        trainer.train()
    assert checkpointed.model.is_gradient_checkpointing and not plain.model.is_gradient_checkpointing
    assert losses(checkpointed) == losses(plain) and same(deltas(checkpointed.model), deltas(plain.model))


# other optimizers and trainers


def test_8_bit_adam_trains_float32_deltas(texts, llama_dir: Path, tmp_path: Path):
    named = sft(NF4_NESTED.load(llama_dir), texts, tmp_path, optim="adamw_8bit")
    before = deltas(named.model)
    named.train()
    check_float32_training(named, before)  # bitsandbytes keeps states of fewer than 4096 numbers in float32
    optimizer = (AdamW8bit, {"lr": 1e-2, "min_8bit_size": 0})
    trainer = sft(NF4_NESTED.load(llama_dir), texts, tmp_path, optimizer=optimizer)
    trainer.train()
    assert torch.uint8 in {value.dtype for value in states(trainer)}
    assert {value.dtype for value in deltas(trainer.model)} == {torch.float32}
    assert not any(map(torch.equal, deltas(trainer.model), before))
    assert losses(trainer)[0] == losses(named)[0] and losses(trainer)[2:] != losses(named)[2:]


def test_a_compiled_model_trains(llama_dir: Path, tmp_path: Path, monkeypatch):
    # What a graph cannot choose by values, and sums in another order: tests/layer/test_copies.py compares both.
    monkeypatch.setattr("peft_sgrq.layer.functional.dequantizes_once", lambda *args: False)
    texts = Dataset.from_dict({"text": [f"The number {i}." for i in range(10, 20)]})  # one length: one compilation
    # Traced and differentiated ahead of time as always, but without a minute for the C++ compiler.
    kwargs = {"torch_compile": True, "torch_compile_backend": "aot_eager", "bf16": False, "max_steps": 3}
    trainers = []
    for settings in (kwargs, {"bf16": False, "max_steps": 3}):
        model = NF4_NESTED.load(llama_dir)
        del model.model.layers[1]
        trainers.append(sft(model, texts, tmp_path, gradient_checkpointing=False, **settings))
        before = deltas(model)
        trainers[-1].train()
        check_float32_training(trainers[-1], before)
    compiled, plain = trainers
    assert losses(compiled) == losses(plain) and same(deltas(compiled.model), deltas(plain.model))


@pytest.mark.parametrize("tested", [NF4_NESTED, BF16_NESTED, INT8], ids=lambda base: base.name)
def test_a_plain_trainer_trains_an_added_adapter(tested: Base, texts, llama_dir: Path, tmp_path: Path, ids):
    tokenizer, model = byte_tokenizer(), tested.load(llama_dir)
    model.add_adapter(SGRQConfig(ratio=0.5))
    before = deltas(model)
    data = texts.map(lambda row: tokenizer(row["text"]), remove_columns="text")
    trainer = Trainer(
        model,
        arguments(tmp_path, TrainingArguments),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        train_dataset=data,
    )
    trainer.train()
    check_float32_training(trainer, before)
    trainer.save_model(tmp_path / "adapter")
    loaded = tested.load(llama_dir)
    loaded.load_adapter(str(tmp_path / "adapter"))
    assert same(deltas(loaded), deltas(model)) and torch.equal(logits(loaded, ids), logits(model.eval(), ids))
