"""What a Trainer trained an adapter with, noted for its model card: data, steps, batches, rate, optimizer, seed.

PEFT saves the adapter and its card, and knows nothing of the Trainer. A callback that every Trainer gets notes it on
the config of the adapter. Loops of one's own note nothing, and the card has no such rows.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

_added: list[type] = []


def note_training() -> None:
    """Has every Trainer that is made from now on note on the configs of its adapters what it trains them with."""
    trainer = sys.modules.get("transformers.trainer")  # who uses none need not load it
    if trainer is None or _added:
        return
    from transformers.trainer_callback import TrainerCallback

    class TrainingRecord(TrainerCallback):
        """Notes the settings at the start of training, and how far it is at every step."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            record = describe_training(args, state, kwargs.get("train_dataloader"))
            for config in _configs(kwargs.get("model")):
                config.trained_with = dict(record)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for config in _configs(kwargs.get("model")):
                config.trained_with["steps"] = f"{state.global_step:,}"

    trainer.DEFAULT_CALLBACKS.append(TrainingRecord)
    _added.append(TrainingRecord)


def _configs(model: Any) -> list[Any]:
    configs = (getattr(model, "peft_config", None) or {}).values()
    return [config for config in configs if hasattr(config, "trained_with") and not config.inference_mode]


def describe_training(args: Any, state: Any, loader: Any) -> dict[str, str]:
    """The rows of the card, from the arguments of a Trainer.

    Args:
        args (`TrainingArguments`): Of the Trainer.
        state (`TrainerState`): How far it is.
        loader (`DataLoader` or `None`): Of the training data.

    Returns:
        `dict[str, str]`: What each row is about -> what it says.
    """
    accumulation, processes = args.gradient_accumulation_steps, args.world_size
    batch = f"{args.per_device_train_batch_size * accumulation * processes}"
    if accumulation * processes > 1:
        batch += f" ({args.per_device_train_batch_size} x {accumulation} accumulated x {processes} processes)"
    schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    optimizer = getattr(args.optim, "value", args.optim)
    betas = f"{args.adam_beta1:g} and {args.adam_beta2:g}"
    record = {
        "data": _data(getattr(loader, "dataset", None)),
        "steps": f"{state.global_step:,}",
        "batch size": batch,
        "learning rate": f"{args.learning_rate:g}, {schedule}, warm-up {args.warmup_steps:g}",
        "optimizer": f"{optimizer}, betas {betas}, weight decay {args.weight_decay:g}",
        "seed": str(args.seed),
    }
    length = getattr(args, "max_length", None)
    if length is not None:
        record["longest sequence"] = f"{length:,} tokens"
    return {name: text for name, text in record.items() if text}


def _data(dataset: Any) -> str:
    """Name and size of a dataset; that of one of the Hub is in the path of its cache alone, as NAMESPACE___NAME."""
    files = [Path(file["filename"]) for file in getattr(dataset, "cache_files", None) or ()]
    names = dict.fromkeys(part.replace("___", "/", 1) for file in files for part in file.parts if "___" in part)
    try:
        rows = f"{len(dataset):,} rows"
    except TypeError:  # a stream
        rows = ""
    return ", ".join(filter(None, [*(f"`{name}`" for name in names), rows]))
