"""What each of several processes trains on one machine, and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import distributed


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        engine (`str`): ddp, fsdp2, zero2 or zero3; what a single process does in its place is plain training.
        base (`str`): nf4, nf4-nested, int8 or dense.
        method (`str`): sgrq or lora.
        trainer (`str`): sft or dpo.
        dtype (`str`): In which the base computes.
        storage (`str`): In which bitsandbytes keeps 4-bit codes; FSDP2 shards what is stored in floating point.
        arguments (`dict`): Of the trainer.
        engine_arguments (`dict`): Of the engine.
        config (`dict`): Of the adapter.
        resume_at (`int` or `None`): The step at which training is stopped, saved, and gone on with by a new trainer.
        load (`Callable` or `None`): What loads the base from the model's folder, if it is none of these.
    """

    engine: str
    base: str
    method: str = "sgrq"
    trainer: str = "sft"
    dtype: str = "float32"
    storage: str = "uint8"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    engine_arguments: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    resume_at: int | None = None
    load: Callable[[Path | str], Any] | None = None


REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
NON_REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}


def load_base(case: Case, directory: Path | str) -> Any:
    """The model of a case in eval mode, quantized while loading."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from peft_sgrq.base.workarounds.bnb_cpu_packing import disable_cpu_packing

    if case.load is not None:
        return case.load(directory)
    settings: dict[str, Any] = {"dtype": getattr(torch, case.dtype)}
    if case.base == "int8":
        settings["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif case.base.startswith("nf4"):
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=case.base == "nf4-nested",
            bnb_4bit_compute_dtype=getattr(torch, case.dtype),
            bnb_4bit_quant_storage=getattr(torch, case.storage),
        )
    model = AutoModelForCausalLM.from_pretrained(directory, **settings)
    disable_cpu_packing(model)
    return model.eval()


def _engine_arguments(case: Case) -> dict[str, Any]:
    if case.engine == "fsdp2":
        wrapped = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        return {"fsdp": True, "fsdp_config": {**wrapped, **case.engine_arguments}}
    if case.engine.startswith("zero"):
        zero = {"stage": int(case.engine[-1]), "stage3_gather_16bit_weights_on_model_save": True}
        sizes = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
        config = {
            **dict.fromkeys((*sizes, "gradient_clipping"), "auto"),
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            **case.engine_arguments,
        }
        return {"deepspeed": config}
    return dict(case.engine_arguments)


def make_trainer(case: Case, directory: Path | str, out: Path | str, processes: int = 1) -> Any:
    """The trainer of a case; the batch of 4 is shared among the processes.

    Args:
        case (`Case`): What to train.
        directory (`Path` or `str`): A Llama in float32, with its tokenizer.
        out (`Path` or `str`): Where the trainer writes.
        processes (`int`): How many there are; with one, there is no engine.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    from peft_sgrq import SGRQConfig

    torch.manual_seed(0)
    arguments = {
        "output_dir": str(out),
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "bf16": False,
        "per_device_train_batch_size": 4 // processes,
        "max_steps": 3,
        "max_length": 32,
        "optim": "sgd",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        **(_engine_arguments(case) if processes > 1 else {}),
        **case.arguments,
    }
    if case.resume_at:
        arguments |= {"save_strategy": "steps", "save_steps": case.resume_at}
    if case.method == "lora":
        adapter: Any = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear", **case.config)
    else:
        adapter = SGRQConfig(task_type="CAUSAL_LM", **case.config)
    texts = [f"The sum of {i} and {i + 3} is {2 * i + 3}. " * (1 + i % 2) for i in range(48)]  # of unequal length
    tokenizer = AutoTokenizer.from_pretrained(directory)
    shared = {"processing_class": tokenizer, "peft_config": adapter}
    if case.trainer == "dpo":
        rows = {"prompt": [text[:12] for text in texts], "chosen": [text[12:] for text in texts]}
        rows["rejected"] = [f" a lot, {i}." for i in range(48)]
        data = Dataset.from_dict(rows)
        return DPOTrainer(load_base(case, directory), args=DPOConfig(**arguments), train_dataset=data, **shared)
    data = Dataset.from_dict({"text": texts})
    return SFTTrainer(load_base(case, directory), args=SFTConfig(**arguments), train_dataset=data, **shared)


def adapter_parameters(model: Any) -> dict[str, torch.Tensor]:
    """The trained parameters of a model by name, whole on every process."""
    found = {}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "")
        if not parameter.requires_grad:
            continue
        value = parameter.detach()
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                value = parameter.detach().clone()
        elif hasattr(value, "full_tensor"):
            value = value.full_tensor()
        found[name] = value.clone()
    return found


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Of a fixed batch, in eval mode, float32 `[2, 16, vocabulary]`."""
    ids = torch.randint(3, 256, (2, 16), generator=torch.Generator().manual_seed(1))
    model.eval()  # DeepSpeed's returns nothing
    return model(input_ids=ids).logits.float()


def train(case: Case, directory: Path | str, out: Path, processes: int = 1, observe: Any = None) -> dict[str, Any]:
    """Trains a case, and saves its adapter in `out` as trainers do.

    Returns:
        The losses, the adapter's parameters (`parameters`), the logits after training under the engine (`logits`), the
        class an engine has wrapped the model in (`wrapped`), the dtypes of the optimizer's states (`dtypes`), and with
        `resume_at` what came of going on from there (`resumed`).
    """
    trainer = make_trainer(case, directory, out, processes)
    if observe is not None:
        observe(trainer)
    trainer.train()
    found = _results(trainer)
    trainer.save_model(str(out))
    if case.resume_at:
        wait()
        resumed = make_trainer(case, directory, out / "resumed", processes)
        resumed.train(resume_from_checkpoint=str(out / f"checkpoint-{case.resume_at}"))
        found["resumed"] = _results(resumed)
    return found


def _results(trainer: Any) -> dict[str, Any]:
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "parameters": adapter_parameters(trainer.model),
        "logits": logits(trainer.model_wrapped),
        "wrapped": type(trainer.model_wrapped).__name__,
        "dtypes": sorted({str(value.dtype) for value in states if value.numel() > 1}),
    }


def wait() -> None:
    """Waits for the other processes, if there are any."""
    if distributed.is_initialized():
        distributed.barrier()
